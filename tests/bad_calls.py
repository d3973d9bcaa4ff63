"""Calls that are wrong in one argument: what each public function that launches a kernel is given, and what is wrong with it."""
import contextlib

import torch
from emulate import emulated_gpu

from segquant_nb import between, codes, cpu, cuda, gemm, hopper_gemm, int4, ops, producers, small
from segquant_nb.codes import Codes, PackedColumns
from segquant_nb.formats import Quantizer, pack_int4
from segquant_nb.ops import Spec
from segquant_nb.seglinear import Plan, SegLinear

M, N, K = 6, 16, 96
COLUMNS = PackedColumns((32, 64))
WIDTH = COLUMNS.width


def tensors():
    "Right ones, by name"
    g = torch.Generator().manual_seed(0)
    def randn(*shape): return torch.randn(*shape, generator=g)
    def int8(*shape): return torch.randint(-127, 128, shape, dtype=torch.int8, generator=g)
    weight = int8(N, WIDTH)
    weight[:, 96:] = 0
    return dict(
        x=randn(M, K).bfloat16(), x16=randn(M, WIDTH).bfloat16(), codes=int8(M, WIDTH), weight=weight, packed=pack_int4(int8(N, WIDTH) % 16 - 8),
        w4=int4.pack_w4(int8(N, WIDTH) % 16 - 8), fp8=randn(N, WIDTH).to(torch.float8_e4m3fn), fp8_codes=randn(M, WIDTH).to(torch.float8_e4m3fn),
        scale_x=randn(2, M).abs() + .1, dual_x=randn(4, M).abs() + .1, static=randn(2, 1).abs() + .1, scale_w=randn(2, N).abs() + .1, bias=randn(N), smooth=randn(WIDTH).abs() + .1,
        residual=randn(M, N).bfloat16(), gate=randn(2, N), low=randn(M, 16).bfloat16(), up=randn(N, 16).bfloat16(), out=randn(M, N).bfloat16(),
        shift=randn(2, K).bfloat16(), factor=randn(2, K).bfloat16(), norm=randn(K).bfloat16(), gated=randn(M, 2*K).bfloat16(), int4=pack_int4(int8(N, 64) % 16 - 8))


def calls():
    "Name → function, arguments that are right, and the compute capability that it needs"
    t = tensors()
    rest = dict(scale_x=t['scale_x'], scale_w=t['scale_w'], bias=t['bias'], columns=COLUMNS, dtype=torch.bfloat16)
    added = dict(residual=t['residual'], gate=t['gate'])
    def pick(*names): return {n: t[n] for n in names}
    linear = torch.nn.Linear(K, N).requires_grad_(False)
    layer = SegLinear.of(linear, Plan([(K, Quantizer('int8', axis=-1, dynamic=True))], [N], Quantizer('int8', axis=1)))
    def prepared(x):
        ops._prepare(layer, 'cuda_sm80')
        return layer(x)
    def product(codes, scale_x, dtype, residual, gate, low, out):
        fixed = gemm.Operands(t['weight'], t['scale_w'], t['bias'], COLUMNS, up=t['up'])
        return gemm.PortableLinear(fixed)(codes, scale_x, dtype, residual, gate, low, out)
    def hopper(codes, scale_x, dtype, residual, gate, low, out):
        return hopper_gemm.HopperLinear(t['weight'], t['scale_w'], t['bias'], COLUMNS, up=t['up'])(codes, scale_x, dtype, residual, gate, low, out=out)
    def four(codes, scale_x, dtype, low, out):
        return int4.Int4Linear(t['w4'], t['scale_w'], t['bias'], COLUMNS, up=t['up'])(codes, scale_x, dtype, low, out=out)
    def norm(x, shift, scale): return producers.NormCodes(COLUMNS, weight=t['norm'], bias=t['norm'])(x, shift, scale)
    common = dict(columns=COLUMNS, dtype='int8', scale=t['static'], dual=False, smooth=t['smooth'], duals=None, blocks=(32, 32))
    return {
        'unpack_int4_cuda': (cuda.unpack_int4_cuda, dict(packed=t['int4'])),
        'PackedColumns': (PackedColumns, dict(sizes=(32, 64))), 'PackedColumns.pack': (COLUMNS.pack, dict(codes=t['weight'][:, :K].contiguous())),
        'quantize_cuda': (codes.quantize_cuda, dict(x=t['x'], quartz=None, packed=False, rounded=False, **common)),
        'quantize_cuda quartz': (codes.quantize_cuda, dict(x=t['x'], columns=COLUMNS, quartz=32, packed=True, rounded=True)),
        'CodesKernel': (codes.CodesKernel, dict(quartz=None, packed=False, rounded=False, **common)),
        'granule_columns': (gemm.granule_columns, dict(columns=COLUMNS, group=32)),
        'w8a8_naive': (gemm.w8a8_naive, dict(codes=t['codes'], weight=t['weight'], scale_x=t['dual_x'], scale_w=t['scale_w'], bias=t['bias'], columns=COLUMNS, dual=True)),
        'w8a8_sm80': (gemm.w8a8_sm80, dict(codes=t['codes'], weight=t['weight'], low_rank=(t['low'], t['up']), out=t['out'], dual=False, duals=None, group=None, **rest, **added)),
        'w8a8_sm80 int4': (gemm.w8a8_sm80, dict(codes=t['codes'], weight=t['packed'], **rest)),
        'w8a8_sm80 dual': (gemm.w8a8_sm80, dict(codes=t['codes'], weight=t['weight'], dual=True, duals=(True, False), **rest | dict(scale_x=t['dual_x']))),
        'w8a8_sm80 fp8': (gemm.w8a8_sm80, dict(codes=t['fp8_codes'], weight=t['fp8'], **rest), (8, 9)),
        'PortableLinear': (lambda **kw: gemm.PortableLinear(gemm.Operands(**kw)), dict(weight=t['weight'], scale_w=t['scale_w'], bias=t['bias'], columns=COLUMNS, dual=False, duals=None, group=None, up=t['up'])),
        'PortableLinear()': (product, dict(codes=t['codes'], scale_x=t['scale_x'], dtype=torch.bfloat16, **added, **pick('low', 'out'))),
        'w8a16_sm80': (gemm.w8a16_sm80, dict(x=t['x16'], weight=t['weight'], low_rank=(t['low'], t['up']), out=t['out'], group=None, **{k: v for k, v in rest.items() if k != 'scale_x'}, **added)),
        'w8a8_sm90': (hopper_gemm.w8a8_sm90, dict(codes=t['codes'], weight=t['weight'], low_rank=(t['low'], t['up']), out=t['out'], dual=False, duals=None, **rest, **added), (9, 0)),
        'fp8_sm90': (hopper_gemm.fp8_sm90, dict(codes=t['fp8_codes'], weight=t['fp8'], cut=32, **rest), (9, 0)),
        'HopperLinear': (hopper_gemm.HopperLinear, dict(weight=t['weight'], scale_w=t['scale_w'], bias=t['bias'], columns=COLUMNS, dual=False, duals=None, up=t['up']), (9, 0)),
        'HopperLinear()': (hopper, dict(codes=t['codes'], scale_x=t['scale_x'], dtype=torch.bfloat16, **added, **pick('low', 'out')), (9, 0)),
        'w8a8_small': (small.w8a8_small, dict(x=t['x'], weight=t['weight'], scale_w=t['scale_w'], bias=t['bias'], columns=COLUMNS, dual=False, dtype=torch.bfloat16, scale=t['static'], smooth=t['smooth'],
                                              duals=None, codes='int8', silu=False, group=None, **added)),
        'w8a8_small codes': (small.w8a8_small, dict(x=Codes(t['codes'], t['scale_x']), weight=t['weight'], scale_w=t['scale_w'], bias=t['bias'], columns=COLUMNS)),
        'w8a16_small': (small.w8a16_small, dict(x=t['x'], weight=t['weight'], scale_w=t['scale_w'], bias=t['bias'], columns=COLUMNS, dtype=torch.bfloat16, silu=False, group=None, **added)),
        'norm_codes': (producers.norm_codes, dict(x=t['x'], columns=COLUMNS, shift=t['shift'], scale=t['factor'], weight=t['norm'], bias=t['norm'], eps=1e-6, kind='layer')),
        'NormCodes()': (norm, dict(x=t['x'], shift=t['shift'], scale=t['factor'])),
        'activation_codes': (producers.activation_codes, dict(x=t['gated'], columns=COLUMNS, activation='gelu', gated=True, gate_first=False)),
        'pack_w4': (int4.pack_w4, dict(codes=torch.zeros(N, WIDTH, dtype=torch.int8))),
        'w4a8_sm90': (int4.w4a8_sm90, dict(codes=t['codes'], weight=t['w4'], low_rank=(t['low'], t['up']), out=t['out'], group=None, **rest), (9, 0)),
        'Int4Linear()': (four, dict(codes=t['codes'], scale_x=t['scale_x'], dtype=torch.bfloat16, **pick('low', 'out')), (9, 0)),
        'SegLinear on a GPU': (prepared, dict(x=t['x'])),
        'choose_kernel': (ops.choose_kernel, dict(layer=layer, device='cuda')), 'use_kernels': (ops.use_kernels, dict(model=layer, device='cuda')), 'use_emulation': (ops.use_emulation, dict(model=layer)),
        'rotate_heads': (between.rotate_heads, dict(x=torch.randn(2, 5, 3, 16).bfloat16(), cosines=torch.ones(5, 16), sines=torch.zeros(5, 16), tokens_at=1)),
        'rms_heads': (between.rms_heads, dict(x=torch.randn(6, 16).bfloat16(), weight=torch.ones(16).bfloat16(), eps=1e-6, rounded=True)),
        'norm_rows': (between.norm_rows, dict(x=torch.randn(2, 5, 64).bfloat16(), weight=torch.ones(64).bfloat16(), bias=torch.ones(64).bfloat16(), scale=torch.ones(2, 64).bfloat16(), shift=torch.ones(2, 64).bfloat16(), eps=1e-6, kind='layer')),
        'gated_sum': (between.gated_sum, dict(x=torch.randn(2, 5, 16).bfloat16(), residual=torch.randn(2, 5, 16).bfloat16(), gate=torch.ones(2, 16).bfloat16())),
        'beside_gelu': (between.beside_gelu, dict(a=torch.randn(2, 5, 16).bfloat16(), b=torch.randn(2, 5, 24).bfloat16())),
        'use_quick_parts': (ops.use_quick_parts, dict(model=torch.nn.LayerNorm(64))), 'cuda_reason': (ops.cuda_reason, dict(layer=layer, arch='sm_80')), 'cuda_tables': (ops.cuda_tables, dict(layer=layer, product='sm80')),
        'find_spec': (ops.find_spec, dict(layer=layer, arch='sm_80')), 'cpu_linear': (cpu.cpu_linear, dict(layer=layer, x=t['x'])),
    }


def wrong(value):
    "What could stand in its place, and a word for it"
    if isinstance(value, torch.Tensor):
        flat, other = value.flatten(), torch.float64 if value.is_floating_point() else torch.int32
        yield 'None', None
        yield 'a list', [1, 2]
        yield 'a number', 3.
        yield 'another type', value.to(other)
        yield 'bool', value.to(torch.bool)
        yield 'a complex type', value.to(torch.complex64)
        yield 'on meta', value.to('meta')
        yield '0-D', flat[0]
        yield 'a dimension more', value[None]
        yield 'a dimension less', value[0]
        yield 'no rows', value[:0]
        yield 'a row more', torch.cat([value, value[:1]])
        yield 'nothing', value.new_empty(0)
        yield 'misaligned', torch.cat([flat.view(torch.uint8), flat.view(torch.uint8)[:64]])[value.element_size():][:value.nbytes].view(value.dtype).view(value.shape)
        if value.ndim < 2: yield 'strided', torch.stack([value, value], 1)[:, 0]
        if value.ndim == 2:
            yield 'no columns', value[:, :0]
            yield 'a column less', value[:, :-1].contiguous()
            yield 'a column more', torch.cat([value, value[:, :1]], 1)
            yield 'transposed', value.t().contiguous().t()
            yield 'a part of wider rows', torch.cat([value, value], 1)[:, :value.shape[1]]
            yield 'expanded', value[:1].expand_as(value)
    elif isinstance(value, Codes):
        for name, t in wrong(value.codes): yield f'codes: {name}', value._replace(codes=t)
        for name, t in wrong(value.scale): yield f'scale: {name}', value._replace(scale=t)
    elif isinstance(value, PackedColumns):
        yield 'a tuple', value.sizes
        yield 'fewer', PackedColumns(value.sizes[:1])
        yield 'more', PackedColumns((*value.sizes, 64))
        yield 'a number', 96
    elif isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        yield 'one of two', value[:1]
        yield 'a tensor', value[0]
        for i in (0, 1):
            for name, t in wrong(value[i]): yield f'{i}: {name}', (*value[:i], t, *value[i + 1:])
    elif isinstance(value, (torch.nn.Module,)):
        yield 'None', None
        yield 'a string', 'layer'
        yield 'a tensor', torch.zeros(3)
    elif isinstance(value, tuple):
        for name, v in (('empty', ()), ('fewer', value[:1]), ('more', (*value, value[0])), ('a number', 3), ('strings', ('a', 'b')), ('negative', (-1,)*len(value)), ('floats', (1.5,)*len(value))): yield name, v
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, torch.dtype):
        yield from (('int8', torch.int8), ('a string', 'bfloat16'), ('float64', torch.float64), ('a number', 3))
    elif isinstance(value, str):
        yield from (('another word', 'int7'), ('a number', 3), ('a tensor', torch.zeros(2)), ('None', None))
    else:
        yield from (('negative', -1), ('zero', 0), ('odd', 33), ('a fraction', 1.5), ('a string', 'x'), ('a tensor', torch.zeros(2)))


@contextlib.contextmanager
def gpu(capability=(8, 0)):
    from unittest import mock
    with emulated_gpu(capability=capability, run=capability < (9, 0)) as gpu, mock.patch.multiple(ops, _DEVICE='cpu', cuda_problem=lambda *_: None): yield gpu
