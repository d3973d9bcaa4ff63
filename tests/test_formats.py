"""Laws that every quantizer keeps, on cases that hypothesis makes up."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segquant_nb.formats import (DType, Quantizer, decode, encode, pack_int4, per_granule, scale_from_range,
                                 search_range, spread, unpack_int4, value_range)

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
def quantizers(draw, dynamic=None, dtypes=CODED, clips=('amax', 'percentile', 'mse'), axes=(None, -1),
               groups=(None, 1, 2, 5, 64)):
    dtype = draw(st.sampled_from(dtypes))
    return Quantizer(
        dtype, axis=draw(st.sampled_from(axes)), group=draw(st.sampled_from(groups)),
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


@given(tensors(min_dims=2), quantizers(dynamic=True, axes=[-1], groups=[1, 2, 5, 64]))
def test_groups_are_the_same_as_separate_tensors(x, q):
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
    smallest = torch.tensor(1e-42)
    for low in (-smallest, 0*smallest):
        scale, _ = scale_from_range(low, smallest, 'int8', symmetric=low == 0)
        assert scale == torch.finfo(torch.float32).tiny


@given(hnp.arrays(np.int8, hnp.array_shapes(max_dims=3, max_side=9), elements=st.integers(-8, 7)))
def test_int4_packs_and_unpacks(codes):
    codes = torch.from_numpy(codes)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*codes.shape[:-1], (codes.shape[-1] + 1)//2)
    assert torch.equal(unpack_int4(packed, codes.shape[-1]), codes)


def compiled(f):
    torch._dynamo.reset()  # each recipe is a compilation of its own, and there is a limit
    return torch.compile(f, fullgraph=True, backend='eager')


@pytest.mark.parametrize('dtype', DType, ids=lambda d: d.value)
def test_compiles_without_graph_breaks(dtype):
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    for q in (Quantizer(dtype, -1, dynamic=True), Quantizer(dtype, -1, 8, dynamic=True), Quantizer(dtype).fit(x)):
        assert torch.equal(compiled(q.fake)(x), q.fake(x))


@pytest.mark.parametrize('clip', ['amax', 'percentile', 'mse'])
def test_every_way_to_find_a_range_compiles(clip):
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    q = Quantizer('int8', -1, 8, symmetric=False, dynamic=True, clip=clip)
    assert torch.equal(compiled(q.fake)(x), q.fake(x))


def test_a_module_that_holds_the_scale_in_buffers_compiles():
    class Fake(torch.nn.Module):
        def __init__(self, q):
            super().__init__()
            self.recipe = replace(q, scale=None, zero=None)
            self.register_buffer('scale', q.scale)
            self.register_buffer('zero', q.zero)

        def forward(self, x):
            return replace(self.recipe, scale=self.scale, zero=self.zero).fake(x)

    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    q = Quantizer('int8', group=8, symmetric=False).fit(x)
    assert torch.equal(Fake(q)(x), q.fake(x)) and torch.equal(compiled(Fake(q))(x), q.fake(x))


@settings(max_examples=40)
@given(quantizers(dynamic=True), st.sampled_from([(3, 20), (2, 3, 70), (0, 4)]))
def test_shapes_are_known_on_the_meta_device(q, shape):
    x = torch.zeros(shape)
    for real, meta in zip(q.encode(x), q.encode(x.to('meta'))):
        assert real is meta or (real.shape, real.dtype) == (meta.shape, meta.dtype)
    with pytest.raises(ValueError, match='batch 3 .*meta device, without values'):
        q.fit(x.to('meta'), 'batch 3')


def test_a_meta_tensor_packs_unless_it_is_to_be_checked():
    assert pack_int4(torch.zeros(2, 5, dtype=torch.int8, device='meta'), check=False).shape == (2, 3)


def test_what_passes_through_is_cast_and_nothing_else():
    x = torch.tensor([1e6, -1e6, 1/3, torch.nan, torch.inf])
    for name, kind in (('fp16', torch.float16), ('bf16', torch.bfloat16)):
        for given_as in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            y = x.to(given_as)
            got = Quantizer(name).fake(y)
            torch.testing.assert_close(got, y.to(kind).to(given_as), rtol=0, atol=0, equal_nan=True)
            assert got.data_ptr() != y.data_ptr()


@pytest.mark.parametrize('dtype', CODED, ids=lambda d: d.value)
@pytest.mark.parametrize('axis, group', [(None, None), (1, None), (-1, 8)])
def test_a_scale_of_another_precision(dtype, axis, group):
    x = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = Quantizer(dtype, axis, group).fit(x.float())
    assert q.scale.dtype == torch.float32 and q.fake(x).dtype == torch.float64
    wide = replace(q, scale=q.scale.double())
    assert torch.equal(wide.encode(x.float()).codes.float(), q.encode(x.float()).codes.float())
    assert wide.fake(x.float()).dtype == torch.float32
    for half in (torch.float16, torch.bfloat16):
        stored = replace(q, scale=q.scale.to(half))
        assert torch.equal(stored.fake(x), replace(stored, scale=stored.scale.float()).fake(x))
        (codes, scale), = stored.paths(x.float())
        assert torch.equal(codes.to(scale.dtype)*scale, stored.fake(x.float()))
        assert scale_from_range(*value_range(x.to(half)), dtype)[0].dtype == torch.float32


def test_double_is_rounded_once_whatever_the_scale():
    tie = torch.tensor([1.0625 + 2**-40], dtype=torch.float64)
    assert encode(tie, torch.ones(1), 'e4m3').item() == 1.125
    nearly = torch.tensor([1.0625])  # exactly a tie, until it is divided by slightly less than one
    assert encode(nearly, torch.tensor([1 - 2**-40], dtype=torch.float64), 'e4m3').item() == 1.125


def test_axes_of_a_convolution():
    w = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    q = Quantizer('int8', axis=[1, 2, -1]).fit(w)
    assert q.axis == (1, 2, -1) and torch.equal(q.scale, w.abs().amax((1, 2, 3), keepdim=True)/127)
    assert torch.equal(q.fake(w).flatten(1), Quantizer('int8', axis=1).fit(w.flatten(1)).fake(w.flatten(1)))
    grouped = Quantizer('int8', axis=(1, 2, 3), group=2).fit(w)
    assert grouped.scale.shape == (4, 1, 1, 2)
    assert torch.equal(grouped.scale[..., 1:], w[..., 2:].abs().amax((1, 2, 3), keepdim=True)/127)


@pytest.mark.parametrize('axis', [2, -3, (0, 2), ()])
def test_an_axis_that_is_not_there_is_refused(axis):
    with pytest.raises(ValueError, match=r'axis=.* of shape \(2, 3\)'):
        Quantizer(axis=axis).fit(torch.ones(2, 3))


@pytest.mark.parametrize('group', [0, -1, True, 2.])
def test_a_group_that_is_no_number_of_columns_is_refused(group):
    x, scale = torch.ones(2, 4), torch.ones(2, 2)
    for use in (lambda: Quantizer(group=group), lambda: per_granule(lambda v: v.amax(-1), x, group=group),
                lambda: spread(scale, group, x), lambda: encode(x, scale, 'int8', group=group),
                lambda: decode(x, scale, group=group)):
        with pytest.raises(ValueError, match='expected a number of columns'):
            use()


def test_a_number_has_no_axis_and_no_columns():
    with pytest.raises(ValueError, match=r'axis=-1 .* shape \(\)'):
        Quantizer(axis=-1).fit(torch.tensor(1.))
    with pytest.raises(ValueError, match='no columns'):
        Quantizer(group=4).fit(torch.tensor(1.))


@pytest.mark.parametrize('group, fitted, used', [(64, 256, 128), (64, 64, 130), (1, 1, 3), (5, 5, 6)])
@pytest.mark.parametrize('axis', [None, -1])
def test_static_groups_fit_one_width(axis, group, fitted, used):
    q = Quantizer('int8', axis, group).fit(torch.ones(2, fitted))
    assert q.encode(torch.ones(2, fitted)).codes.shape == (2, fitted)
    for shape in ((2, used), ()):
        with pytest.raises(ValueError, match='another shape'):
            q.encode(torch.ones(shape))


def test_a_scale_on_another_device_is_refused_and_moves():
    q = Quantizer('int8', symmetric=False).fit(torch.ones(3))
    with pytest.raises(ValueError, match=r"scale on meta.*tensor is on cpu.*q\.to\('cpu'\)"):
        q.to('meta').encode(torch.ones(3))
    assert q.to('meta').zero.is_meta and q.to('meta').encode(torch.ones(3, device='meta')).codes.is_meta
    assert Quantizer('int8').to('meta').scale is None and not q.scale.is_meta


def test_codes_are_no_data():
    with pytest.raises(TypeError, match='float8.*are codes'):
        Quantizer().fit(torch.ones(3).to(torch.float8_e4m3fn))


@pytest.mark.parametrize('dtype', DType, ids=lambda d: d.value)
def test_no_gradient_flows(dtype):
    x = torch.randn(2, 8, requires_grad=True)
    learned = torch.ones((), requires_grad=True)
    for q in (Quantizer(dtype, dynamic=True), replace(Quantizer(dtype), scale=learned)):
        assert not q.fake(x).requires_grad and not q.encode(x).codes.requires_grad
        assert not any(t.requires_grad for path in q.paths(x) for t in path)
    assert not encode(x, learned, dtype).requires_grad


def test_two_quantizers_are_equal_only_if_they_are_one():
    "A cache that took two of one recipe for the same would mix up their scales"
    a, b = (Quantizer('int8').fit(torch.full((3,), size)) for size in (1., 2.))
    assert a != b and len({a, b}) == 2


def test_percentiles_count_values():
    x = torch.arange(1., 11.)
    for percent, high in ((99, 10), (90, 9), (85, 9), (81, 9), (80, 8), (1, 1)):
        assert value_range(x, percentile=percent)[1] == high
    for n, high in ((1000, 995), (1001, 996)):  # as many are cut off at either end
        cut = value_range(torch.arange(1., n + 1), symmetric=False, percentile=99)
        assert cut == (n + 1 - high, high)
    for dtype in (torch.float32, torch.float64):
        y = torch.randn(501, generator=torch.Generator().manual_seed(0)).to(dtype)
        low, high = value_range(y, symmetric=False, percentile=97.3)
        mirrored = value_range(-y, symmetric=False, percentile=97.3)
        assert (-high, -low) == mirrored


@pytest.mark.parametrize('symmetric', [True, False])
def test_a_percentile_of_mostly_zeros_is_no_range(symmetric):
    x = torch.zeros(2, 10_000)
    x[0, 5], x[1] = 3., torch.linspace(-1, 1, 10_000)
    high = value_range(x, -1, symmetric=symmetric, percentile=99)[1]
    assert high[0] == 3 and .97 < high[1] < .995
    q = Quantizer('int8', -1, symmetric=symmetric, clip='percentile', percentile=99, dynamic=True)
    assert (q.fake(x)[0, 5] - 3).abs() < .02


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('size', [1e-30, 1., 1e30])
def test_the_search_finds_the_best_of_its_ratios(size, symmetric):
    x = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))**3*size
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)

    def error(low, high):
        scale, zero = scale_from_range(low, high, 'int4', symmetric)
        return (decode(encode(x, scale, 'int4', zero), scale, zero).double() - x.double()).square().sum(1)

    errors = torch.stack([error(low*(1 - i/100), high*(1 - i/100)) for i in range(96)])
    found = error(*search_range(x, 'int4', 1, symmetric=symmetric))
    assert (found <= errors.amin(0)*(1 + 1e-5)).all() and (found < .99*errors[0]).all()
    with pytest.raises(ValueError, match='ratios is empty'):
        search_range(x, 'int4', ratios=[])


def test_the_search_holds_where_quantile_stops():
    "`torch.quantile` refuses more than 16 million elements; a weight of FLUX has 38 million"
    x = torch.zeros(2**24 + 1)
    x[:100] = 1.
    q = Quantizer('int8', clip='percentile', percentile=99.9999).fit(x)
    assert q.scale == torch.tensor(1/127)
