"""Laws that all quantizers keep: one scale, one for each sign, and QuaRTZ."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizer_cases import CODED, KINDS, compiled, found, laws, learned, quantizers, tensors
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.quartz import Quartz

RECIPES = [*(kind(dtype) for kind in (Quantizer, DualScale) for dtype in CODED), Quantizer('int8', symmetric=False),
           Quartz(group=16), Quartz(group=16, rounded=True)]
each_recipe = pytest.mark.parametrize('q', RECIPES, ids=repr)
grouped = [Quantizer, DualScale]  # the groups of QuaRTZ share a flag, and not a scale


def some(*shape, dtype=torch.float32): return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


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
@given(tensors(max_dims=1), quantizers(grouped, dynamic=False))
def test_order_is_kept(x, q):
    y = replace(q, axis=None, group=None).fit(x).fake(x[x.argsort()])
    assert (y[1:] >= y[:-1]).all()


@laws
@given(tensors(dtype='float64'), quantizers(), st.integers(-20, 20))
def test_a_power_of_two_changes_nothing_but_the_scale(x, q, power):
    factor = 2.**power
    assert torch.equal(q.fit(x*factor).fake(x*factor), q.fit(x).fake(x)*factor)


@laws
@given(tensors(), quantizers())
def test_paths_add_up_and_nothing_is_written_to(x, q):
    before, version, q = x.clone(), x._version, q.fit(x)
    held = {name: t.clone() for name, t in learned(q).items()}
    assert torch.equal(sum(codes.to(scale.dtype)*scale for codes, scale in q.paths(x)), q.fake(x))
    assert torch.equal(x, before) and x._version == version
    assert all(torch.equal(t, held[name]) for name, t in learned(q).items())


@laws
@given(tensors(min_dims=2), quantizers(grouped, dynamic=True, axes=[-1], groups=[1, 2, 5, 16, 64]))
def test_groups_are_the_same_as_separate_tensors(x, q):
    parts = torch.cat([replace(q, group=None).fake(part) for part in x.split(q.group, -1)], -1)
    assert torch.equal(q.fake(x), parts)


@laws
@given(tensors(), quantizers(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_computes_in_float32(x, q, half):
    x = x.clamp(-6e4, 6e4).to(half)
    most = torch.finfo(half).max
    got, want = q.fit(x).fake(x), q.fit(x.float()).fake(x.float()).clamp(-most, most).to(half)
    assert got.dtype == half and torch.equal(got, want)


@laws
@given(tensors(), quantizers(dynamic=False), st.data())
def test_accidents_are_refused_in_calibration_and_defined_in_encode(x, q, data):
    q, bad = q.fit(x), x.clone()
    where = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    bad[where] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    with pytest.raises(ValueError, match=r'layer 7 .*1 values that are not finite'):
        q.fit(bad, 'layer 7')
    value = q.decode(*q.encode(bad))[where]
    if bad[where].isnan():
        assert value.isnan() if getattr(q, 'dtype', None) in CODED[-2:] else value == 0
    else:
        assert value == q.decode(*q.encode(torch.full_like(x, 1e38).copysign(bad[where])))[where]
    others = torch.ones_like(x, dtype=torch.bool)
    together = q.group if isinstance(q, Quartz) else 1  # a flag is shared
    others[where[:-1]][where[-1]//together*together:(where[-1]//together + 1)*together] = False
    assert torch.equal(q.fake(bad)[others], q.fake(x)[others])


@laws
@given(tensors(), quantizers(dynamic=True), st.data())
def test_an_accident_does_not_spoil_a_dynamic_scale(x, q, data):
    bad, without = x.clone(), x.clone()
    where = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    bad[where], without[where] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf])), 0
    assert all(a is b or torch.equal(a, b) for a, b in zip(found(q, bad), found(q, without)))


@each_recipe
def test_compiles_without_graph_breaks(q):
    x = some(3, 20)
    for q in (replace(q, axis=-1, dynamic=True), replace(q, axis=-1, group=8, dynamic=True), q.fit(x)):
        assert torch.equal(compiled(q.fake)(x), q.fake(x))


@pytest.mark.parametrize('clip', ['amax', 'percentile'])
@pytest.mark.parametrize('q', [Quantizer(symmetric=False), DualScale(), Quartz()], ids=repr)
def test_ways_to_find_a_range_compile(q, clip):
    q = replace(q, axis=-1, group=8, dynamic=True, clip=clip, percentile=80)
    assert torch.equal(compiled(q.fake)(some(3, 20)), q.fake(some(3, 20)))


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
@pytest.mark.parametrize('q', [Quantizer('int8', group=8, symmetric=False), DualScale('int8', group=8), DualScale('e4m3'),
                               Quartz(group=16), Quartz(group=16, rounded=True)], ids=repr)
def test_a_module_that_holds_the_scales_in_buffers_compiles(q, backend):
    class Product(torch.nn.Module):
        def __init__(self, q):
            super().__init__()
            self.names = list(learned(q))
            self.recipe = replace(q, **dict.fromkeys(self.names))
            for name, t in learned(q).items(): self.register_buffer(name, t)

        def forward(self, x):
            q = replace(self.recipe, **{name: getattr(self, name) for name in self.names})
            return sum(codes.float()*scale for codes, scale in q.paths(x))

    x = some(3, 40)
    q = q.fit(x)
    assert torch.equal(Product(q)(x), q.fake(x)) and torch.equal(compiled(Product(q), backend)(x), q.fake(x))


@settings(laws, max_examples=60)
@given(quantizers(dynamic=True, clips=['amax', 'percentile']), st.sampled_from([(3, 20), (2, 3, 70), (0, 4)]))
def test_shapes_are_known_on_the_meta_device(q, shape):
    x = torch.zeros(shape)
    for real, meta in zip(q.encode(x), q.encode(x.to('meta'))):
        assert real is meta or (real.shape, real.dtype) == (meta.shape, meta.dtype)
    with pytest.raises(ValueError, match='batch 3 .*meta device, without values'):
        q.fit(x.to('meta'), 'batch 3')


@each_recipe
@pytest.mark.parametrize('axis, group', [(None, None), (-1, None), (-1, 8)])
def test_scales_of_another_precision(q, axis, group):
    x = some(6, 20, dtype=torch.float64)
    q = replace(q, axis=axis, group=group or getattr(q, 'group', None)).fit(x.float())
    scales = {name: t for name, t in learned(q).items() if t.is_floating_point()}
    assert {t.dtype for t in scales.values()} == {torch.float32} and q.fake(x).dtype == torch.float64
    wide = replace(q, **{name: t.double() for name, t in scales.items()})
    codes, others = (r.encode(x.float()).codes.float() for r in (q, wide))
    assert (codes != others).sum() <= 2  # a value right between two codes of int16
    assert wide.fake(x.float()).dtype == torch.float32
    for half in (torch.float16, torch.bfloat16):
        stored = replace(q, **{name: t.to(half) for name, t in scales.items()})
        want = replace(q, **{name: t.to(half).float() for name, t in scales.items()})
        assert torch.equal(stored.fake(x), want.fake(x))
        total = sum(codes.to(s.dtype)*s for codes, s in stored.paths(x.float()))
        assert torch.equal(total, stored.fake(x.float()))


@each_recipe
def test_a_grid_point_beyond_the_type_is_its_end(q):
    x = torch.tensor([65504., -65504.], dtype=torch.float16)
    step = 40_000. if isinstance(q, Quartz) and not q.rounded else 65504*.7
    fitted = {name: torch.tensor(step) for name in learned(q.fit(x)) if name != 'zero'}
    y = replace(q, **fitted, **({'zero': torch.tensor(0)} if 'zero' in learned(q.fit(x)) else {})).fake(x)
    assert y.isfinite().all() and y[0] == -y[1] and y[0] > 0
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        assert replace(q, dynamic=True).fake((torch.tensor([-1, 1, .3])*torch.finfo(kind).max).to(kind)).isfinite().all()


@each_recipe
def test_no_gradient_flows(q):
    x = torch.randn(2, 8, requires_grad=True)
    scales = {name: torch.ones((), requires_grad=True) for name in learned(q.fit(x.detach())) if name != 'zero'}
    for q in (replace(q, dynamic=True), replace(q, symmetric=True, **scales) if isinstance(q, Quantizer) else replace(q, **scales)):
        assert not q.fake(x).requires_grad and not q.encode(x).codes.requires_grad
        assert not any(t.requires_grad for path in q.paths(x) for t in path)


@pytest.mark.parametrize('axis, group, fitted, used', [
    (0, None, 64, 63), (None, 64, 256, 128), (-1, 64, 64, 130), (None, 1, 1, 3), (-1, 5, 5, 6)])
@pytest.mark.parametrize('kind', grouped)
def test_static_scales_fit_one_shape(kind, axis, group, fitted, used):
    q = kind('int8', axis, group).fit(torch.ones(2, fitted))
    assert q.encode(torch.ones(2, fitted)).codes.shape == (2, fitted)
    for shape in ((2, used), ()):
        with pytest.raises(ValueError, match=f'{kind.__name__}.* was fitted on another shape'): q.encode(torch.ones(shape))


@pytest.mark.parametrize('kind', KINDS)
def test_a_static_scale_per_token_fits_one_length(kind):
    q = kind(axis=-1).fit(torch.ones(77, 32))
    assert q.fake(torch.ones(77, 32)).shape == (77, 32)
    for shape in ((64, 32), (2, 64, 32), (78, 32)):
        with pytest.raises(ValueError, match=r'fitted on another shape: its scales are \(77, 1\).*Use dynamic=True'):
            q.encode(torch.ones(shape))


@each_recipe
def test_scales_on_another_device_are_refused_and_move(q):
    assert not learned(q.to('meta'))
    q = q.fit(torch.tensor([-1., 3.]))
    with pytest.raises(ValueError, match=r"scale on meta.*tensor is on cpu.*q\.to\('cpu'\)"):
        q.to('meta').encode(torch.ones(3))
    assert learned(q) and all(t.is_meta for t in learned(q.to('meta')).values())
    assert q.to('meta').encode(torch.ones(3, device='meta')).codes.is_meta
    assert not any(t.is_meta for t in learned(q).values())


@pytest.mark.parametrize('kind', KINDS)
def test_two_are_equal_only_if_they_are_one(kind):
    "A cache that took two of one recipe for the same would mix up their scales"
    a, b = (kind().fit(torch.full((3,), size)) for size in (1., 2.))
    assert a != b and len({a, b}) == 2
