"""Rotations against explicit matrices, and those that must not be folded."""
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.graph import example_from_pipeline, read_trace, record
from segquant_nb.rotate import block_sizes, check_rotations, find_rotations, hadamard, random_signs, rotated_state
from segquant_nb.seglinear import Plan, rotate_columns
from segquant_nb.smooth import Fold, check_folds, find_folds, with_parameters
from segquant_nb.zoo import load, noise_model

warnings.filterwarnings('ignore')


def by_definition(size):
    "Products of signs, one for each digit of the row and the column, to the base 4 and once to the base 2"
    matrix = np.ones((size, size))
    for i in range(size):
        for j in range(size):
            a, b, left = i, j, size
            while left >= 4:
                if a % 4 == b % 4: matrix[i, j] *= -1
                a, b, left = a//4, b//4, left//4
            if left == 2 and a == b == 1: matrix[i, j] *= -1
    return torch.tensor(matrix/np.sqrt(size))


@pytest.mark.parametrize('size', [1, 2, 4, 8, 16, 32, 64, 128])
def test_the_matrix(size):
    want = by_definition(size)
    assert torch.allclose(hadamard(size), want, atol=1e-15) and torch.allclose(want @ want, torch.eye(size).double(), atol=1e-14)


@st.composite
def segments(draw):
    blocks = draw(st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=1, max_size=4))
    return [b*draw(st.integers(1, 5)) for b in blocks], blocks, draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(0, 10**6))


@settings(max_examples=80, deadline=None)
@given(segments())
def test_the_transform_is_the_matrix_and_undoes_itself(case):
    sizes, blocks, lead, seed = case
    x = torch.randn(*lead, sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before = x.clone()
    y = rotate_columns(x, sizes, blocks)
    whole = torch.block_diag(*[hadamard(b) for size, b in zip(sizes, blocks) for _ in range(size//b)])
    assert y.shape == x.shape and torch.equal(x, before) and torch.allclose(y, x @ whole, atol=1e-13)
    assert torch.allclose(rotate_columns(y, sizes, blocks), x, atol=1e-13)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, .1), (torch.float16, .01)):
        low = rotate_columns(x.to(dtype), sizes, blocks)
        assert low.dtype == dtype and (low.double() - y).abs().max().item() <= close*8 if low.numel() else True


@pytest.mark.parametrize('size', [4, 16, 64, 256])
def test_what_all_channels_have_in_common_stays(size):
    ones = torch.ones(1, size, dtype=torch.float64)
    assert torch.allclose(rotate_columns(ones, [size], [size]), ones, atol=1e-14)
    if size > 4: assert rotate_columns(ones, [size], [size//2]).abs().max() < 1.42


def test_blocks():
    plan = Plan([(96, Quantizer()), (64, DualScale('int4')), (7, Quantizer()), (1024, Quantizer())], [5])
    assert block_sizes(plan) == (32, 1, 1, 256) and block_sizes(plan, 16) == (16, 1, 1, 16)
    x = torch.randn(3, 1191)
    y = rotate_columns(x, plan.in_sizes, block_sizes(plan))
    assert torch.equal(y[:, 96:167], x[:, 96:167]) and not torch.equal(y[:, :96], x[:, :96])
    assert random_signs(64, 3).equal(random_signs(64, 3))
    for blocks in ((3,), (64,), (0,), (-4,)):
        with pytest.raises(ValueError, match='block'): rotate_columns(torch.zeros(2, 96), [96], blocks)


def test_it_can_be_compiled_and_exported():
    class Turn(nn.Module):
        def forward(self, x): return rotate_columns(x, [96, 128], [32, 64])
    x = torch.randn(5, 224)
    assert torch.equal(torch.compile(Turn(), fullgraph=True, backend='aot_eager')(x), Turn()(x))
    assert torch.equal(torch.export.export(Turn(), (x,)).module()(x), Turn()(x))


@pytest.fixture(scope='module')
def sdxl():
    pipe = load('tiny-sdxl')
    model, (args, kwargs) = noise_model(pipe), example_from_pipeline(pipe)
    trace = record(model, args, kwargs)
    found = read_trace(trace, model)
    return model, args, kwargs, found, check_folds(model, find_folds(model, found, trace), args, kwargs)


def test_only_sound_rotations_are_kept(sdxl):
    model, args, kwargs, found, folds = sdxl
    before = {n: p.clone() for n, p in model.state_dict().items()}
    sound = find_rotations(found, folds)
    assert set(sound.values()) == {8} and len(sound) == 16  # heads are 24 wide
    values = next(iter(sound))
    gated = next(f for f in folds if f.layers[0][0].endswith('ff.net.2'))
    normed = next(f for f in folds if f.layers[0][0].endswith('attn1.to_q'))
    two_heads = Fold(values.layers, values.size, values.into)
    some = dict(list(sound.items())[1:4])
    assert check_rotations(model, some | {gated: 16}, args, kwargs) == some
    assert check_rotations(model, {normed: 32}, args, kwargs) == {}
    assert check_rotations(model, {two_heads: 32}, args, kwargs) == {}  # 32 columns reach into the next head
    assert check_rotations(model, sound, args, kwargs) == sound
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_the_state_is_what_the_matrix_says(sdxl):
    model, args, kwargs, found, folds = sdxl
    fold, block = next(iter(find_rotations(found, folds).items()))
    state = rotated_state(model.double(), {fold: block})
    whole = torch.block_diag(*[hadamard(8)]*12)
    (reader, _), value = fold.layers[0], fold.into[0].parameter
    assert state.keys() == {value, f'{reader}.weight'}
    assert torch.allclose(state[value], whole @ model.get_parameter(value), atol=1e-14)
    assert torch.allclose(state[f'{reader}.weight'], model.get_submodule(reader).weight @ whole, atol=1e-14)
    assert with_parameters(model, state).conv_in.weight is model.conv_in.weight
    model.float()
