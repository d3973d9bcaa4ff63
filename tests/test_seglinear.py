"""SegLinear against arithmetic written down another way, over layers found by search."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from segquant_nb.formats import Quantizer
from segquant_nb.seglinear import EncodedWeight, Plan, SegLinear, granules, quantize_weight

CODES = {'int8': (-128, 127), 'int6': (-32, 31), 'int4': (-8, 7)}


def cut(draw, total):
    places = sorted(draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=3)))
    edges = [0, *[p for p in places if p < total], total]
    return [b - a for a, b in zip(edges, edges[1:])]


@st.composite
def layers(draw):
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 17))
    recipes = [Quantizer('int8'), Quantizer('int8', symmetric=False), Quantizer('int4', axis=-1, dynamic=True),
               Quantizer('int6', axis=-1, dynamic=True, group=3), Quantizer('fp8e4m3', dynamic=True), Quantizer('fp16')]
    inputs = [(size, draw(st.sampled_from(recipes))) for size in cut(draw, k)]
    weight = Quantizer(draw(st.sampled_from(['int8', 'int4', 'int6', 'fp8e4m3'])), axis=draw(st.sampled_from([None, 1])),
                       group=draw(st.sampled_from([None, 1, 4])))
    if weight.dtype.is_int and draw(st.booleans()):
        weight = Quantizer(weight.dtype, axis=weight.axis, group=weight.group, symmetric=False)
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layer = nn.Linear(k, n, bias=draw(st.booleans()))
    smooth = torch.rand(k) + .5 if draw(st.booleans()) else None
    low_rank = (torch.randn(2, k), torch.randn(n, 2)) if draw(st.booleans()) else None
    return SegLinear.of(layer, Plan(inputs, cut(draw, n), weight), torch.randn(20, k), smooth, low_rank), torch.randn(5, k)


@settings(max_examples=150, deadline=None)
@given(layers())
def test_codes_and_values_agree_to_the_last_bit(case):
    layer, x = case
    by_values, by_codes = layer(x.double()), layer.integer(x.double())
    scale = by_codes.abs().max().clamp(min=1e-30)
    assert ((by_values - by_codes).abs() <= 1e-13*scale).all()
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        a, b = layer(x.to(dtype)).double(), layer.integer(x.to(dtype)).double()
        assert ((a - b).abs() <= close*b.abs().max().clamp(min=1e-30)).all()


def qdq(x, scale, zero, low, high):
    "QuantizeLinear and DequantizeLinear as ONNX defines them, in NumPy"
    q = np.clip(np.rint(x/scale) + zero, low, high)
    return (q - zero)*scale


@pytest.mark.parametrize('dtype', ['int8', 'int6', 'int4'])
@pytest.mark.parametrize('symmetric', [True, False])
def test_one_path_is_quantize_dequantize(dtype, symmetric):
    torch.manual_seed(0)
    layer, rows, x = nn.Linear(33, 21), torch.randn(99, 33), torch.randn(7, 33)
    q = SegLinear.of(layer, Plan([(33, Quantizer(dtype, symmetric=symmetric))], [21], Quantizer(dtype, axis=1)), rows)
    (low, high), r, w = CODES[dtype], rows.numpy(), layer.weight.detach().numpy()
    if symmetric: scale, zero = np.float32(np.abs(r).max())/np.float32(high), 0
    else:
        scale = r.max()/np.float32(high - low) - r.min()/np.float32(high - low)
        zero = np.clip(low - np.rint(r.min()/scale), low, high)
    ws = np.abs(w).max(1, keepdims=True)/np.float32(high)
    want = qdq(x.numpy(), scale, zero, low, high).astype(np.float64) @ qdq(w, ws, 0, low, high).astype(np.float64).T
    want = want + layer.bias.detach().numpy()
    np.testing.assert_allclose(q.integer(x.double()).numpy(), want, rtol=0, atol=2e-6*np.abs(want).max())


def test_an_output_segment_is_only_a_scale_per_row():
    "Segments of the output give the codes that separate layers would have"
    torch.manual_seed(0)
    layer = nn.Linear(16, 12)
    layer.weight.data[4:] *= 9
    whole = quantize_weight(layer.weight, Plan([(16, Quantizer())], [4, 8], Quantizer('int8')))
    for rows in (slice(0, 4), slice(4, 12)):
        part = quantize_weight(layer.weight[rows], Plan([(16, Quantizer())], [rows.stop - rows.start], Quantizer('int8')))
        assert torch.equal(whole.codes[rows], part.codes) and torch.equal(whole.scale[rows], part.scale)
    assert len(whole.scale.unique()) == 2


def test_granules_start_anew_in_each_segment():
    plan = Plan([(7, Quantizer()), (3, Quantizer()), (8, Quantizer())], [1], Quantizer('int4', axis=1, group=4))
    assert granules(plan) == (0, 4, 7, 10, 14, 18)


def test_the_callers_tensors_stay_as_they_are():
    torch.manual_seed(0)
    layer, rows, smooth = nn.Linear(8, 4), torch.randn(9, 8), torch.rand(8) + .5
    low = torch.randn(1, 8), torch.randn(4, 1)
    kept = [t.clone() for t in (layer.weight, layer.bias, rows, smooth, *low)]
    q = SegLinear.of(layer, Plan([(8, Quantizer())], [4]), rows, smooth, low)
    x = torch.randn(2, 8)
    before = x.clone()
    q(x), q.integer(x)
    for t in q.buffers(): t.zero_()
    for now, then in zip((layer.weight, layer.bias, rows, smooth, *low, x), (*kept, before)): assert torch.equal(now, then)


def test_scales_survive_half_and_meta():
    torch.manual_seed(0)
    plan = Plan([(8, Quantizer('fp8e4m3'))], [4], Quantizer('fp8e4m3', axis=1))
    q = SegLinear.of(nn.Linear(8, 4), plan, torch.randn(9, 8))
    x, codes = torch.randn(3, 8), q.weight_codes().float()
    half = q.half()
    assert half.codes.dtype == torch.uint8 and torch.equal(half.weight_codes().float(), codes)
    assert half.weight_scale.dtype == half.input0_scale.dtype == torch.float32
    assert half(x.half()).dtype == torch.float16
    meta = half.to('meta')
    assert meta(x.to('meta')).shape == (3, 4) and meta.weight_scale.dtype == torch.float32


def test_weights_in_16_bits():
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    q = SegLinear.of(layer, Plan([(8, Quantizer('int8', axis=-1, dynamic=True))], [4], Quantizer('bf16', axis=1)))
    assert q.codes.dtype == torch.bfloat16 and torch.equal(q.decoded_weight(), layer.weight.bfloat16().float())
    torch.testing.assert_close(q(x), q.integer(x), atol=1e-5, rtol=0)


def test_codes_of_ones_own():
    "A solver such as GPTQ brings its own codes"
    plan = Plan([(3, Quantizer('fp16'))], [2])
    weight = EncodedWeight(torch.tensor([[1, -2, 3], [0, 5, -6]], dtype=torch.int8), torch.tensor([[.5], [2.]]), None, (0, 3))
    y = SegLinear(plan, weight, bias=torch.tensor([1., 0.]))(torch.tensor([[1., 1., 1.]]))
    assert y.tolist() == [[2., -2.]]
    with pytest.raises(ValueError, match='input segments and columns do not match: the plan has 4 = 4, the weight 3'):
        SegLinear(Plan([(4, Quantizer('fp16'))], [2]), weight)


def test_wrong_use_of_formats_is_named():
    with pytest.raises(ValueError, match='recipe of a weight'): Plan([(4, Quantizer())], [2], Quantizer(axis=0))
    with pytest.raises(ValueError, match="'three'"): Plan([('three', Quantizer())], [2])
    with pytest.raises(ValueError, match='at least one'): Plan([], [2])


def test_with_many_bits_it_is_the_layer_itself():
    "Smoothing and the low-rank branch move things from one side to the other, and lose nothing"
    torch.manual_seed(0)
    layer, rows = nn.Linear(24, 10), torch.randn(200, 24)
    smooth, low = torch.logspace(-1, 1, 24), (torch.randn(3, 24)/9, torch.randn(10, 3))
    plan = Plan([(20, Quantizer('int16')), (4, Quantizer('int16'))], [3, 7], Quantizer('int16', axis=1, group=5))
    for extras in ({}, {'smooth': smooth}, {'low_rank': low}, {'smooth': smooth, 'low_rank': low}):
        y = SegLinear.of(layer, plan, rows, **extras)(rows)
        error = (y - layer(rows)).abs().max()/layer(rows).std()
        assert error < .01, (error, [*extras])
