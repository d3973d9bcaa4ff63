"""Laws of formats and of the quantizer with one scale; those of all quantizers are in test_quantizers.py."""
from functools import partial
from shutil import which

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantizer_cases import CODED, FLOATS, INTS, compiled, laws, tensors
from quantizer_cases import quantizers as all_quantizers
from segquant_nb.formats import (DType, Quantizer, decode, encode, pack_int4, per_granule, scale_from_range,
                                 search_range, spread, unpack_int4, value_range)

quantizers = partial(all_quantizers, [Quantizer])


@laws
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


@laws
@given(tensors(min_dims=2, max_dims=2), quantizers(), st.randoms())
def test_a_permutation_of_rows_permutes_the_result(x, q, random):
    order = torch.tensor(random.sample(range(len(x)), len(x)))
    shuffled = x[order]
    if q.axis is None:  # the sum of squares that the search compares depends on the order of addition
        q = Quantizer(q.dtype, q.axis, q.group, q.symmetric, q.dynamic)
    assert torch.equal(q.fit(shuffled).fake(shuffled), q.fit(x).fake(x)[order])


@pytest.mark.parametrize('dtype', [d for d in INTS if d.bits <= 8], ids=lambda d: d.value)
@laws
@given(x=tensors(max_dims=1, side=30, dtype=np.float64), symmetric=st.booleans())
def test_encode_finds_the_nearest_code(dtype, x, symmetric):
    scale, zero = scale_from_range(x.min(), x.max(), dtype, symmetric)
    codes = encode(x, scale, dtype, zero)
    table = decode(torch.arange(dtype.lowest, dtype.highest + 1), scale, zero)
    nearest = (table - x[:, None]).abs().amin(1)
    error = (decode(codes, scale, zero) - x).abs()
    assert (error <= nearest + 1e-12*x.abs().max()).all()


@pytest.mark.parametrize('dtype', FLOATS, ids=lambda d: d.value)
@laws
@given(x=tensors(max_dims=1, side=30), power=st.integers(-30, 30))
def test_float8_agrees_with_the_cast_of_pytorch(dtype, x, power):
    scale = torch.tensor(2.**power)  # exact, so that only the rounding is compared
    want = (x/scale).clamp(dtype.lowest, dtype.highest).to(dtype.storage)
    for precision in (torch.float32, torch.float64):
        got = encode(x.to(precision), scale.to(precision), dtype)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


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


@laws
@given(hnp.arrays(np.int8, hnp.array_shapes(max_dims=3, max_side=9), elements=st.integers(-8, 7)))
def test_int4_packs_and_unpacks(codes):
    codes = torch.from_numpy(codes)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*codes.shape[:-1], (codes.shape[-1] + 1)//2)
    assert torch.equal(unpack_int4(packed, codes.shape[-1]), codes)


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


def test_codes_are_no_data():
    with pytest.raises(TypeError, match='float8.*are codes'):
        Quantizer().fit(torch.ones(3).to(torch.float8_e4m3fn))


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


@pytest.mark.parametrize('size', [1e-30, 1., 1e30])
def test_the_search_finds_the_best_of_its_ratios(size):
    x = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))**3*size
    low, high = value_range(x, 1)

    def error(low, high):
        scale, _ = scale_from_range(low, high, 'int4')
        return (decode(encode(x, scale, 'int4'), scale).double() - x.double()).square().sum(1)

    errors = torch.stack([error(low*(1 - i/100), high*(1 - i/100)) for i in range(96)])
    found = error(*search_range(x, 'int4', 1))
    assert (found <= errors.amin(0)*(1 + 1e-5)).all() and (found < .99*errors[0]).all()
    with pytest.raises(ValueError, match='ratios is empty'):
        search_range(x, 'int4', ratios=[])


@pytest.mark.parametrize('group', [None, 70])
@pytest.mark.parametrize('size', [1e-30, 1., 1e30])
def test_the_search_of_both_ends_is_as_good_as_all_pairs(size, group):
    g, ratios = torch.Generator().manual_seed(0), [1 - i/20 for i in range(20)]
    x = torch.stack([f(torch.randn(8, 200, generator=g)) for f in (
        torch.nn.functional.gelu, torch.exp, lambda v: v**3, lambda v: v + 2, lambda v: -(v + 2), lambda v: v - 5*(v < -2), lambda v: v + 5*(v > 2))])*size
    low, high = value_range(x, -1, group)

    def error(low, high):
        scale, zero = scale_from_range(low, high, 'int4', symmetric=False)
        squares = (decode(encode(x, scale, 'int4', zero, group), scale, zero, group).double() - x.double()).square()
        return per_granule(lambda v: v.sum(-1), squares, -1, group)

    pairs = torch.stack([error(low*a, high*b) for a in ratios for b in ratios]).amin(0)
    one_ratio = torch.stack([error(low*r, high*r) for r in ratios]).amin(0)
    found = error(*search_range(x, 'int4', -1, group, symmetric=False, ratios=ratios))
    assert (found <= one_ratio*(1 + 1e-5)).all() and (found < .95*one_ratio).any()
    assert ((found/pairs).mean((1, 2)) < 1.038).all()  # for each kind of values; without one of the three searches .039 to .077


@pytest.mark.parametrize('symmetric', [True, False])
def test_the_search_compiles(symmetric):
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    def search(x): return search_range(x, 'int8', -1, 8, symmetric, [1., .9, .7])
    assert all(map(torch.equal, compiled(search)(x), search(x)))


@pytest.mark.skipif(not which('g++'), reason='Inductor needs a C++ compiler')
@pytest.mark.parametrize('columns', [33, 100])
def test_inductor_spreads_a_last_group_that_is_shorter(columns):
    "It did not, once: it read beyond the end of the scales"
    g = torch.Generator().manual_seed(0)
    x, scale = torch.randn(3, columns, generator=g), torch.rand(3, -(-columns//16), generator=g) + .1
    def scaled(scale, x): return spread(scale, 16, x)*x
    assert torch.equal(compiled(scaled, 'inductor')(scale, x), scaled(scale, x))
    if columns == 100: return
    q = Quantizer('int8', -1, 16, dynamic=True)
    assert torch.equal(compiled(q.fake, 'inductor')(x), q.fake(x))


def test_the_search_holds_where_quantile_stops():
    "`torch.quantile` refuses more than 16 million elements; a weight of FLUX has 38 million"
    x = torch.zeros(2**24 + 1)
    x[:100] = 1.
    q = Quantizer('int8', clip='percentile', percentile=99.9999).fit(x)
    assert q.scale == torch.tensor(1/127)
