"""The kernels themselves, run on an emulated GPU and held to PyTorch bit for bit: ragged shapes, odd segments, strides, accidents.

That the emulation would notice is tested too, by breaking the sources.
"""
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulate import COMPILER, emulated_gpu

import segquant_nb.cuda as cuda
from segquant_nb.codes import PackedColumns, quantize_cuda, quantize_reference
from segquant_nb.formats import pack_int4, unpack_int4
from segquant_nb.gemm import _MIDDLE, _SMALL, _THIN, w8a8_naive, w8a8_reference, w8a8_sm80

pytestmark = pytest.mark.skipif(COMPILER is None and 'CI' not in os.environ, reason='no C++ compiler on this machine (c++, g++ or clang++)')


@pytest.fixture(autouse=True)
def poisoned_results():
    "What a kernel does not write is NaN, or the largest integer"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def activations(rows, columns, dtype, seed):
    "Values over six decades, with ties, zeros, rows of zeros, NaN and infinities"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)*10**(torch.rand(rows, 1, generator=g)*6 - 3)
    x[torch.rand(rows, columns, generator=g) < .02] = 0
    for value in (torch.nan, torch.inf, -torch.inf): x[torch.rand(rows, columns, generator=g) < .003] = value
    if rows > 2: x[1], x[2] = 0, (torch.arange(columns) - columns//2)/2
    if rows > 3: x[3] = torch.linspace(-1, 1, columns)*1e-41  # subnormal
    return x.to(dtype)


def same(a, b):
    return all(x is y or x.dtype == y.dtype and torch.equal(x.float().nan_to_num(999), y.float().nan_to_num(999)) for x, y in zip(a, b))


OPTIONS = [dict(), dict(dual=True), dict(dtype='int4', dual=True), dict(dtype='int4', packed=True), dict(dtype='fp8e4m3', dual=True),
           dict(quartz=16), dict(quartz=32, packed=True)]


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
    ('mma/sm80_s8_gemm.cu', 'step + STAGES - 1;', 'step + STAGES;', True),
    ('mma/sm80_s8_gemm.cu', 'k * 2 + lane / 16', 'k * 2 + lane / 8 % 2', False),
    ('mma/sm80_s8_gemm.cu', 'sums.integer[p][m][n][at] = 0;', '', False),
    ('quantize/sm80_codes.cu', 'most[i] = 0;\n    __syncthreads();', 'most[i] = 0;', False),
    ('quantize/sm80_codes.cu', '    __syncthreads();\n    return most;', '    return most;', False),
    ('common/numbers.cuh', 'doubtful |= !(fmaf', 'bool ignored = !(fmaf', False)]


@pytest.mark.parametrize('file, right, wrong, early', BREAKS, ids=[f'{b[0].split("/")[1]}-{i}' for i, b in enumerate(BREAKS)])
def test_a_broken_kernel_is_noticed(file, right, wrong, early, monkeypatch):
    sources = dict(cuda.cuda_sources())
    assert sources[file].count(right) >= 1
    sources[file] = sources[file].replace(right, wrong)
    monkeypatch.setattr(cuda, 'cuda_sources', lambda: sources)
    x, columns = (torch.arange(12000) - 6000).view(20, 600)/8*torch.linspace(3, .1, 20)[:, None], PackedColumns((300, 300))
    given = layer(65, 70, (200, 300), False, 1)
    differs = False
    for seed in range(3):
        with emulated_gpu(seed, early_copies=early):
            try:
                if file.startswith('mma'): differs |= not torch.equal(w8a8_sm80(**given, dtype=torch.float32, tile=_SMALL), w8a8_reference(**given, dtype=torch.float32))
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


GUARDED = '''
import ctypes, mmap, sys
sys.path.insert(0, {tests!r})
import torch
from emulate import emulated_gpu
from segquant_nb.codes import PackedColumns, quantize_cuda, quantize_reference
from segquant_nb.gemm import _SMALL, w8a8_reference, w8a8_sm80
libc, page, kept, empty = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, [], torch.empty
libc.mmap.restype = ctypes.c_void_p

def guarded(*shape, dtype=torch.float32, device=None, before=False):
    "An empty tensor that ends where a page begins that nobody may touch, or starts where one ends"
    like = empty(*shape, dtype=dtype, device='meta')
    size = like.numel()*like.element_size()
    room = -(-size//page)*page
    base = libc.mmap(None, ctypes.c_size_t(room + 2*page), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))
    for wall in (base, base + page + room): assert not libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0)
    at = base + page if before else base + page + (room - size)//16*16
    kept.append((ctypes.c_char*size).from_address(at))
    return torch.frombuffer(kept[-1], dtype=dtype).view(like.shape) if size else like

def moved(x, before): return guarded(*x.shape, dtype=x.dtype, before=before).copy_(x)

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
{outside}
print('inside')
'''


@pytest.mark.parametrize('outside', [False, True])
def test_nothing_is_touched_outside_of_the_tensors(outside):
    "Tensors that end at a forbidden page, in a process that would not survive it"
    wall = '''
x = moved(torch.zeros(4, 16, dtype=torch.uint8), False)
import numpy as np, segquant_nb.cuda as cuda
with emulated_gpu():
    cuda.launch(cuda.get_kernel('quantize/sm80_unpack_int4.cu', 'unpack_int4', torch.device('cpu')), (1,), (32,), x, x.new_zeros(4, 64), np.int64(9))
'''
    script = GUARDED.format(tests=str(Path(__file__).parent), outside=wall if outside else '')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if outside: assert done.returncode == -signal.SIGSEGV and 'inside' not in done.stdout, done
    else: assert not done.returncode and 'inside' in done.stdout, done.stderr
