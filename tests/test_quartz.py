"""Laws of Quartz alone; those of all quantizers are in test_quantizers.py."""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantizer_cases import laws, tensors
from quantizer_cases import quantizers as all_quantizers
from segquant_nb.formats import Quantizer, per_granule, spread
from segquant_nb.quartz import Quartz, drop_bits, find_flags, pack_flags, restore_bits, unpack_flags

quantizers = partial(all_quantizers, [Quartz])


@st.composite
def codes(draw, side=40):
    shape = (*draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=4)), draw(st.integers(1, side)))
    most = draw(st.sampled_from([7, 8, 40, 127]))
    return torch.from_numpy(draw(hnp.arrays(np.int8, shape, elements=st.integers(-most, most))))


groups = st.sampled_from([1, 2, 7, 16, 32])


@laws
@given(codes(), groups)
def test_flags_are_those_of_the_or_of_all_magnitudes(q, group):
    flags = find_flags(q, group)
    for row, found in zip(q.reshape(-1, q.shape[-1]).tolist(), flags.reshape(-1, flags.shape[-1]).tolist()):
        for i, flag in enumerate(found):
            together = 0
            for c in row[i*group:(i + 1)*group]: together |= abs(c)
            assert flag == max(together.bit_length() - 3, 0)


def test_the_flag_of_every_code():
    every = torch.arange(-127, 128, dtype=torch.int8)
    assert find_flags(every, 1).tolist() == [max(abs(c).bit_length() - 3, 0) for c in every.tolist()]


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
@given(tensors(), quantizers())
def test_a_sign_turns_the_result_and_zero_stays_zero(x, q):
    q = q.fit(x)
    y = q.fake(x)
    assert torch.equal(q.fake(-x), -y) and ((y == 0) | (y.sign() == x.sign())).all()


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


@pytest.mark.parametrize('group', [None, 0, -1, True, 2.])
def test_a_group_that_is_no_number_of_columns_is_refused(group):
    with pytest.raises(ValueError, match='needs groups of 1 or more columns'):
        Quartz(group=group)


def test_eight_bits_come_first():
    "The codes before bits are dropped are an int8 quantizer's, but for -128"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    q = Quartz(group=1, rounded=True).fit(x)
    eight = Quantizer('int8').fit(x)
    assert torch.equal(q.scale, eight.scale)
    low = eight.encode(x).codes.abs() < 8
    assert torch.equal(q.fake(x)[low], eight.fake(x)[low])
    assert Quartz().fit(torch.ones(2)).encode(torch.tensor([-100.])).codes.item() == -7


def test_codes_and_flags_that_do_not_fit():
    q = Quartz(group=16, dynamic=True)
    encoded = q.encode(torch.randn(3, 64))
    packed = q.pack(encoded)
    for error, match, act in ((ValueError, '32 bytes of codes in a row: 50 columns take 25', lambda: q.unpack(packed, 50)),
                              (ValueError, '2 bytes of flags in a row: 9 flags take 4', lambda: unpack_flags(packed.flags, 9)),
                              (ValueError, '3 flags in a row: 64 codes in groups of 16 have 4', lambda: q.decode(encoded.codes, encoded.flags[:, :3], encoded.scale)),
                              (ValueError, '4 flags in a row', lambda: drop_bits(encoded.codes, encoded.flags, 32)), (TypeError, 'unpack', lambda: q.decode(*packed)),
                              (TypeError, 'int8 codes', lambda: find_flags(torch.randn(3, 64), 16)), (ValueError, "axis='int4'", lambda: Quartz('int4'))):
        with pytest.raises(error, match=match): act()
