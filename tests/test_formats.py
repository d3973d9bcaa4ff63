"""Laws that every quantizer keeps, on cases that hypothesis makes up."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segquant_nb.formats import (DType, Quantizer, decode, encode, pack_int4, scale_from_range,
                                 unpack_int4)

settings.register_profile('repeatable', derandomize=True, deadline=None, max_examples=150)
settings.load_profile('repeatable')

INTS = [d for d in DType if d.is_int]
FLOATS = {DType.FP8E4M3: (3, -6), DType.FP8E5M2: (2, -14)}  # mantissa bits, lowest exponent
CODED = [*INTS, *FLOATS]


@st.composite
def tensors(draw, min_dims=1, max_dims=3, side=9, dtype=np.float32):
    "Values over many orders of magnitude, with zeros, repeats and both signs"
    shape = draw(hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=1, max_side=side))
    size = draw(st.sampled_from([1e-20, 1e-3, 1., 7., 1e4, 1e20]))
    unit = st.floats(-1, 1, width=32, allow_subnormal=False)
    return torch.from_numpy(draw(hnp.arrays(dtype, shape, elements=unit)))*size


@st.composite
def quantizers(draw, dynamic=None, dtypes=CODED, clips=('amax', 'percentile', 'mse')):
    dtype = draw(st.sampled_from(dtypes))
    return Quantizer(
        dtype, axis=draw(st.sampled_from([None, -1])), group=draw(st.sampled_from([None, 1, 2, 5, 64])),
        symmetric=draw(st.booleans()) if dtype.is_int else True, clip=draw(st.sampled_from(clips)),
        dynamic=draw(st.booleans()) if dynamic is None else dynamic)


@given(tensors(), quantizers(clips=['amax']))
def test_no_value_moves_further_than_half_a_step(x, q):
    q = q.fit(x)
    codes, _, _ = q.encode(x)
    (_, scale), = q.paths(x)
    error = (q.decode(*q.encode(x)).double() - x.double()).abs()
    slack = 4*torch.finfo(torch.float32).eps*x.double().abs()
    if q.dtype.is_int:
        bound = scale.double()/2*(1 + 1e-6)
    else:
        mantissa, lowest = FLOATS[q.dtype]
        _, exponent = torch.frexp(codes.double())
        bound = scale.double()*2.**((exponent - 1).clamp(min=lowest) - mantissa)/2
    # a scale is never smaller than the smallest normal float: below it everything is zero
    assert (error <= bound + slack + torch.finfo(torch.float32).tiny).all()


@given(tensors(), quantizers(dynamic=False))
def test_rounding_twice_is_rounding_once(x, q):
    q = q.fit(x)
    once = q.fake(x)
    assert torch.equal(q.fake(once), once)


@given(tensors(max_dims=1, side=40), quantizers(dynamic=False))
def test_order_is_kept(x, q):
    q = Quantizer(q.dtype, symmetric=q.symmetric, clip=q.clip).fit(x)
    y = q.fake(x[x.argsort()])
    assert (y[1:] >= y[:-1]).all()


@given(tensors(min_dims=2, max_dims=2), quantizers(), st.randoms())
def test_a_permutation_of_rows_permutes_the_result(x, q, random):
    order = torch.tensor(random.sample(range(len(x)), len(x)))
    shuffled = x[order]
    if q.axis is None:  # the sum of squares that the search compares depends on the order of addition
        q = Quantizer(q.dtype, q.axis, q.group, q.symmetric, q.dynamic)
    assert torch.equal(q.fit(shuffled).fake(shuffled), q.fit(x).fake(x)[order])


@given(tensors(), quantizers())
def test_paths_add_up_and_nothing_is_written_to(x, q):
    before, version = x.clone(), x._version
    q = q.fit(x)
    scale = None if q.scale is None else q.scale.clone()
    total = sum(codes.to(s.dtype)*s for codes, s in q.paths(x))
    assert torch.equal(total, q.fake(x))
    assert torch.equal(x, before) and x._version == version
    assert scale is None or torch.equal(q.scale, scale)


@given(tensors(min_dims=2), quantizers(dynamic=True))
def test_groups_are_the_same_as_separate_tensors(x, q):
    if q.axis is None or q.group is None:
        return
    alone = Quantizer(q.dtype, -1, None, q.symmetric, True, q.clip)
    parts = torch.cat([alone.fake(part) for part in x.split(q.group, -1)], -1)
    assert torch.equal(q.fake(x), parts)


@given(tensors(dtype=np.float64), quantizers(dtypes=INTS), st.integers(-20, 20))
def test_a_power_of_two_changes_nothing_but_the_scale(x, q, power):
    factor = 2.**power
    assert torch.equal(q.fit(x*factor).fake(x*factor), q.fit(x).fake(x)*factor)


@given(tensors(), quantizers(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_computes_in_float32(x, q, half):
    x = x.clamp(-6e4, 6e4).to(half)
    most = torch.finfo(half).max
    got = q.fit(x).fake(x)
    want = q.fit(x.float()).fake(x.float()).clamp(-most, most).to(half)
    assert got.dtype == half and torch.equal(got, want)


@pytest.mark.parametrize('dtype', [d for d in INTS if d.bits <= 8], ids=lambda d: d.value)
@given(x=tensors(max_dims=1, side=30, dtype=np.float64), symmetric=st.booleans())
def test_encode_finds_the_nearest_code(dtype, x, symmetric):
    scale, zero = scale_from_range(x.min(), x.max(), dtype, symmetric)
    codes = encode(x, scale, dtype, zero)
    table = decode(torch.arange(dtype.lowest, dtype.highest + 1), scale, zero)
    nearest = (table - x[:, None]).abs().amin(1)
    error = (decode(codes, scale, zero) - x).abs()
    assert (error <= nearest + 1e-12*x.abs().max()).all()


@pytest.mark.parametrize('dtype', FLOATS, ids=lambda d: d.value)
@given(x=tensors(max_dims=1, side=30), power=st.integers(-30, 30))
def test_float8_agrees_with_the_cast_of_pytorch(dtype, x, power):
    scale = torch.tensor(2.**power)  # exact, so that only the rounding is compared
    want = (x/scale).clamp(dtype.lowest, dtype.highest).to(dtype.storage)
    for precision in (torch.float32, torch.float64):
        got = encode(x.to(precision), scale.to(precision), dtype)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@given(tensors(), quantizers(dynamic=False), st.data())
def test_accidents_are_refused_in_calibration_and_defined_in_encode(x, q, data):
    q = q.fit(x)
    bad = x.clone()
    where = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    bad[where] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    with pytest.raises(ValueError, match=r'layer 7 .*1 values that are not finite'):
        q.fit(bad, 'layer 7')
    value = q.decode(*q.encode(bad))[where]
    if bad[where].isnan():
        assert value == 0 if q.dtype.is_int else value.isnan()
    else:
        biggest = q.decode(*q.encode(torch.full_like(x, 1e38).copysign(bad[where])))[where]
        assert value == biggest
    good = torch.ones_like(x, dtype=torch.bool)
    good[where] = False
    assert torch.equal(q.fake(bad)[good], q.fake(x)[good])


@given(tensors(), quantizers(dynamic=True), st.data())
def test_an_accident_does_not_spoil_a_dynamic_scale(x, q, data):
    bad = x.clone()
    where = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    bad[where] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    without = x.clone()
    without[where] = 0
    for got, want in zip(q.find_scale(bad), q.find_scale(without)):
        assert got is want or torch.equal(got, want)


@pytest.mark.parametrize('dtype', CODED, ids=lambda d: d.value)
def test_ties_go_to_the_even_code(dtype):
    one = torch.ones(1, dtype=torch.float64)
    ties = torch.tensor([-2.5, -1.5, -.5, .5, 1.5, 2.5], dtype=torch.float64)
    if dtype.is_int:
        assert encode(ties, one, dtype).tolist() == [-2, -2, 0, 0, 2, 2]
    else:
        step = 2.**-FLOATS[dtype][0]  # between 1 and 2
        got = encode(1 + (ties + 3)*step, one, dtype).double()
        assert torch.equal(got, 1 + torch.tensor([0, 2, 2, 4, 4, 6])*step)
        nearly = encode(torch.tensor([1 + step/2 + 2**-40], dtype=torch.float64), one, dtype)
        assert nearly.item() == 1 + step  # a cast by way of float32 would see a tie, and round down


def test_extremes_stay_finite():
    for dtype in CODED:
        for symmetric in (True, False) if dtype.is_int else (True,):
            q = Quantizer(dtype, symmetric=symmetric, dynamic=True)
            for kind in (torch.float16, torch.bfloat16, torch.float32):
                big = torch.tensor([-1, 1, .3])*torch.finfo(kind).max
                assert q.fake(big.to(kind)).isfinite().all(), (q, kind)
            tiny = torch.tensor([1e-45, -1e-42])  # a scale of 1e-47 would be zero
            assert (q.fake(tiny).abs() <= 1e-38).all(), q


@given(hnp.arrays(np.int8, hnp.array_shapes(max_dims=3, max_side=9), elements=st.integers(-8, 7)))
def test_int4_packs_and_unpacks(codes):
    codes = torch.from_numpy(codes)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*codes.shape[:-1], (codes.shape[-1] + 1)//2)
    assert torch.equal(unpack_int4(packed, codes.shape[-1]), codes)


@pytest.mark.parametrize('dtype', DType, ids=lambda d: d.value)
def test_compiles_without_graph_breaks(dtype):
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    for q in (Quantizer(dtype, -1, dynamic=True), Quantizer(dtype, -1, 8, dynamic=True), Quantizer(dtype).fit(x)):
        torch._dynamo.reset()  # each recipe is a compilation of its own, and there is a limit
        compiled = torch.compile(q.fake, fullgraph=True, backend='eager')
        assert torch.equal(compiled(x), q.fake(x))


def test_the_search_holds_where_quantile_stops():
    "`torch.quantile` refuses more than 16 million elements; a weight of FLUX has 38 million"
    x = torch.zeros(2**24 + 1)
    x[:100] = 1.
    q = Quantizer('int8', clip='percentile', percentile=99.9999).fit(x)
    assert q.scale == torch.tensor(1/127)
