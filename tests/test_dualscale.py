"""Laws that DualScale keeps, on cases that hypothesis makes up."""
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segquant_nb.dualscale import DualScale, polarity_steps
from segquant_nb.formats import DType, Quantizer, decode, encode

laws = settings(derandomize=True, deadline=None, max_examples=100)

INTS = [d for d in DType if d.is_int]
FLOATS = [DType.FP8E4M3, DType.FP8E5M2]
CODED = [*INTS, *FLOATS]


@st.composite
def tensors(draw, min_dims=1, max_dims=3, side=9, dtype=np.float32, lowest=-1.):
    "Values over many orders of magnitude, of both signs and of one, each with a size of its own"
    shape = draw(hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=1, max_side=side))
    above, below = (draw(st.sampled_from([1e-20, 1e-3, 1., 7., 1e4, 1e20])) for _ in range(2))
    low, high = draw(st.sampled_from([(lowest, 1.), (0., 1.), (lowest, 0.)]))
    unit = st.floats(low, high, width=32, allow_subnormal=False)
    x = torch.from_numpy(draw(hnp.arrays(dtype, shape, elements=unit)))
    return torch.where(x < 0, x*below, x*above)


@st.composite
def quantizers(draw, dynamic=None, dtypes=CODED, clips=('amax', 'percentile', 'mse'), axes=(None, -1),
               groups=(None, 1, 2, 5, 64)):
    return DualScale(draw(st.sampled_from(dtypes)), draw(st.sampled_from(axes)), draw(st.sampled_from(groups)),
                     draw(st.booleans()) if dynamic is None else dynamic, draw(st.sampled_from(clips)), percentile=90)


@laws
@given(tensors(dtype=np.float64, max_dims=1, side=40), quantizers(dtypes=INTS[:-1], axes=[None], groups=[None]))
def test_no_code_of_either_sign_is_nearer(x, q):
    q = q.fit(x)
    codes, positive, negative = q.encode(x)
    every = torch.arange(q.dtype.lowest, q.dtype.highest + 1, dtype=torch.float64)
    values = every*torch.where(every < 0, negative, positive)
    nearest = (values - x[:, None]).abs().amin(1)
    error = (q.decode(codes, positive, negative) - x).abs()
    assert (error <= nearest + 1e-12*x.abs()).all()


@laws
@given(tensors(), quantizers(clips=['amax'], dtypes=INTS))
def test_no_value_moves_further_than_half_a_step_of_its_side(x, q):
    codes, positive, negative = q.fit(x).encode(x)
    (_, above), (_, below) = q.fit(x).paths(x)
    error = (q.decode(codes, positive, negative).double() - x.double()).abs()
    bound = torch.where(x < 0, below.double(), above.double())/2*(1 + 1e-6)
    slack = 4*torch.finfo(torch.float32).eps*x.double().abs() + torch.finfo(torch.float32).tiny
    assert (error <= bound + slack).all()


@laws
@given(tensors(), quantizers(dynamic=False))
def test_rounding_twice_is_rounding_once(x, q):
    q = q.fit(x)
    once = q.fake(x)
    assert torch.equal(q.fake(once), once)


@laws
@given(tensors(), quantizers())
def test_signs_stay_and_zero_stays_zero(x, q):
    y = q.fit(x).fake(x)
    assert ((y == 0) | (y.sign() == x.sign())).all() and (y[x == 0] == 0).all()


@laws
@given(tensors(max_dims=1, side=40), quantizers(dynamic=False))
def test_order_is_kept(x, q):
    q = replace(q, axis=None, group=None).fit(x)
    y = q.fake(x[x.argsort()])
    assert (y[1:] >= y[:-1]).all()


@laws
@given(tensors(dtype=np.float64), quantizers(), st.integers(-20, 20))
def test_a_power_of_two_changes_nothing_but_the_scales(x, q, power):
    factor = 2.**power
    assert torch.equal(q.fit(x*factor).fake(x*factor), q.fit(x).fake(x)*factor)


@laws
@given(tensors(dtype=np.float64), quantizers(clips=['amax', 'percentile']), st.integers(-20, 20))
def test_the_size_of_one_side_is_nothing_to_the_other(x, q, power):
    y = torch.where(x < 0, x*2.**power, x)
    have, got = q.fit(x).fake(x), q.fit(y).fake(y)
    assert torch.equal(got[x >= 0], have[x >= 0])
    assert torch.equal(got[x < 0], have[x < 0]*2.**power)


@laws
@given(tensors(), quantizers())
def test_paths_add_up_and_nothing_is_written_to(x, q):
    before, version = x.clone(), x._version
    q = q.fit(x)
    (over, up), (under, down) = q.paths(x)
    assert over.dtype == under.dtype == q.dtype.storage
    assert (over.float() >= 0).all() and (under.float() <= 0).all()
    assert torch.equal(over.to(up.dtype)*up + under.to(down.dtype)*down, q.fake(x))
    assert torch.equal(x, before) and x._version == version


@laws
@given(tensors(min_dims=2), quantizers(dynamic=True, axes=[-1], groups=[1, 2, 5, 64]))
def test_groups_are_the_same_as_separate_tensors(x, q):
    parts = torch.cat([replace(q, group=None).fake(part) for part in x.split(q.group, -1)], -1)
    assert torch.equal(q.fake(x), parts)


@laws
@given(tensors(lowest=0.), quantizers(dynamic=False))
def test_without_a_negative_value_it_is_an_ordinary_quantizer(x, q):
    "… as long as the percentile of one counts the zeros, and that of the other does not"
    q = replace(q, clip='amax' if q.clip == 'percentile' else q.clip).fit(x)
    one = Quantizer(q.dtype, q.axis, q.group, clip=q.clip).fit(x)
    assert torch.equal(q.positive, q.negative) and torch.equal(q.fake(x), one.fake(x))
    assert torch.equal(q.fake(-x), one.fake(-x))


@laws
@given(tensors(), quantizers(dynamic=False))
def test_an_empty_side_takes_the_step_of_the_other(x, q):
    x = -x.abs()
    q = q.fit(x)
    assert torch.equal(q.positive, q.negative)


@laws
@given(tensors(), quantizers(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_computes_in_float32(x, q, half):
    x = x.clamp(-6e4, 6e4).to(half)
    most = torch.finfo(half).max
    got = q.fit(x).fake(x)
    want = q.fit(x.float()).fake(x.float()).clamp(-most, most).to(half)
    assert got.dtype == half and torch.equal(got, want)


@laws
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
        assert value == q.decode(*q.encode(torch.full_like(x, 1e38).copysign(bad[where])))[where]
    good = torch.ones_like(x, dtype=torch.bool)
    good[where] = False
    assert torch.equal(q.fake(bad)[good], q.fake(x)[good])


@laws
@given(tensors(), quantizers(dynamic=True), st.data())
def test_an_accident_does_not_spoil_a_dynamic_scale(x, q, data):
    bad, without = x.clone(), x.clone()
    where = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    bad[where], without[where] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf])), 0
    assert all(torch.equal(a, b) for a, b in zip(q.find_scale(bad), q.find_scale(without)))


@pytest.mark.parametrize('percent, above, below', [(100, 10, 4), (99, 10, 4), (90, 9, 4), (85, 9, 4), (80, 8, 4),
                                                   (75, 8, 3), (74, 8, 3), (50, 5, 2), (1, 1, 1), (1e-12, 1, 1)])
def test_a_percentile_counts_the_values_of_one_sign(percent, above, below):
    x = torch.cat([torch.arange(1., 11.), -torch.arange(1., 5.), torch.zeros(100)])[torch.randperm(114)]
    positive, negative = polarity_steps(x, 'int8', clip='percentile', percentile=percent)
    assert positive == torch.tensor(float(above))/127 and negative == torch.tensor(float(below))/128


@pytest.mark.parametrize('dtype', [DType.INT4, DType.INT8, DType.FP8E4M3], ids=lambda d: d.value)
@pytest.mark.parametrize('size', [1e-30, 1., 1e30])
def test_the_search_finds_the_best_step_for_each_side(dtype, size):
    x = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))**3*size
    x = torch.where(x < 0, x/20, x)
    full = polarity_steps(x, dtype, 1)
    for side, start, found in zip((x.clamp(min=0), x.clamp(max=0)), full, polarity_steps(x, dtype, 1, clip='mse')):
        def error(step):
            return (decode(encode(side, step, dtype), step).double() - side.double()).square().sum(1)
        errors = torch.stack([error(start*(1 - i/100)) for i in range(96)])
        assert (error(found) <= errors.amin(0)*1.001).all() and (found <= start*(1 + 1e-6)).all()
        if dtype is DType.INT4: assert (error(found) < .99*errors[0]).all()


def compiled(f):
    torch._dynamo.reset()  # each recipe is a compilation of its own, and there is a limit
    return torch.compile(f, fullgraph=True, backend='eager')


@pytest.mark.parametrize('dtype', CODED, ids=lambda d: d.value)
def test_compiles_without_graph_breaks(dtype):
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    for q in (DualScale(dtype, -1, dynamic=True), DualScale(dtype, -1, 8, dynamic=True), DualScale(dtype).fit(x)):
        assert torch.equal(compiled(q.fake)(x), q.fake(x))


@pytest.mark.parametrize('clip', ['amax', 'percentile'])
def test_ways_to_find_steps_compile(clip):
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    q = DualScale('int8', -1, dynamic=True, clip=clip, percentile=80)
    assert torch.equal(compiled(q.fake)(x), q.fake(x))


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_a_module_that_holds_the_scales_in_buffers_compiles(backend):
    class Product(torch.nn.Module):
        def __init__(self, q):
            super().__init__()
            self.names = [f.name for f in fields(q) if isinstance(getattr(q, f.name), torch.Tensor)]
            self.recipe = replace(q, **dict.fromkeys(self.names))
            for name in self.names: self.register_buffer(name, getattr(q, name))

        def forward(self, x):
            q = replace(self.recipe, **{name: getattr(self, name) for name in self.names})
            return sum(codes.float()*scale for codes, scale in q.paths(x))

    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    for q in (DualScale('int8', group=8).fit(x), DualScale('e4m3').fit(x)):
        module = Product(q)
        assert module.names == ['positive', 'negative']
        got = torch.compile(module, fullgraph=True, backend=backend)(x)
        assert torch.equal(got, q.fake(x))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(quantizers(dynamic=True, clips=['amax', 'percentile']), st.sampled_from([(3, 20), (2, 3, 70), (0, 4)]))
def test_shapes_are_known_on_the_meta_device(q, shape):
    x = torch.zeros(shape)
    for real, meta in zip(q.encode(x), q.encode(x.to('meta'))):
        assert (real.shape, real.dtype) == (meta.shape, meta.dtype)
    with pytest.raises(ValueError, match='batch 3 .*meta device, without values'):
        q.fit(x.to('meta'), 'batch 3')


def test_scales_of_another_precision():
    x = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype in CODED:
        q = DualScale(dtype, -1, 8).fit(x.float())
        assert q.positive.dtype == torch.float32 and q.fake(x).dtype == torch.float64
        stored = replace(q, positive=q.positive.bfloat16(), negative=q.negative.bfloat16())
        want = replace(q, positive=stored.positive.float(), negative=stored.negative.float())
        assert torch.equal(stored.fake(x.float()), want.fake(x.float()))
        total = sum(codes.to(s.dtype)*s for codes, s in stored.paths(x.float()))
        assert torch.equal(total, stored.fake(x.float()))


def test_a_grid_point_beyond_the_type_is_its_end():
    x = torch.tensor([65504., -65504.], dtype=torch.float16)
    for dtype in CODED:
        step = torch.tensor(65504*.7)
        y = replace(DualScale(dtype), positive=step, negative=step).fake(x)
        assert y.isfinite().all() and y[0] == -y[1]
        for kind in (torch.float16, torch.bfloat16, torch.float32):
            assert DualScale(dtype, dynamic=True).fake(torch.tensor([-1, 1, .3])*torch.finfo(kind).max).isfinite().all()


def test_no_gradient_flows():
    x, learned = torch.randn(2, 8, requires_grad=True), torch.ones((), requires_grad=True)
    for q in (DualScale(dynamic=True), replace(DualScale(), positive=learned, negative=learned)):
        assert not q.fake(x).requires_grad and not any(t.requires_grad for path in q.paths(x) for t in path)


@pytest.mark.parametrize('group, fitted, used', [(None, 64, 63), (64, 256, 128), (64, 64, 130), (5, 5, 6)])
def test_static_scales_fit_one_shape(group, fitted, used):
    q = DualScale('int8', 0 if group is None else None, group).fit(torch.ones(2, fitted))
    assert q.encode(torch.ones(2, fitted)).codes.shape == (2, fitted)
    for shape in ((2, used), ()):
        with pytest.raises(ValueError, match=r'DualScale.* was fitted on another shape'):
            q.encode(torch.ones(shape))


def test_scales_on_another_device_are_refused_and_move():
    q = DualScale().fit(torch.tensor([-1., 3.]))
    with pytest.raises(ValueError, match=r"scale on meta.*tensor is on cpu.*q\.to\('cpu'\)"):
        q.to('meta').encode(torch.ones(3))
    assert q.to('meta').negative.is_meta and q.to('meta').encode(torch.ones(3, device='meta')).codes.is_meta
    assert DualScale().to('meta').positive is None and not q.positive.is_meta


def test_two_are_equal_only_if_they_are_one():
    a, b = (DualScale().fit(torch.full((3,), size)) for size in (1., 2.))
    assert a != b and len({a, b}) == 2
