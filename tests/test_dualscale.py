"""Laws of DualScale alone; those of all quantizers are in test_quantizers.py."""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizer_cases import INTS, laws, tensors
from quantizer_cases import quantizers as all_quantizers
from segquant_nb.dualscale import DualScale, polarity_steps
from segquant_nb.formats import DType, Quantizer, decode, encode

quantizers = partial(all_quantizers, [DualScale])


@laws
@given(tensors(dtype=np.float64, max_dims=1), quantizers(dtypes=INTS[:-1], axes=[None], groups=[None]))
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
@given(tensors(dtype=np.float64), quantizers(clips=['amax', 'percentile']), st.integers(-20, 20))
def test_the_size_of_one_side_is_nothing_to_the_other(x, q, power):
    y = torch.where(x < 0, x*2.**power, x)
    have, got = q.fit(x).fake(x), q.fit(y).fake(y)
    assert torch.equal(got[x >= 0], have[x >= 0])
    assert torch.equal(got[x < 0], have[x < 0]*2.**power)


@laws
@given(tensors(), quantizers())
def test_one_path_for_each_sign(x, q):
    q = q.fit(x)
    (over, up), (under, down) = q.paths(x)
    assert over.dtype == under.dtype == q.dtype.storage
    assert (over.float() >= 0).all() and (under.float() <= 0).all()
    both = over.to(up.dtype) + under.to(down.dtype)
    assert torch.equal(both, q.encode(x).codes.to(up.dtype))


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


def test_steps_of_a_recipe_that_is_none():
    x = torch.randn(4, 8)
    for error, match, args, more in ((ValueError, 'max', (x, 'int8'), dict(clip='max')), (ValueError, '200', (x, 'int8'), dict(clip='percentile', percentile=200)),
                                     (ValueError, 'bf16', (x, 'bf16'), {}), (TypeError, 'floating-point', (x.long(), 'int8'), {}), (ValueError, 'group=0', (x, 'int8', -1, 0), {})):
        with pytest.raises(error, match=match): polarity_steps(*args, **more)
