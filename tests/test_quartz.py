"""Laws that Quartz keeps, on cases that hypothesis makes up."""
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segquant_nb.formats import Quantizer, per_granule, spread
from segquant_nb.quartz import Quartz, drop_bits, find_flags, pack_flags, restore_bits, unpack_flags

laws = settings(derandomize=True, deadline=None, max_examples=100)


@st.composite
def tensors(draw, min_dims=1, max_dims=3, side=40, dtype=np.float32):
    "Values over many orders of magnitude, with zeros, repeats and both signs"
    shape = draw(hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=1, max_side=side//max_dims**2))
    shape = (*shape[:-1], draw(st.integers(1, side)))
    size = draw(st.sampled_from([1e-20, 1e-3, 1., 1e4, 1e20]))
    unit = st.one_of(st.floats(-1, 1, width=32, allow_subnormal=False),
                     st.floats(-.0625, .0625, width=16, allow_subnormal=False))
    return torch.from_numpy(draw(hnp.arrays(dtype, shape, elements=unit)))*size


@st.composite
def codes(draw, side=40):
    shape = (*draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=4)), draw(st.integers(1, side)))
    most = draw(st.sampled_from([7, 8, 40, 127]))
    return torch.from_numpy(draw(hnp.arrays(np.int8, shape, elements=st.integers(-most, most))))


groups = st.sampled_from([1, 2, 7, 16, 32])


@st.composite
def quantizers(draw, dynamic=None, rounded=None, clips=('amax', 'percentile', 'mse'), axes=(None, -1)):
    return Quartz(draw(st.sampled_from(axes)), draw(groups), draw(st.booleans()) if dynamic is None else dynamic,
                  draw(st.booleans()) if rounded is None else rounded, draw(st.sampled_from(clips)), percentile=90)


@laws
@given(codes(), groups)
def test_flags_are_those_of_the_or_of_all_magnitudes(q, group):
    flags = find_flags(q, group)
    for row, found in zip(q.reshape(-1, q.shape[-1]).tolist(), flags.reshape(-1, flags.shape[-1]).tolist()):
        for i, flag in enumerate(found):
            together = 0
            for c in row[i*group:(i + 1)*group]: together |= abs(c)
            assert flag == max(together.bit_length() - 3, 0)


@laws
@given(codes(), groups)
def test_bits_are_dropped_and_no_others(q, group):
    flags = find_flags(q, group)
    stored = drop_bits(q, flags, group)
    back = restore_bits(stored, flags, group)
    shift = spread(flags, group, q).tolist()
    expected = np.vectorize(lambda c, f: int(np.sign(c))*(abs(c) >> f << f), otypes=[int])(q.tolist(), shift)
    assert stored.abs().max() <= 7 and back.dtype == torch.int8 and back.tolist() == expected.tolist()
    assert torch.equal(find_flags(back, group), flags)  # so cutting twice is cutting once
    assert torch.equal(back.float().to(torch.float8_e4m3fn).float(), back.float())


@laws
@given(codes(), groups)
def test_small_groups_are_exact(q, group):
    flags = find_flags(q, group)
    back = restore_bits(drop_bits(q, flags, group), flags, group)
    small = spread(per_granule(lambda v: v.abs().amax(-1) < 8, q, -1, group), group, q)
    assert torch.equal(back[small], q[small]) and torch.equal(small, spread(flags, group, q) == 0)


@laws
@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, max_side=19), elements=st.integers(0, 7)))
def test_flags_pack_and_unpack(flags):
    flags = torch.from_numpy(flags)
    packed = pack_flags(flags)
    assert packed.dtype == torch.uint8 and packed.shape == (*flags.shape[:-1], -(-3*flags.shape[-1]//8))
    assert torch.equal(unpack_flags(packed, flags.shape[-1]), flags)
    row, number = flags.reshape(-1, flags.shape[-1])[0].tolist(), packed.reshape(-1, packed.shape[-1])[0].tolist()
    assert int.from_bytes(bytes(number), 'little') == sum(f << 3*i for i, f in enumerate(row))


@laws
@given(tensors(), quantizers())
def test_what_is_encoded_packs_and_unpacks(x, q):
    encoded = q.fit(x).encode(x)
    packed = q.pack(encoded)
    assert all(torch.equal(a, b) for a, b in zip(q.unpack(packed, x.shape[-1]), encoded))
    K = x.shape[-1]
    assert packed.codes.shape[-1] == -(-K//2) and packed.flags.shape[-1] == -(-3*-(-K//q.group)//8)


@laws
@given(tensors(), quantizers(clips=['amax']))
def test_no_value_moves_further_than_promised(x, q):
    q = q.fit(x)
    _, flags, scale = q.encode(x)
    error = (q.fake(x).double() - x.double()).abs()/scale.double()
    step = 2.**spread(flags, q.group, x).double()
    slack = 1e-4 + torch.finfo(torch.float32).tiny/scale.double()
    assert (error <= step - .5 + slack).all()
    if q.rounded:
        fits = x.double().abs()/scale.double() <= 7.5*step
        assert (error[fits] <= (step/2 + slack)[fits]).all()


@laws
@given(tensors(), quantizers(rounded=True))
def test_rounding_is_never_further_off_than_dropping_bits(x, q):
    q = q.fit(x)
    same = replace(q, rounded=False, dynamic=False, clip='amax', scale=q.find_scale(x))
    a, b = ((r.fake(x).double() - x.double()).abs() for r in (q, same))
    assert (a <= b + 1e-6*x.double().abs()).all()
    assert torch.equal(q.encode(x).flags, same.encode(x).flags)


@laws
@given(tensors(), quantizers(dynamic=False))
def test_rounding_twice_is_rounding_once(x, q):
    q = q.fit(x)
    once = q.fake(x)
    assert torch.equal(q.fake(once), once)


@laws
@given(tensors(), quantizers())
def test_a_sign_turns_the_result_and_zero_stays_zero(x, q):
    q = q.fit(x)
    y = q.fake(x)
    assert torch.equal(q.fake(-x), -y) and ((y == 0) | (y.sign() == x.sign())).all()


@laws
@given(tensors(dtype=np.float64), quantizers(), st.integers(-20, 20))
def test_a_power_of_two_changes_nothing_but_the_scale(x, q, power):
    factor = 2.**power
    assert torch.equal(q.fit(x*factor).fake(x*factor), q.fit(x).fake(x)*factor)


@laws
@given(tensors(), quantizers())
def test_paths_add_up_and_nothing_is_written_to(x, q):
    before, version = x.clone(), x._version
    q = q.fit(x)
    (restored, scale), = q.paths(x)
    assert restored.dtype == torch.int8 and torch.equal(restored*scale, q.fake(x))
    assert torch.equal(x, before) and x._version == version


@laws
@given(tensors(min_dims=2), quantizers(dynamic=False, axes=[None]), st.data())
def test_a_group_is_nothing_to_the_others(x, q, data):
    q = q.fit(x)
    column = data.draw(st.integers(0, x.shape[-1] - 1))
    y = x.clone()
    y[0, ..., column] = data.draw(st.sampled_from([0., 3., -1e30]))
    other = torch.ones_like(x, dtype=torch.bool)
    other[0, ..., column//q.group*q.group:(column//q.group + 1)*q.group] = False
    assert torch.equal(q.fake(y)[other], q.fake(x)[other])


@laws
@given(tensors(), quantizers(clips=['amax']))
def test_the_search_never_loses(x, q):
    def error(q): return per_granule(lambda v: v.sum(-1), (q.fit(x).fake(x).double() - x.double()).square(), q.axis)
    assert (error(replace(q, clip='mse')) <= error(q)*(1 + 1e-4)).all()


@pytest.mark.parametrize('rounded', [False, True])
@pytest.mark.parametrize('size', [1e-30, 1., 1e30])
def test_the_search_finds_the_best_of_its_ratios(rounded, size):
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))*size
    q = Quartz(-1, rounded=rounded).fit(x)

    def error(scale): return (replace(q, scale=scale).fake(x).double() - x.double()).square().sum(1)

    errors = torch.stack([error(q.scale*(1 - i/100)) for i in range(96)])
    found = error(replace(q, clip='mse').fit(x).scale)
    assert (found <= errors.amin(0)*(1 + 1e-4)).all() and found.sum() < .99*errors[0].sum()


@laws
@given(tensors(), quantizers(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_computes_in_float32(x, q, half):
    x = x.clamp(-6e4, 6e4).to(half)
    got = q.fit(x).fake(x)
    assert got.dtype == half and torch.equal(got, q.fit(x.float()).fake(x.float()).to(half))


@laws
@given(tensors(), quantizers(dynamic=False), st.data())
def test_accidents_are_refused_in_calibration_and_defined_in_encode(x, q, data):
    q = q.fit(x)
    bad = x.clone()
    where = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    bad[where] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    with pytest.raises(ValueError, match=r'layer 7 .*1 values that are not finite'):
        q.fit(bad, 'layer 7')
    code = q.paths(bad)[0][0][where]
    assert code == (0 if bad[where].isnan() else 112*bad[where].sign())


@laws
@given(tensors(), quantizers(dynamic=True), st.data())
def test_an_accident_does_not_spoil_a_dynamic_scale(x, q, data):
    bad, without = x.clone(), x.clone()
    where = tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)
    bad[where], without[where] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf])), 0
    assert torch.equal(q.find_scale(bad), q.find_scale(without))


def compiled(f, backend='eager'):
    torch._dynamo.reset()  # each recipe is a compilation of its own, and there is a limit
    return torch.compile(f, fullgraph=True, backend=backend)


@pytest.mark.parametrize('rounded', [False, True])
@pytest.mark.parametrize('clip', ['amax', 'percentile'])
def test_compiles_without_graph_breaks(rounded, clip):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for q in (Quartz(-1, 16, True, rounded, clip), Quartz(None, 16, False, rounded, clip).fit(x)):
        assert torch.equal(compiled(q.fake)(x), q.fake(x))
        packed = compiled(lambda x: q.pack(q.encode(x)))(x)
        assert all(torch.equal(a, b) for a, b in zip(packed, q.pack(q.encode(x))))


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_a_module_that_holds_the_scale_in_a_buffer_compiles(backend):
    class Product(torch.nn.Module):
        def __init__(self, q):
            super().__init__()
            self.names = [f.name for f in fields(q) if isinstance(getattr(q, f.name), torch.Tensor)]
            self.recipe = replace(q, **dict.fromkeys(self.names))
            for name in self.names: self.register_buffer(name, getattr(q, name))

        def forward(self, x):
            q = replace(self.recipe, **{name: getattr(self, name) for name in self.names})
            return sum(codes.float()*scale for codes, scale in q.paths(x))

    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for rounded in (False, True):
        q = Quartz(group=16, rounded=rounded).fit(x)
        module = Product(q)
        assert module.names == ['scale'] and torch.equal(compiled(module, backend)(x), q.fake(x))


@pytest.mark.parametrize('rounded', [False, True])
@pytest.mark.parametrize('shape', [(3, 20), (2, 3, 70), (0, 4)])
def test_shapes_are_known_on_the_meta_device(rounded, shape):
    x = torch.zeros(shape)
    for axis in (None, -1):
        q = Quartz(axis, 16, True, rounded)
        for real, meta in zip([*q.encode(x), *q.pack(q.encode(x))], [*q.encode(x.to('meta')), *q.pack(q.encode(x.to('meta')))]):
            assert (real.shape, real.dtype) == (meta.shape, meta.dtype)
        with pytest.raises(ValueError, match='batch 3 .*meta device, without values'):
            q.fit(x.to('meta'), 'batch 3')


def test_a_scale_of_another_precision():
    x = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rounded in (False, True):
        q = Quartz(-1, 16, rounded=rounded).fit(x.float())
        assert q.scale.dtype == torch.float32 and q.fake(x).dtype == torch.float64
        stored = replace(q, scale=q.scale.bfloat16())
        assert torch.equal(stored.fake(x), replace(q, scale=stored.scale.float()).fake(x))
        (codes, scale), = stored.paths(x.float())
        assert torch.equal(codes*scale, stored.fake(x.float()))


def test_a_grid_point_beyond_the_type_is_its_end():
    x = torch.tensor([65504., -65504.], dtype=torch.float16)
    for rounded, step in ((False, 40_000.), (True, 600.)):
        assert torch.equal(Quartz(rounded=rounded, scale=torch.tensor(step)).fake(x), x)


def test_no_gradient_flows():
    x, learned = torch.randn(2, 8, requires_grad=True), torch.ones((), requires_grad=True)
    for q in (Quartz(dynamic=True), Quartz(dynamic=True, rounded=True), replace(Quartz(rounded=True), scale=learned)):
        assert not q.fake(x).requires_grad and not any(t.requires_grad for path in q.paths(x) for t in path)


@pytest.mark.parametrize('group', [None, 0, -1, True, 2.])
def test_a_group_that_is_no_number_of_columns_is_refused(group):
    with pytest.raises(ValueError, match='needs groups of 1 or more columns'):
        Quartz(group=group)


def test_a_scale_on_another_device_is_refused_and_moves():
    q = Quartz().fit(torch.ones(3))
    with pytest.raises(ValueError, match=r"scale on meta.*tensor is on cpu.*q\.to\('cpu'\)"):
        q.to('meta').encode(torch.ones(3))
    assert q.to('meta').encode(torch.ones(3, device='meta')).flags.is_meta
    assert Quartz().to('meta').scale is None and not q.scale.is_meta


def test_eight_bits_come_first():
    "The codes before bits are dropped are an int8 quantizer's, but for -128"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    q = Quartz(group=1, rounded=True).fit(x)
    eight = Quantizer('int8').fit(x)
    assert torch.equal(q.scale, eight.scale)
    low = eight.encode(x).codes.abs() < 8
    assert torch.equal(q.fake(x)[low], eight.fake(x)[low])
    assert Quartz().fit(torch.ones(2)).encode(torch.tensor([-100.])).codes.item() == -7
