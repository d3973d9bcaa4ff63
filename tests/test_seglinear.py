"""SegLinear against arithmetic written down another way, over layers found by search; wrong use; what modules have to bear."""
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from quantizer_cases import pieces
from torch import nn

from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.observe import stats_of
from segquant_nb.quartz import Quartz
from segquant_nb.seglinear import EncodedWeight, Plan, SegLinear, fit_inputs, granules, quantize_weight, rotate_columns, rotated

CODES = {'int8': (-128, 127), 'int6': (-32, 31), 'int4': (-8, 7)}


@st.composite
def layers(draw):
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 17))
    recipes = [Quantizer('int8'), Quantizer('int8', symmetric=False), Quantizer('int4', axis=-1, dynamic=True),
               Quantizer('int6', axis=-1, dynamic=True, group=3), Quantizer('fp8e4m3', dynamic=True), Quantizer('fp16')]
    inputs = [(size, draw(st.sampled_from(recipes))) for size in pieces(draw, k, 3)]
    weight = Quantizer(draw(st.sampled_from(['int8', 'int4', 'int6', 'fp8e4m3', 'bf16'])), axis=draw(st.sampled_from([None, 1])),
                       group=draw(st.sampled_from([None, 1, 4])))
    if weight.dtype.is_int and draw(st.booleans()):
        weight = Quantizer(weight.dtype, axis=weight.axis, group=weight.group, symmetric=False)
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layer = nn.Linear(k, n, bias=draw(st.booleans()))
    smooth = torch.rand(k) + .5 if draw(st.booleans()) else None
    low_rank = (torch.randn(2, k), torch.randn(n, 2)) if draw(st.booleans()) else None
    blocks = [draw(st.sampled_from([1, size & -size])) for size, _ in inputs]
    return SegLinear.of(layer, Plan(inputs, pieces(draw, n, 3), weight, blocks), torch.randn(20, k), smooth, low_rank), torch.randn(5, k)


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


def test_wrong_plans():
    Q = Quantizer()
    for match, args in (('recipe of a weight', ([(4, Q)], [2], Quantizer(axis=0))), ('recipe of a weight', ([(4, Q)], [2], 'int8')),
                        ('recipe of a weight', ([(4, Q)], [2], DualScale())), ("'three'", ([('three', Q)], [2])), ('size True', ([(True, Q)], [2])),
                        ('size 0', ([(4, Q)], [2, 0])), ('at least one', ([], [2])), ('at least one', ([(4, Q)], [])), ("and a quantizer, such as", ([(4, 'int8')], [2])),
                        ('input segment 4', ([4], [2])), ('input segment 4', ((4, Q), [2])), ('blocks of 3', ([(9, Q)], [2], Q, [3])),
                        ('blocks of 8', ([(12, Q)], [2], Q, [8])), ('blocks of 0', ([(12, Q)], [2], Q, [0])), ('one for each', ([(12, Q)], [2], Q, [4, 4]))):
        with pytest.raises(ValueError, match=match): Plan(*args)
    for name, args in (('inputs', (4, [2])), ('outputs', ([(4, Q)], 2)), ('outputs', ([(4, Q)], '2')), ('blocks', ([(4, Q)], [2], Q, 4))):
        with pytest.raises(TypeError, match=f'{name}=.*expected a list'): Plan(*args)
    assert Plan([[4, Q]], [2], Q, [1]).blocks == () and Plan([[4, Q]], [2], Q, [1]).inputs == ((4, Q),)


def test_wrong_parts_are_named_before_anything_is_made():
    torch.manual_seed(0)
    layer, rows, plan = nn.Linear(10, 6), torch.randn(50, 10), Plan([(7, Quantizer()), (3, Quantizer())], [4, 2])
    down, up = torch.randn(2, 10), torch.randn(6, 2)
    for error, match, args in (
            (ValueError, r'factors of shape \(9,\): expected \(10,\)', (layer, plan, rows, torch.ones(9))), (ValueError, 'zero, NaN', (layer, plan, rows, torch.zeros(10))),
            (ValueError, 'zero, NaN', (layer, plan, rows, torch.full((10,), torch.nan))), (ValueError, 'branch, down', (layer, plan, rows, None, (up, down))),
            (ValueError, 'branch, up', (layer, plan, rows, None, (down, up.T))), (ValueError, r'expected \(rows, 10\)', (layer, plan, rows[:, :9], torch.ones(10))),
            (ValueError, r'expected \(rows, 10\)', (layer, plan, rows.view(5, 10, 10))), (ValueError, r'expected \(rows, 10\)', (layer, plan, rows[:0])),
            (TypeError, 'Conv2d', (nn.Conv2d(10, 6, 1), plan, rows)), (ValueError, 'meta', (nn.Linear(10, 6, device='meta'), plan, rows)),
            (ValueError, r'output segments and rows .* 7, of shape \(7, 10\)\.$', (nn.Linear(10, 7), plan, rows)),
            (TypeError, 'expected a Plan', (layer, Quantizer(), rows)), (TypeError, 'low_rank is a Tensor', (layer, plan, rows, None, down)),
            (TypeError, 'rows of type dict', (layer, plan, {'layer': rows})), (TypeError, 'rows of type list', (layer, plan, [rows])),
            (ValueError, 'fixed scale for each token', (layer, Plan([(10, Quantizer(axis=-1))], [6]), stats_of(rows))),
            (TypeError, 'floating-point', (layer, plan, rows.long()))):
        with pytest.raises(error, match=match): SegLinear.of(*args)
    codes, scale, _, bounds = quantize_weight(layer.weight, plan)
    ready = fit_inputs(plan, rows)
    for match, weight, extra in (('granules at', EncodedWeight(codes, scale, None, (0, 5, 10)), {}), ('codes of type torch.int16', EncodedWeight(codes.short(), scale, None, bounds), {}),
                                 ('scales of shape', EncodedWeight(codes, scale[:, :1], None, bounds), {}), ('zero points of shape', EncodedWeight(codes, scale, scale[:1], bounds), {}),
                                 ('a bias of shape', EncodedWeight(codes, scale, None, bounds), dict(bias=torch.ones(5)))):
        with pytest.raises(ValueError, match=match): SegLinear(ready, weight, **extra)
    with pytest.raises(TypeError, match='expected what quantize_weight returns'): SegLinear(plan, layer.weight)
    q = SegLinear.of(layer, plan, rows)
    with pytest.raises(ValueError, match=r"layer is on cpu: use layer.to\('meta'\)"): q(torch.ones(2, 10, device='meta'))
    with pytest.raises(ValueError, match='input segment 1 has learned: .* input1_'):
        SegLinear.restore(plan, {k: t for k, t in q.state_dict().items() if k != 'input1_scale'})
    for x in (torch.ones(2, 10, dtype=torch.int64), torch.ones(2, 9), torch.tensor(1.)):
        with pytest.raises(ValueError, match='this layer reads 10 channels'): q(x)


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


def everything(bias=True, smooth=True, low=True, symmetric=False, blocks=(8, 1)):
    g = torch.Generator().manual_seed(0)
    layer = nn.utils.skip_init(nn.Linear, 11, 6, bias=bias)
    for p in layer.parameters(): p.data.copy_(torch.randn(p.shape, generator=g))
    plan = Plan([(8, Quantizer('int8')), (3, DualScale('int8'))], [4, 2], Quantizer('int4', axis=1, group=3, symmetric=symmetric), blocks)
    rows = torch.randn(50, 11, generator=g)
    branch = (torch.randn(2, 11, generator=g), torch.randn(6, 2, generator=g)) if low else None
    return SegLinear.of(layer, plan, rows, torch.rand(11, generator=g) + .5 if smooth else None, branch), rows


@pytest.mark.parametrize('parts', [(False,)*4, (False, True, False, True), (True,)*4])
def test_export_of_the_layer_itself(parts):
    "torch.export counts buffers of None among the inputs, so there are none"
    q, rows = everything(*parts)
    program = torch.export.export(q, (rows[:4],), dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}])
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(rows), q(rows))


def test_a_skeleton_is_filled():
    "From the plan and the shapes; what is not saved is not needed"
    q, rows = everything()
    state = q.state_dict()
    for fill in (lambda m: m.load_state_dict(state, strict=True, assign=True), lambda m: m.to_empty(device='cpu').load_state_dict(state)):
        skeleton = SegLinear.restore(q.plan, {name: torch.empty_like(t, device='meta') for name, t in state.items()})
        assert skeleton(rows.to('meta')).shape == (50, 6) and {b.device.type for b in skeleton.buffers()} == {'meta'}
        fill(skeleton)
        assert torch.equal(skeleton(rows), q(rows)) and repr(skeleton) == repr(q)
    with pytest.raises(RuntimeError, match='Missing.*bias'): SegLinear.restore(q.plan, state).load_state_dict({k: v for k, v in state.items() if k != 'bias'})


def test_scales_of_layers_in_double_precision_survive_half():
    torch.manual_seed(0)
    rows = torch.randn(9, 8).double()
    q = SegLinear.of(nn.Linear(8, 4).double(), Plan([(4, Quantizer()), (4, Quantizer(symmetric=False))], [4]), rows, torch.rand(8).double() + .5).half()
    assert {n: t.dtype for n, t in q.state_dict().items() if t.is_floating_point()} == dict(
        bias=torch.float16, weight_scale=torch.float32, input0_scale=torch.float32, input1_scale=torch.float32, smooth=torch.float32)
    assert q.input1_zero.dtype == torch.int32


@pytest.mark.parametrize('axis', [None, 1])
def test_a_weight_in_16_bits_has_no_groups(axis):
    layer, plan = nn.Linear(10, 6), Plan([(7, Quantizer('fp16')), (3, Quantizer('fp16'))], [4, 2], Quantizer('bf16', axis=axis, group=4))
    q, x = SegLinear.of(layer, plan), torch.randn(5, 10)
    assert torch.equal(q.decoded_weight(), layer.weight.bfloat16().float()) and granules(plan) == (0, 7, 10)
    torch.testing.assert_close(q(x), q.integer(x), atol=1e-6, rtol=0)


def test_compiled_it_is_one_graph_for_all_sizes():
    torch.manual_seed(0)
    plan = Plan([(16, Quantizer('int8', axis=-1, dynamic=True)), (8, Quartz()), (7, DualScale('int6', dynamic=True))], [6], Quantizer('int4', axis=1, group=3), [16, 4, 1])
    q, x = SegLinear.of(nn.Linear(31, 6), plan, torch.randn(50, 31), torch.rand(31) + .5, (torch.randn(2, 31), torch.randn(6, 2))), torch.randn(64, 31)
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend='aot_eager')
    compiled(x)
    with torch.compiler.set_stance('fail_on_recompile'):
        for n in (2, 9, 64): assert torch.equal(compiled(x[:n]), q(x[:n]))


def test_autocast_does_not_reach_in():
    q, rows = everything()
    right = q(rows)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(q(rows), right) and not torch.equal(q.emulate(rows), right)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_rotated_layer_is_the_layer_of_rotated_things(data):
    "Weight, rows and inputs rotated beforehand, by matrices; nothing rotated by the layer"
    parts = data.draw(st.lists(st.sampled_from([(4, 4), (6, 2), (5, 1), (16, 16), (24, 8), (12, 1)]), min_size=1, max_size=3))
    sizes, blocks = zip(*parts)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    k = sum(sizes)
    R = rotated(torch.eye(k, dtype=torch.float64), Plan([(s, None) for s in sizes], [1], blocks=blocks))
    assert torch.allclose(R @ R, torch.eye(k, dtype=torch.float64)) and torch.allclose(R.T, R)
    layer, rows = nn.Linear(k, 5).double(), torch.randn(30, k, generator=g).double()
    x = rows[:7]
    smooth = torch.rand(k, generator=g).double() + .5
    turned = nn.Linear(k, 5).double()
    turned.weight.data, turned.bias.data = layer.weight.data*smooth @ R, layer.bias.data
    plan = Plan([(s, data.draw(st.sampled_from([Quantizer('int16'), Quantizer('int16', axis=-1, dynamic=True)]))) for s in sizes], [2, 3], Quantizer('int16', axis=1))
    inside = SegLinear.of(layer, Plan(plan.inputs, plan.outputs, plan.weight, blocks), rows, smooth)
    outside = SegLinear.of(turned, plan, rows/smooth @ R)
    assert (inside(x) - outside(x/smooth @ R)).abs().max() < 2e-3*layer(x).std() and (inside(x) - layer(x)).abs().max() < 2e-3*layer(x).std()


def test_rotated_statistics():
    torch.manual_seed(0)
    rows = torch.cat([torch.randn(40, 8), 50 + torch.randn(40, 3)], 1)
    plan = Plan([(8, Quantizer()), (3, Quantizer())], [2], blocks=[8, 1])
    stats = stats_of(rows.bfloat16(), 'some layer', [slice(0, 8), slice(8, 11)], hessian=True, keep=16)
    kept = stats.rows.clone()
    turned, R = rotated(stats, plan), rotated(torch.eye(11, dtype=torch.float64), plan)
    assert torch.equal(stats.rows, kept) and turned.rows.dtype == torch.float32 and turned.parts == stats.parts and turned.counts.shape == stats.counts.shape
    assert torch.allclose(turned.rows.double(), kept.double() @ R, atol=1e-5) and torch.allclose(turned.gram, R.T @ stats.gram @ R)
    assert torch.equal(turned.high[8:], stats.high[8:].float()) and torch.equal(turned.high[:8], turned.rows[:, :8].amax(0))  # of mixtures only rows know
    fitted = SegLinear.of(nn.Linear(11, 2), plan, stats)
    assert fitted.input0_scale == turned.rows[:, :8].abs().max()/127 and fitted.input1_scale == stats.amax[8:].max().float()/127
    assert rotated(stats, Plan(plan.inputs, [2])) is stats


def test_rotations_give_the_same_bits_for_any_number_of_rows():
    torch.manual_seed(0)
    x = torch.randn(700, 1024)
    before, all_at_once = x.clone(), rotate_columns(x, [1024], [256])
    for n in (1, 2, 3, 7, 64, 300): assert torch.equal(rotate_columns(x[:n], [1024], [256]), all_at_once[:n])
    assert torch.equal(rotate_columns(x.t().contiguous().t(), [1024], [256]), all_at_once) and torch.equal(x, before)
    assert torch.equal(rotate_columns(torch.ones(1024).expand(3, -1), [1024], [64]), torch.ones(3, 1024))
    small = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rotate_columns(t, [16, 8], [16, 8]), small)
    with pytest.raises(ValueError, match=r'expected \(…, 2×512\)'): rotate_columns(x[:, :9], [512, 512], [2, 2])


def test_its_weight_is_what_it_multiplies_its_input_by():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 40), torch.randn(50, 64)
    plan = Plan([(64, Quantizer('int8', axis=-1, dynamic=True))], [40], Quantizer('int8', axis=1), (16,))
    down, up = torch.randn(3, 64)/8, torch.randn(40, 3)/8
    q = SegLinear.of(linear, plan, x, smooth=torch.rand(64) + .2, low_rank=(down, up))
    right = torch.nn.functional.linear(x, q.weight, q.bias)
    assert (q(x) - right).norm() < .02*right.norm()
