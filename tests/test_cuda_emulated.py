"""The kernels themselves, run on an emulated GPU and held to PyTorch bit for bit: ragged shapes, odd segments, strides, accidents.

That the emulation would notice is tested too, by breaking the sources.
"""
import math
import os
import random
import signal
from fractions import Fraction

import pytest
import torch
from emulate import COMPILER, emulated_gpu
from emulate.cases import activations, same
from emulate.guarded import in_guarded_memory
from hypothesis import HealthCheck, given as drawn, settings, strategies as st

import segquant_nb.cuda as cuda
import segquant_nb.gemm as gemm
from segquant_nb.codes import PackedColumns, quantize_cuda, quantize_reference
from segquant_nb.formats import pack_int4, unpack_int4
from segquant_nb.gemm import _MIDDLE, _SMALL, _THIN, Operands, PortableLinear, decode_cuda, granule_columns, w8a16_sm80, w8a8_naive, w8a8_reference, w8a8_sm80

pytestmark = pytest.mark.skipif(COMPILER is None and 'CI' not in os.environ, reason='no C++ compiler on this machine (c++, g++ or clang++)')


def test_what_a_kernel_does_not_write_is_poisoned():
    with emulated_gpu(): assert torch.empty(9).isnan().all() and (torch.empty(9, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


OPTIONS = [dict(), dict(dual=True), dict(dtype='int4', dual=True), dict(dtype='int4', packed=True), dict(dtype='fp8e4m3', dual=True),
           dict(quartz=16), dict(quartz=32, packed=True), dict(quartz=16, rounded=True)]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_codes(options):
    pick = random.Random(str(options))
    for seed, dtype in enumerate([torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]):
        sizes = [pick.choice((1, 7, 32, 40, 64, 129, 300)) for _ in range(pick.randint(1, 4))]
        if seed == 3: sizes = [[5000, 64, 3100], [3073], [1000]*33][len(options) % 3]  # two and four vectors per thread
        columns, rows = PackedColumns(sizes), 9 if seed == 3 else pick.choice((1, 5, 17))
        x = activations(rows, columns.columns, dtype, seed)
        smooth = columns.pack(torch.rand(1, columns.columns) + .5)[0] if seed == 1 else None
        with emulated_gpu(seed): got = quantize_cuda(x, columns, smooth=smooth, **options)
        want = quantize_reference(x, columns, smooth=smooth, **options)
        assert same(got, want), (seed, sizes, rows, dtype)


@pytest.mark.parametrize('scales', ['tensor', 'token'])
def test_codes_by_given_scales(scales):
    columns = PackedColumns((40, 100, 6))
    for dual in (False, True):
        x = activations(9, 146, torch.float32, 4)
        scale = (torch.rand(3*(1 + dual), 9 if scales == 'token' else 1) + .01)*10**torch.linspace(-3, 3, 3*(1 + dual))[:, None]
        with emulated_gpu(): got = quantize_cuda(x, columns, scale=scale, dual=dual)
        assert got.scale is scale and same(got, quantize_reference(x, columns, scale=scale, dual=dual))


def test_scales_at_the_ends_of_float32():
    x, columns = activations(6, 64, torch.float32, 5), PackedColumns((64,))
    for size in (1.2e-38, 1e-35, 1e-30, 1e30, 3e38):
        scale = torch.tensor([[size]])
        x[0] = torch.linspace(-200, 200, 64)*size
        with emulated_gpu(): assert same(quantize_cuda(x, columns, scale=scale), quantize_reference(x, columns, scale=scale)), size


def test_codes_of_rows_that_lie_apart():
    whole = activations(6, 3*128, torch.bfloat16, 6)
    columns = PackedColumns((128,))
    aligned = []
    for part in (*whole.chunk(3, 1), whole[:, 3:131], whole[::2, :128], whole.view(2, 3, 384)[..., 128:256]):
        with emulated_gpu() as gpu: got = quantize_cuda(part, columns)
        aligned.append('-DALIGNED=1' in gpu.launches[0].options)
        assert same(got, quantize_reference(part, columns))
    assert aligned == [True, True, True, False, True, True]


def test_smoothing_rounds_once():
    x, columns = activations(5, 64, torch.bfloat16, 7), PackedColumns((64,))
    smooth = torch.rand(64)*3
    with emulated_gpu(): got = quantize_cuda(x, columns, smooth=smooth, dual=True)
    assert same(got, quantize_reference(x.float()*smooth, columns, dual=True))


def test_every_int4_byte():
    packed = torch.arange(256, dtype=torch.uint8).repeat(3).view(-1, 16)
    with emulated_gpu(): codes = cuda.unpack_int4_cuda(packed)
    assert torch.equal(codes, unpack_int4(packed)) and torch.equal(pack_int4(codes), packed)


@pytest.mark.parametrize('sizes, group', [((64,), None), ((33, 70, 500), None), ((96, 544), 32), ((640,), 64)])
def test_decoded_weights(sizes, group):
    columns, g = PackedColumns(sizes), torch.Generator().manual_seed(0)
    pieces, _ = granule_columns(columns, group)
    widths = torch.tensor(pieces.ends).diff(prepend=torch.zeros(1, dtype=torch.long))
    for bits, N, dtype in ((8, 1, torch.bfloat16), (8, 21, torch.float16), (4, 21, torch.bfloat16), (4, 8, torch.float16)):
        codes = torch.randint(-2**(bits - 1), 2**(bits - 1), (N, columns.width), dtype=torch.int8, generator=g)
        scale = torch.rand(len(widths), N, generator=g)**4 + 1e-4
        weight = codes if bits == 8 else pack_int4(codes)
        with emulated_gpu(run=True): values = decode_cuda(weight, scale, columns, dtype, group=group)
        assert torch.equal(values, (codes.float()*scale.repeat_interleave(widths, 0).T).to(dtype))
        if len(widths) > 1: continue
        with emulated_gpu(): assert torch.equal(decode_cuda(weight, scale[0], columns, dtype), values)
    with emulated_gpu() as gpu: assert decode_cuda(weight[:0], scale[:, :0].clone(), columns, group=group).shape == (0, columns.width) and not gpu.launches


def layer(M, N, sizes, dual, seed, tokens=True, segment_scales=False):
    g, columns = torch.Generator().manual_seed(seed), PackedColumns(sizes)
    def codes(rows): return columns.pack(torch.randint(-128, 128, (rows, columns.columns), dtype=torch.int8, generator=g))
    return dict(codes=codes(M), weight=codes(N), scale_x=torch.rand(len(sizes)*(1 + dual), M if tokens else 1, generator=g),
                scale_w=torch.rand(*((len(sizes), N) if segment_scales else (N,)), generator=g),
                bias=torch.randn(N, generator=g) if seed % 2 else None, columns=columns, dual=dual)


@pytest.mark.parametrize('tile', [_MIDDLE, _SMALL, _THIN], ids=lambda t: f'{t[0]}x{t[1]}')
@pytest.mark.parametrize('dual', [False, True])
def test_products(tile, dual):
    pick = random.Random(f'{tile}{dual}')
    for seed in range(4):
        sizes = [pick.choice((1, 31, 32, 64, 100, 257)) for _ in range(pick.randint(2, 5))] if seed else [pick.choice((64, 100, 1000))]
        M, N = pick.choice((1, 15, 16, 17, 63, 65)), pick.choice((1, 7, 8, 64, 75, 129))
        given = layer(M, N, sizes, dual, seed, tokens=seed != 2, segment_scales=seed == 3)
        dtype = (torch.bfloat16, torch.float32)[seed > 1]
        with emulated_gpu(seed, early_copies=seed % 2 == 1): y = w8a8_sm80(**given, dtype=dtype, tile=tile)
        assert torch.equal(y, w8a8_reference(**given, dtype=dtype)), (M, N, sizes, seed)


def portable(form, M, N, sizes, dual=False, seed=0, group=None, rank=0, branch=torch.bfloat16):
    "As `layer`, for any format, with scales of groups and a low-rank branch"
    given, g = layer(M, N, sizes, dual, seed, tokens=seed % 3 > 0) | dict(group=group), torch.Generator().manual_seed(seed)
    columns = given['columns']
    if group: given['scale_w'] = torch.rand(len(granule_columns(columns, group)[1]), N, generator=g)
    if form == 'int4': given['weight'] = pack_int4(columns.pack(torch.randint(-8, 8, (N, columns.columns), dtype=torch.int8, generator=g)))
    if form == 'e4m3':
        for name, rows in (('codes', M), ('weight', N)):
            every = torch.randint(0, 256, (rows, columns.columns), dtype=torch.uint8, generator=g)
            every[every % 128 == 127] = 0  # NaN
            given[name] = columns.pack(every).view(torch.float8_e4m3fn)
    if rank: given['low_rank'] = tuple(torch.randn(rows, rank, generator=g).to(branch) for rows in (M, N))
    return given


def in_float64(given):
    "The product, and the magnitudes of what went into it: by itself, without segments, groups and polarities as the kernels know them"
    columns, dual = given['columns'], given['dual']
    weight = unpack_int4(given['weight']) if given['weight'].dtype is torch.uint8 else given['weight']
    codes, weight, y, size = given['codes'].double(), weight.double(), 0., 0.
    pieces, segments = granule_columns(columns, given.get('group'))
    scale_w = given['scale_w'].double().expand(len(segments), -1)
    for k in range(columns.width):
        segment = next(i for i, end in enumerate(columns.ends) if k < end)
        piece = next(i for i, end in enumerate(pieces.ends) if k < end)
        x, step = codes[:, k], given['scale_x'].double().expand(-1, len(codes))[segment*(1 + dual):(segment + 1)*(1 + dual)]
        term = (x*torch.where(x < 0, step[-1], step[0]))[:, None]*weight[:, k]*scale_w[piece]
        y, size = y + term, size + term.abs()
    if 'low_rank' in given:
        t, up = (side.double() for side in given['low_rank'])
        y, size = y + t @ up.T, size + t.abs() @ up.abs().T
    if given['bias'] is not None: y, size = y + given['bias'].double(), size + given['bias'].abs().double()
    return y, size


KINDS = [('int4', False, (300,), None), ('int4', True, (100, 200), None), ('int4', False, (300,), 64), ('int4', True, (70, 33, 257), 32), ('int8', False, (500,), 128), ('int8', True, (31, 300), 96)]


@pytest.mark.parametrize('form, dual, sizes, group', KINDS, ids=str)
def test_packed_weights_and_groups(form, dual, sizes, group):
    for seed, (M, N) in enumerate([(65, 70), (17, 9), (3, 130)]):
        tile = _THIN if seed == 2 and dual else _SMALL
        given = portable(form, M, N, sizes, dual, seed, group)
        more = dict(duals=(False,) + (True,)*(len(sizes) - 1)) if dual and seed == 1 else {}
        with emulated_gpu(seed, early_copies=seed == 1): y = w8a8_sm80(**given, **more, dtype=torch.float32, tile=tile)
        assert torch.equal(y, w8a8_reference(**given, **more, dtype=torch.float32)), (M, N)
        if form == 'int8': continue
        given['weight'] = unpack_int4(given['weight'])
        assert torch.equal(y, w8a8_reference(**given, **more, dtype=torch.float32))


def test_a_group_is_a_segment_that_shares_its_scale_of_x():
    for dual in (False, True):
        given = portable('int8', 9, 8, (70, 200), dual, 1, 64)
        pieces, segments = granule_columns(given['columns'], 64)
        assert pieces.ends == (64, 96, 160, 224, 288, 320) and segments == (0, 0, 1, 1, 1, 1)
        terms = [(1 + dual)*i + p for i in segments for p in range(1 + dual)]
        alike = given | dict(columns=pieces, group=None, scale_x=given['scale_x'][terms])
        y, size = in_float64(given)
        for form in (given, alike): assert ((w8a8_reference(**form, dtype=torch.float32) - y).abs() <= 2**-20*size).all()


def test_a_product_and_a_sum_are_rounded_once():
    rng = torch.Generator().manual_seed(0)
    a, b, c = ((torch.rand(3000, generator=rng) - .5)*10**(torch.rand(3000, generator=rng)*12 - 6) for _ in range(3))
    c[::3] = -(a*b)[::3]  # what is left is what the product lost
    for x, y, z, got in zip(*(t.tolist() for t in (a, b, c, gemm._multiply_add(a, b, c)))):
        exact = Fraction(x)*Fraction(y) + Fraction(z)
        low, high = (float(torch.nextafter(torch.tensor(got), torch.tensor(to))) for to in (-math.inf, math.inf))
        off = abs(exact - Fraction(got))
        assert all(off <= abs(exact - Fraction(other)) for other in (low, high))
    # halfway between two floats but for 2⁻⁷⁰, which float64 does not see
    a, b, c = (torch.tensor(v) for v in (2.**-12*(1 + 2**-23), 2.**-12*(1 - 2**-23), 1 + 2.**-23))
    assert (a.double()*b.double() + c).float() == 1 + 2**-22 and gemm._multiply_add(a, b, c) == 1 + 2**-23


@pytest.mark.parametrize('form, dual, sizes, group, rank, branch', [
    ('int8', False, (200,), None, 32, torch.bfloat16), ('int4', True, (70, 130), None, 40, torch.float16), ('int4', False, (200,), 64, 8, torch.bfloat16),
    ('e4m3', False, (200,), None, 0, None), ('e4m3', True, (70, 130), None, 0, None), ('e4m3', False, (70, 130), 64, 64, torch.float16)], ids=str)
def test_floats_within_a_bound(form, dual, sizes, group, rank, branch):
    for seed, (M, N) in enumerate([(33, 70), (5, 131)]):
        tile = _THIN if seed and dual else _SMALL
        given = portable(form, M, N, sizes, dual, seed, group, rank, branch)
        with emulated_gpu(seed, early_copies=seed == 1, capability=(8, 9)): y = w8a8_sm80(**given, dtype=torch.float32, tile=tile)
        exact, size = in_float64(given)
        for result in (y, w8a8_reference(**given, dtype=torch.float32)):
            assert ((result - exact).abs() <= 2**-20*size).all(), ((result - exact).abs()/size).max()


FLOATS = [('int8', (200,), None, 0, torch.bfloat16), ('int4', (64, 137), None, 24, torch.float16), ('int4', (300,), 96, 0, torch.bfloat16), ('int8', (32, 300), 64, 0, torch.float16)]


@pytest.mark.parametrize('form, sizes, group, rank, kind', FLOATS, ids=str)
def test_activations_of_16_bits(form, sizes, group, rank, kind):
    for seed, (M, N) in enumerate([(33, 70), (5, 9)]):
        given = portable(form, M, N, sizes, False, seed, group, rank, kind) | dict(scale_x=torch.ones(len(sizes), 1))
        given['codes'] = given['columns'].pack(torch.randn(M, sum(sizes))).to(kind)
        kept = {k: v for k, v in given.items() if k not in ('codes', 'scale_x', 'dual')}
        with emulated_gpu(seed, early_copies=seed == 1) as gpu:
            y = w8a16_sm80(given['codes'], **kept, dtype=torch.float32, tile=_SMALL)
            product = PortableLinear(Operands(*(given[k] for k in ('weight', 'scale_w', 'bias', 'columns')), group=group, up=kept['low_rank'][1] if rank else None), kind)
            assert torch.equal(product(given['codes'], None, kind, low=kept['low_rank'][0] if rank else None), w8a16_sm80(given['codes'], **kept))
            assert gpu.launches[1].options == gpu.launches[2].options
            for x, scale in ((given['codes'].float(), None), (given['codes'][:, :64].contiguous(), None), (given['codes'], torch.ones(1, 1))):
                with pytest.raises((TypeError, ValueError)): product(x, scale, low=kept['low_rank'][0] if rank else None)
        exact, size = in_float64(given)
        assert ((y - exact).abs() <= 2**-20*size).all(), ((y - exact).abs()/size).max()


def test_what_16_bits_do_not_go_with():
    given = portable('int8', 5, 9, (64,))
    with emulated_gpu() as gpu:
        with pytest.raises(TypeError, match='x is torch.float32: expected bfloat16 or float16'): w8a16_sm80(torch.ones(5, 64), given['weight'], given['scale_w'])
        with pytest.raises(ValueError, match='without dual scales'): PortableLinear(Operands(given['weight'], given['scale_w'], dual=True), torch.bfloat16)
        with pytest.raises(TypeError, match='expected bfloat16 or float16'): PortableLinear(Operands(given['weight'], given['scale_w']), torch.float32)
    assert not gpu.launches


@pytest.mark.parametrize('options', [dict(dtype='int4'), dict(quartz=16), dict(quartz=32)], ids=str)
def test_four_bit_activations_are_int8_codes_by_then(options):
    x, columns = activations(20, 140, torch.bfloat16, 1).nan_to_num(1., 1., 1.), PackedColumns((40, 100))
    given = portable('int4', 20, 33, (40, 100))
    with emulated_gpu():
        codes, scale, _ = quantize_cuda(x, columns, **options)
        y = w8a8_sm80(**given | dict(codes=codes, scale_x=scale), dtype=torch.float32, tile=_SMALL)
    assert torch.equal(y, w8a8_reference(**given | dict(codes=codes, scale_x=scale), dtype=torch.float32))
    assert codes.abs().max() <= (8 if 'dtype' in options else 127) and len(codes.unique()) > 10


def test_prepared_products():
    for seed, (form, dual, sizes, group, rank) in enumerate([('int8', False, (100,), None, 0), ('int4', True, (70, 33), 32, 0), ('int4', False, (64,), None, 16)]):
        given = portable(form, 20, 33, sizes, dual, seed, group, rank)
        low, up = given.get('low_rank', (None, None))
        more = dict(residual=torch.randn(20, 33).bfloat16(), gate=torch.randn(4, 33)) if seed == 1 else {}
        with emulated_gpu() as gpu:
            product = PortableLinear(Operands(*(given[k] for k in ('weight', 'scale_w', 'bias', 'columns', 'dual')), group=group, up=up))
            out = torch.empty(20, 33, dtype=torch.bfloat16)
            got = product(given['codes'], given['scale_x'], low=low, out=out, **more).clone()
            assert torch.equal(got, w8a8_sm80(**given, **more, out=out)) and gpu.launches[0] == gpu.launches[1]
            nothing = product(given['codes'][:0], given['scale_x'][:, :1].contiguous(), low=None if low is None else low[:0])
            assert nothing.shape == (0, 33) and len(gpu.launches) == 2
            wrong = [dict(codes=given['codes'].short()), dict(codes=given['codes'][:, :32].contiguous()), dict(codes=given['codes'][::2]), dict(scale_x=torch.ones(9, 20)),
                     dict(scale_x=given['scale_x'].half()), dict(dtype=torch.int8), dict(gate=torch.ones(1, 33)), dict(low=torch.ones(20, 5)),
                     dict(residual=torch.ones(20, 33)), dict(out=torch.ones(20, 33)), dict(residual=torch.ones(20, 33).bfloat16(), gate=torch.ones(3, 33))]
            for change in wrong:
                with pytest.raises((TypeError, ValueError)) as error: product(**dict(codes=given['codes'], scale_x=given['scale_x'], low=low) | change)
                assert str(error.value).endswith('.') and '\n' not in str(error.value), error.value
            assert len(gpu.launches) == 2


@pytest.mark.parametrize('change, said', [
    (dict(group=48), 'group=48: expected a multiple of 32'), (dict(group=0), 'group=0'), (dict(scale_w=torch.ones(5, 20)), r'scale_w has shape \(5, 20\): expected \(6, 20\)'),
    (dict(weight=torch.zeros(20, 64, dtype=torch.uint8)), 'weight has 128 columns, the segments'), (dict(weight=torch.zeros(20, 288)), 'weight is torch.float32: expected int8 or uint8 or float8_e4m3fn'),
    (dict(low_rank=(torch.ones(9, 4).half(), torch.ones(20, 4).half())), 'up has 4 columns, the rank .* multiple of 8'), (dict(low_rank=(torch.ones(9, 8).half(), torch.ones(20, 8).bfloat16())), 'low is torch.float16: expected bfloat16'),
    (dict(low_rank=(torch.ones(9, 8).half(), torch.ones(20, 16).half())), r'low has shape \(9, 8\): expected \(9, 16\)'), (dict(duals=(True,)), 'duals=.* one entry for each'),
    (dict(codes=torch.zeros(9, 320).to(torch.float8_e4m3fn)), 'codes is torch.float8_e4m3fn: expected int8'), (dict(out=torch.ones(9, 20)), 'out is torch.float32: expected bfloat16')], ids=lambda c: str(c)[:40])
def test_what_the_portable_kernel_refuses(change, said):
    given = portable('int4', 9, 20, (70, 200), False, 1, 64)
    with emulated_gpu() as gpu, pytest.raises((TypeError, ValueError), match=said) as error: w8a8_sm80(**given | change)
    assert str(error.value).endswith('.') and '\n' not in str(error.value) and not gpu.launches


def test_e4m3_wants_ada():
    given = portable('e4m3', 9, 20, (70,), False, 1)
    for capability in ((8, 0), (8, 6)):
        with emulated_gpu(capability=capability) as gpu, pytest.raises(ValueError, match=f'sm_8{capability[1]}.*8.9.*int8'): w8a8_sm80(**given)
    assert not gpu.launches
    for capability in ((8, 9), (9, 0), (12, 0)):
        with emulated_gpu(capability=capability, run=False) as gpu: w8a8_sm80(**given)
        assert len(gpu.launches) == 1


# Few kinds of kernels, which compile once; any shape.
SHAPES = dict(M=st.integers(1, 70), N=st.integers(1, 70), sizes=st.lists(st.integers(1, 140), min_size=1, max_size=4), seed=st.integers(0, 2**20))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@drawn(form=st.sampled_from(('int8', 'int4')), group=st.sampled_from((32, 64, 128)), rank=st.sampled_from((0, 0, 8, 72)), early=st.booleans(), **SHAPES)
def test_any_shape(M, N, sizes, form, group, rank, early, seed):
    if len(sizes) == 1: sizes = [*sizes, 5]
    given = portable(form, M, N, sizes, True, seed, group, rank)
    with emulated_gpu(seed, early_copies=early): y = w8a8_sm80(**given, dtype=torch.float32, tile=_SMALL)
    if not rank: assert torch.equal(y, w8a8_reference(**given, dtype=torch.float32))
    else:
        exact, size = in_float64(given)
        assert ((y - exact).abs() <= 2**-20*size).all()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@drawn(data=st.data(), **SHAPES)
def test_any_strides(M, N, sizes, seed, data):
    "A view of any kind is either multiplied rightly or refused"
    given = portable('int4', M + 1, N + 1, sizes[:1], False, seed, rank=16)
    low, up = given.pop('low_rank')
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)} | dict(low=low, up=up)
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(('transposed', 'every second', 'from a wider one', 'one element on', 'same')))
    x = tensors[name]
    if kind == 'transposed' and x.ndim == 2: x = x.t().contiguous().t()
    if kind == 'every second': x = x.repeat_interleave(2, 0)[::2]
    if kind == 'from a wider one' and x.ndim == 2: x = torch.cat([x, x], 1)[:, :x.shape[1]]
    if kind == 'one element on': x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    tensors[name] = x
    low, up = tensors.pop('low'), tensors.pop('up')
    plain = x.is_contiguous() and not x.data_ptr() % 16
    with emulated_gpu(seed) as gpu:
        try: y = w8a8_sm80(**given | tensors, low_rank=(low, up), dtype=torch.float32, tile=_SMALL)
        except ValueError as e: assert not plain and not gpu.launches and str(e).startswith(name[:5]), (name, kind, str(e))
        else:
            assert plain
            exact, size = in_float64(given | dict(low_rank=(low, up)))
            assert ((y - exact).abs() <= 2**-20*size).all()


def test_tiles_are_all_visited_once():
    given = layer(64*9 + 1, 130, (64,), False, 1)  # more than one band of eight rows of tiles
    with emulated_gpu(): y = w8a8_sm80(**given, dtype=torch.float32, tile=_SMALL)
    assert torch.equal(y, w8a8_reference(**given, dtype=torch.float32))


def test_the_largest_sum_fits():
    K = 131072 - 64
    given = dict(codes=torch.full((1, K), -128, dtype=torch.int8), weight=torch.full((1, K), -128, dtype=torch.int8), scale_x=torch.ones(1, 1), scale_w=torch.ones(1))
    with emulated_gpu():
        assert w8a8_sm80(**given, dtype=torch.float32).item() == float(K*128*128)
        given |= dict(codes=torch.zeros(1, 131072, dtype=torch.int8), weight=torch.zeros(1, 131072, dtype=torch.int8))
        with pytest.raises(ValueError, match='131072'): w8a8_sm80(**given)


@pytest.mark.parametrize('form', ['int8', 'int4'])
def test_the_largest_sums_of_a_group_fit(form):
    "256 products of the largest codes fill 22 bits, and int4 codes come times 16"
    for lowest_x in (-128, 127):
        given = portable(form, 2, 3, (512,), group=256)
        given['codes'].fill_(lowest_x)
        given['weight'].fill_(-128 if form == 'int8' else 0x88)
        given |= dict(scale_x=torch.ones(1, 1), scale_w=torch.ones(2, 3), bias=None)
        with emulated_gpu() as gpu: y = w8a8_sm80(**given, dtype=torch.float32, tile=_SMALL)
        assert '-DSHORT=1' in gpu.launches[0].options and (y == 512*lowest_x*(-128 if form == 'int8' else -8)).all()


def test_the_naive_kernel():
    for seed, dual in enumerate((False, True)):
        given = layer(9, 33, (40, 100, 6), dual, seed, segment_scales=dual)
        with emulated_gpu(): assert torch.equal(w8a8_naive(**given), w8a8_reference(**given, dtype=torch.float32))


def test_two_runs_are_equal_whatever_the_order_of_threads():
    x, columns = activations(9, 146, torch.bfloat16, 8), PackedColumns((40, 100, 6))
    runs = []
    for seed in range(3):
        with emulated_gpu(seed): runs.append(quantize_cuda(x, columns, dual=True))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


BREAKS = [  # source, what is broken, early copies or late ones
    ('mma/sm80_s8_gemm.cu', '        copies_wait<STAGES - 2>();', '', False),
    ('mma/sm80_s8_gemm.cu', 'copies_wait<STAGES - 2>', 'copies_wait<STAGES - 1>', False),
    ('mma/sm80_s8_gemm.cu', '        __syncthreads();', '', False),
    ('mma/sm80_s8_gemm.cu', '        __syncthreads();', '', True),
    ('mma/sm80_s8_gemm.cu', 'load_step(step + STAGES - 1);', 'load_step(step + STAGES);', True),
    ('mma/sm80_s8_gemm.cu', 'k * 2 + lane / 16', 'k * 2 + lane / 8 % 2', False),
    ('mma/sm80_s8_gemm.cu', 'sums.codes[p][m][n][half * 2 + i] = START;', '', False),
    ('mma/sm80_s8_gemm.cu', 'boundary = ends[++index];', 'boundary = ends[index++];', False),
    ('mma/sm80_s8_gemm.cu', 'segments[index] != segments[index + 1]', 'index < 0', False),
    ('mma/sm80_s8_gemm.cu', 'if (SEGMENTED == 3 && segments[index] != segments[index + 1])', 'if (SEGMENTED == 3)', False),
    ('mma/sm80_s8_gemm.cu', 'tables.segments ? tables.segments[index] : index', 'tables.segments ? 0 : index', False),
    ('mma/sm80_s8_gemm.cu', 'load_scales();\n            }', '}', False),
    ('mma/sm80_s8_gemm.cu', '0.0625f', '0.125f', False),
    ('mma/sm80_s8_gemm.cu', '(SHORT ? 0x4b400000 : 0)', '0', False),
    ('mma/sm80_s8_gemm.cu', 'lane % 2 * 8', '0', False),
    ('mma/int4.cuh', '0x7362', '0x5140', False),
    ('mma/sm80_s8_gemm.cu', '16 * k + 8 * j', '16 * k', False),
    ('mma/sm80_s8_gemm.cu', '(!ragged || at + chunk * 16 < end)', 'true', False),
    ('mma/sm80_s8_gemm.cu', 'LOW_RANK == 2', 'LOW_RANK == 1', False),
    ('mma/sm80_s8_gemm.cu', '    __syncthreads();\n    load_branch(0)', '    load_branch(0)', True),
    ('mma/sm80_s8_gemm.cu', '        }\n        __syncthreads();\n    }', '        }\n    }', True),
    ('mma/sm80_s8_gemm.cu', 'load_branch(step + 1);\n        copies_wait<1>()', 'load_branch(step + 1);\n        copies_wait<2>()', False),
]


@pytest.mark.parametrize('file, right, wrong, early', BREAKS, ids=[f'{b[0].split("/")[1]}-{i}' for i, b in enumerate(BREAKS)])
def test_a_broken_kernel_is_noticed(file, right, wrong, early, monkeypatch):
    sources = dict(cuda.cuda_sources())
    assert sources[file].count(right) >= 1
    sources[file] = sources[file].replace(right, wrong)
    monkeypatch.setattr(cuda, 'cuda_sources', lambda: sources)
    x, columns = (torch.arange(12000) - 6000).view(20, 600)/8*torch.linspace(3, .1, 20)[:, None], PackedColumns((300, 300))
    rank = 72 if any(word in right for word in ('ragged', 'RANK', 'branch', '    }')) else 0
    new = rank or 'int4' in file or any(word in right for word in ('index', 'granule', '0625', 'SHORT', '* 8', 'k + '))
    given = portable('int4', 65, 70, (200, 300), True, 1, 64, rank) if new else layer(65, 70, (200, 300), False, 1)
    want, differs = w8a8_reference(**given, dtype=torch.float32), False
    for seed in range(3):
        with emulated_gpu(seed, early_copies=early):
            try:
                if 'k + ' in right:
                    x, kept = given['codes'].bfloat16(), {k: given[k] for k in ('weight', 'scale_w', 'bias', 'columns', 'group')}
                    ones = given | dict(codes=x, dual=False, scale_x=torch.ones(2, 1))
                    differs |= not torch.allclose(w8a16_sm80(x, **kept, dtype=torch.float32, tile=_SMALL), w8a8_reference(**ones, dtype=torch.float32), 0, .01)
                elif file.startswith('mma'): differs |= not torch.allclose(w8a8_sm80(**given, dtype=torch.float32, tile=_SMALL), want, 0, 0.01 if rank else 0)
                else: differs |= not same(quantize_cuda(x, columns), quantize_reference(x, columns))
            except RuntimeError as e:
                differs |= 'copies' in str(e) or 'stuck' in str(e) or 'different operations' in str(e)
    assert differs


def test_threads_that_part_before_a_barrier_are_an_error(monkeypatch):
    source = '#include "common/device.cuh"\nextern "C" __global__ void f(uint8* out) { if (threadIdx.x < 3) return; __syncthreads(); if (threadIdx.x > 40) __syncwarp(); }'
    monkeypatch.setattr(cuda, 'cuda_sources', lambda s=cuda.cuda_sources(): s | {'f.cu': source})
    with emulated_gpu(), pytest.raises(RuntimeError, match='stuck'):
        cuda.launch(cuda.get_kernel('f.cu', 'f', torch.device('cpu')), (1,), (64,), torch.zeros(4, dtype=torch.uint8))


def test_arguments_of_the_wrong_size_are_an_error():
    with emulated_gpu(), pytest.raises(AssertionError, match='arguments of'):
        packed = torch.zeros(4, 16, dtype=torch.uint8)
        cuda.launch(cuda.get_kernel('quantize/sm80_unpack_int4.cu', 'unpack_int4', torch.device('cpu')), (1,), (32,), packed, packed, 8)


INSIDE = '''
from segquant_nb.codes import PackedColumns, quantize_cuda, quantize_reference
from segquant_nb.gemm import _SMALL, w8a8_reference, w8a8_sm80
for before in (False, True):
    torch.empty = lambda *a, **k: guarded(*a, before=before, **k)
    for rows, sizes in ((5, (40, 104)), (3, (33, 70)), (9, (64,))):
        columns = PackedColumns(sizes)
        for dtype in (torch.bfloat16, torch.float32):
            x = moved(torch.randn(rows, columns.columns).to(dtype), before)
            smooth = moved(torch.rand(columns.width), before)
            with emulated_gpu(): got = quantize_cuda(x, columns, dual=True, smooth=smooth)
            assert torch.equal(got.codes, quantize_reference(x, columns, dual=True, smooth=smooth).codes)
    g = torch.Generator().manual_seed(0)
    for M, N in ((3, 5), (65, 70)):
        columns = PackedColumns((64, 70))
        codes = lambda rows: columns.pack(torch.randint(-128, 128, (rows, 134), dtype=torch.int8, generator=g))
        given = [moved(t, before) for t in (codes(M), codes(N), torch.rand(4, M), torch.rand(N), torch.randn(N))]
        more = dict(residual=moved(torch.randn(M, N).bfloat16(), before), gate=moved(torch.randn(1, N), before))
        with emulated_gpu(): y = w8a8_sm80(*given, columns, True, **more, tile=_SMALL)
        assert torch.equal(y, w8a8_reference(*given, columns, True, **more))
        given[1] = moved(torch.randint(0, 256, (N, 96), dtype=torch.uint8, generator=g), before)
        given[3] = moved(torch.rand(5, N), before)
        more = dict(group=32, low_rank=tuple(moved(torch.randn(rows, 40).half(), before) for rows in (M, N)), dtype=torch.float32)
        with emulated_gpu(): y = w8a8_sm80(*given, columns, True, **more, tile=_SMALL)
        assert torch.allclose(y, w8a8_reference(*given, columns, True, **more), 0, 1)
'''


def test_nothing_is_touched_outside_of_the_tensors():
    wall = '''
x = moved(torch.zeros(4, 16, dtype=torch.uint8), False)
import numpy as np, segquant_nb.cuda as cuda
with emulated_gpu():
    cuda.launch(cuda.get_kernel('quantize/sm80_unpack_int4.cu', 'unpack_int4', torch.device('cpu')), (1,), (32,), x, x.new_zeros(4, 64), np.int64(9))
'''
    assert in_guarded_memory(INSIDE, wall).returncode == -signal.SIGSEGV
