"""Products of codes on a CPU, over layers found by search; with and without the instruction; what must not be copied or changed."""
import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from quantizer_cases import pieces
from torch import nn

from segquant_nb import cpu
from segquant_nb.cpu import ROWS, code_product, cpu_linear, cpu_reason, has_vnni, unpack_int4_cpu
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer, pack_int4
from segquant_nb.quartz import Quartz
from segquant_nb.seglinear import Plan, SegLinear

TOKEN = dict(axis=-1, dynamic=True)
INPUTS = [Quantizer('int8'), Quantizer('int6'), Quantizer('int4', **TOKEN), Quantizer('int8', dynamic=True), Quantizer('int8', clip='percentile', **TOKEN),
          DualScale('int8'), DualScale('int8', **TOKEN), DualScale('int4', dynamic=True), Quartz(group=16), Quartz(rounded=True, **TOKEN)]
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@st.composite
def layers(draw):
    n, k = draw(st.integers(1, 20)), draw(st.integers(1, 200))
    inputs = [(size, draw(st.sampled_from(INPUTS))) for size in pieces(draw, k, 2)]
    weight = Quantizer(draw(st.sampled_from(['int8', 'int4', 'int6', 'int3'])), axis=draw(st.sampled_from([None, 1])), group=draw(st.sampled_from([None, 64, 100])))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    linear = nn.Linear(k, n, bias=draw(st.booleans()))
    smooth = torch.rand(k) + .5 if draw(st.booleans()) else None
    low_rank = (torch.randn(2, k)/k, torch.randn(n, 2)) if draw(st.booleans()) else None
    x = torch.randn(draw(st.sampled_from([1, 3, 40])), k)
    blocks = [size & -size for size, _ in inputs] if draw(st.booleans()) else ()
    return SegLinear.of(linear, Plan(inputs, pieces(draw, n, 2), weight, blocks), torch.randn(20, k), smooth, low_rank), x


@pytest.mark.parametrize('vnni', [True, False])
@settings(max_examples=60, deadline=None)
@given(case=layers(), dtype=st.sampled_from(list(CLOSE)), rows=st.sampled_from([1, 7, ROWS]))
def test_products_of_codes_are_the_layer(vnni, case, dtype, rows):
    if vnni and not has_vnni(): pytest.skip('this processor has no AVX512-VNNI')
    layer, x = case
    assert cpu_reason(layer) == '' or layer.plan.weight.group
    x = x.to(dtype)
    before, state = x.clone(), copy.deepcopy(layer.state_dict())
    with mock.patch.multiple(cpu, ROWS=rows, has_vnni=lambda: vnni): got = cpu_linear(layer, x)
    right = layer.integer(x).double()
    scale = layer.integer(x.double()).abs().max().clamp(min=1e-30) + (0 if layer.bias is None else layer.bias.abs().max())
    assert got.dtype == dtype and ((got.double() - right).abs() <= CLOSE[dtype]*4*scale).all()
    assert torch.equal(x, before)
    for name, t in layer.state_dict().items(): assert torch.equal(t, state[name]), name


def test_a_scale_for_all_rows_sees_all_rows():
    "However the rows are cut into blocks"
    torch.manual_seed(0)
    x = torch.randn(3*ROWS + 5, 16)
    x[-1] *= 100
    for q in (Quantizer('int8', dynamic=True), DualScale('int8', dynamic=True), Quartz(dynamic=True)):
        layer = SegLinear.of(nn.Linear(16, 8), Plan([(16, q)], [8], Quantizer('int8', axis=1)))
        assert (cpu_linear(layer, x) - layer.integer(x)).abs().max() < 1e-4


@pytest.mark.parametrize('q', INPUTS, ids=repr)
def test_nan_and_infinity_are_as_in_the_emulation(q):
    torch.manual_seed(0)
    layer = SegLinear.of(nn.Linear(32, 8), Plan([(32, q)], [8], Quantizer('int8', axis=1)), torch.randn(20, 32))
    x = torch.randn(6, 32)
    x[0, 3], x[1, 4], x[2, 5], x[3], x[4] = torch.nan, torch.inf, -torch.inf, torch.nan, 0
    right = layer.integer(x)
    assert right.isfinite().all()
    torch.testing.assert_close(cpu_linear(layer, x), right, rtol=1e-5, atol=1e-5)
    with mock.patch.object(torch.compiler, 'is_compiling', lambda: True):  # what the compiler sees
        torch.testing.assert_close(cpu_linear(layer, x), right, rtol=1e-5, atol=1e-5)


def test_a_processor_that_saturates_is_found_out():
    "oneDNN adds pairs in 16 bits where it is told to do without VNNI"
    def saturating(a, b, out=None):
        pairs = (a[:, :, None].short()*b[None].short()).transpose(1, 2).unflatten(2, (-1, 2)).int()
        return pairs.sum(3).clamp(-2**15, 2**15 - 1).sum(2).int()
    with mock.patch.object(torch, '_int_mm', saturating), mock.patch.object(torch.cpu, '_is_vnni_supported', lambda: True): assert not cpu._probe()
    with mock.patch.object(torch.cpu, '_is_vnni_supported', lambda: False): assert not cpu._probe()


def test_without_the_instruction_no_scalar_loop():
    a, b = (torch.randint(-128, 128, (5, 3000)).to(torch.int8) for _ in range(2))
    with mock.patch.object(torch, '_int_mm', side_effect=AssertionError('the scalar loop')):
        assert torch.equal(code_product(a, b, vnni=False).long(), a.long() @ b.long().t())


@pytest.mark.parametrize('n', [1, 2, 5])
def test_one_column(n):
    "torch._int_mm gets it wrong"
    a, b = torch.tensor([[3], [-128]], dtype=torch.int8), torch.arange(1, n + 1, dtype=torch.int8)[:, None]
    assert torch.equal(code_product(a, b).long(), a.long() @ b.long().t())


def test_no_temporary_is_as_large_as_the_result():
    "Apart from the result itself, a few blocks of rows"
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        sizes = ()

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            y = f(*args, **(kwargs or {}))
            if isinstance(y, torch.Tensor) and f._schema.name in ('aten::empty', 'aten::div', 'aten::_to_copy', 'aten::_int_mm', 'aten::addcmul', 'aten::clone', 'aten::mul'):
                self.sizes += (y.shape[0] if y.ndim == 2 else 0,)
            return y

    layer = SegLinear.of(nn.Linear(64, 64), Plan([(64, DualScale(**TOKEN))], [64], Quantizer('int8', axis=1)))
    rows = 20*ROWS
    with Largest() as seen: cpu_linear(layer, torch.randn(rows, 64))
    assert seen.sizes.count(rows) == 1 and max(s for s in seen.sizes if s != rows) <= ROWS


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 150), k=st.integers(1, 40), rows=st.integers(1, 70))
def test_unpacking(n, k, rows):
    codes = torch.randint(-8, 8, (n, k)).to(torch.int8)
    packed = pack_int4(codes)
    before = packed.clone()
    assert torch.equal(unpack_int4_cpu(packed, k, rows), codes) and torch.equal(packed, before)


def test_inputs_that_ask_for_gradients():
    layer = SegLinear.of(nn.Linear(8, 4), Plan([(8, Quantizer(**TOKEN))], [4], Quantizer('int8', axis=1)))
    x = torch.randn(3, 8, requires_grad=True)
    assert not cpu_linear(layer, x).requires_grad
