"""Kernels for a few rows, run on an emulated GPU and held to PyTorch: ragged shapes, spans of odd sizes, accidents, faults."""
import ctypes
import os
import random
import signal
import struct
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emulate import COMPILER, emulated_gpu
from emulate.cases import activations
from emulate.guarded import in_guarded_memory

import segquant_nb.cuda as cuda
import segquant_nb.small as small
from segquant_nb.codes import Codes, PackedColumns, quantize_reference
from segquant_nb.formats import pack_int4
from segquant_nb.gemm import granule_columns
from segquant_nb.small import _int8_block, small_block, small_reason, w8a16_reference, w8a16_small, w8a8_small, w8a8_small_reference

pytestmark = pytest.mark.skipif(COMPILER is None and 'CI' not in os.environ, reason='no C++ compiler on this machine (c++, g++ or clang++)')


def weights(N, columns, bits=8, group=None, per_span=False, seed=0):
    "A packed weight and its scales"
    g, highest = torch.Generator().manual_seed(seed), 2**(bits - 1) - 1
    codes = columns.pack(torch.randint(-highest - 1, highest + 1, (N, columns.columns), generator=g, dtype=torch.int8))
    spans = len(granule_columns(columns, group)[1])
    scale = torch.rand(*((spans, N) if group or per_span else (N,)), generator=g)*.1/highest
    return pack_int4(codes) if bits == 4 else codes, scale


def same(a, b): return a.dtype == b.dtype and torch.equal(a.float().nan_to_num(9e9), b.float().nan_to_num(9e9))


@pytest.mark.parametrize('seed', range(14))
def test_layers(seed):
    "Every option with every other one, by chance"
    pick = random.Random(seed)
    sizes = [pick.choice((1, 31, 32, 64, 100, 257, 700)) for _ in range((1, 2, 3, 9)[seed % 4])]
    columns, M, N, dual = PackedColumns(sizes), pick.choice((1, 2, 3, 5, 8, 9, 16)), pick.choice((1, 7, 16, 33, 50)), pick.random() < .5
    dtype, kind = (torch.bfloat16, torch.float16, torch.float32)[seed % 3], ('int8', 'int8', 'int4')[seed//2 % 3]
    duals = tuple(pick.random() < .5 for _ in sizes) if dual and pick.random() < .6 else None
    rows = pick.choice((None, 1, M))  # static scales: none, for all rows, for each
    scale = None if rows is None else torch.rand(len(sizes)*(1 + dual), rows)*.1 + .01
    smooth = columns.pack(torch.rand(1, columns.columns) + .5)[0] if seed % 3 == 1 else None
    group = pick.choice((None, None, 32, 128))
    weight, scale_w = weights(N, columns, (8, 4)[seed % 2], group, seed % 5 == 0, seed)
    x = activations(M, columns.columns, dtype, seed)
    options = dict(bias=torch.randn(N) if seed % 2 else None, columns=columns, dual=dual, duals=duals, group=group, dtype=(None, torch.float32)[seed//3 % 2])
    if seed % 5 == 1: options |= dict(residual=torch.randn(M, N).to(options['dtype'] or dtype), gate=torch.randn(1, N))
    if seed % 4 == 3: x = quantize_reference(x, columns, kind, scale, dual, smooth, duals=duals)
    else: options |= dict(scale=scale, smooth=smooth, codes=kind)
    want = w8a8_small_reference(x, weight, scale_w, **options)
    for early in (False, True):
        with emulated_gpu(seed, early_copies=early, processors=2) as gpu: y = w8a8_small(x, weight, scale_w, **options)
        assert same(y, want) and len(gpu.launches) == 2, (M, N, sizes, options)


@pytest.mark.parametrize('M', (1, 7, 8, 9, 16))
def test_rows(M):
    columns = PackedColumns((130,))
    weight, scale_w = weights(20, columns)
    x = activations(M, 130, torch.bfloat16, M)
    with emulated_gpu(processors=1): y = w8a8_small(x, weight, scale_w, columns=columns, dual=True)
    assert same(y, w8a8_small_reference(x, weight, scale_w, columns=columns, dual=True))


def test_rows_that_lie_apart_or_start_anywhere():
    columns, whole = PackedColumns((128,)), activations(6, 3*128, torch.bfloat16, 6)
    weight, scale_w = weights(10, columns)
    fast = []
    for part in (*whole.chunk(3, 1), whole[:, 3:131], whole[::2, :128], whole.view(2, 3, 384)[..., 128:256]):
        with emulated_gpu(processors=2) as gpu: y = w8a8_small(part, weight, scale_w)
        fast.append('-DALIGNED=1' in gpu.launches[0].options)
        assert same(y, w8a8_small_reference(part, weight, scale_w))
        x = part.nan_to_num(0, 0, 0)
        with emulated_gpu(processors=2): y = w8a16_small(x, weight, scale_w, dtype=torch.float32)
        assert same(y.half(), (x.reshape(-1, 128).double() @ weight.double().T*scale_w).float().half())
    assert fast == [True, True, True, False, True, True]


@pytest.mark.parametrize('seed', range(8))
def test_layers_with_16_bit_inputs(seed):
    pick = random.Random(seed)
    columns = PackedColumns([pick.choice((1, 31, 64, 100, 257, 700)) for _ in range((1, 3)[seed//2 % 2])])
    M, N, group, silu, dtype = pick.choice((1, 3, 8, 11, 16)), pick.choice((1, 16, 33, 50)), (None, 32, 64, 128)[seed % 4], seed % 3 == 0, (torch.bfloat16, torch.float16)[seed//4]
    weight, scale_w = weights(N, columns, (8, 4)[seed % 2], group, True, seed)
    if group is None and len(columns.sizes) == 1: scale_w = scale_w[0].contiguous()
    x, bias = torch.randn(M, columns.columns).to(dtype), torch.randn(N)
    exact, magnitude = w8a16_reference(x, weight, scale_w, bias, columns, silu=silu, group=group)
    with emulated_gpu(seed, early_copies=seed % 2 > 0, processors=2): y = w8a16_small(x, weight, scale_w, bias, columns, torch.float32, silu=silu, group=group)
    assert ((y - exact).abs() <= 4*2**-24*magnitude).all()
    with emulated_gpu(seed, processors=2): z = w8a16_small(x, weight, scale_w, bias, columns, silu=silu, group=group)
    assert torch.equal(z, y.to(dtype))


def test_every_code_becomes_its_number():
    for dtype in (torch.bfloat16, torch.float16):
        for bits in (8, 4):
            codes = (torch.arange(4096)*7 % 2**bits - 2**(bits - 1)).to(torch.int8).view(64, 64)
            assert len(codes.unique()) == 2**bits
            weight = pack_int4(codes) if bits == 4 else codes
            for rows in torch.eye(64, dtype=dtype).split(16):
                with emulated_gpu(processors=1): y = w8a16_small(rows, weight, torch.ones(64), dtype=torch.float32)
                assert torch.equal(y, (rows.float() @ codes.float().T))


def test_silu_in_the_launch_is_silu_before_it():
    columns = PackedColumns((100, 28))
    weight, scale_w = weights(9, columns)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(3, 128).to(dtype)*8
        for dual in (False, True):
            with emulated_gpu(processors=1): y = w8a8_small(x, weight, scale_w, columns=columns, dual=dual, silu=True)
            assert same(y, w8a8_small_reference(F.silu(x.float()).to(dtype), weight, scale_w, columns=columns, dual=dual))


def test_scales_at_the_ends_of_float32():
    columns = PackedColumns((64,))
    weight, scale_w = weights(5, columns)
    x = activations(6, 64, torch.float32, 5)
    for size in (1.2e-38, 1e-35, 1e-19, 1e-18, 1e18, 1e19, 1e30, 3e38):
        x[0] = torch.linspace(-200, 200, 64)*size
        given = dict(x=x, weight=weight, scale_w=scale_w/size, scale=torch.tensor([[size]]))
        with emulated_gpu(processors=1): assert same(w8a8_small(**given), w8a8_small_reference(**given)), size


def test_all_calls_of_a_kernel_ask_for_the_same_room():
    "CuPy hands out one function for one file of machine code: the last one to set its limit sets it for all"
    columns, asked = PackedColumns((3072,)), set()
    weight, scale_w = weights(40, columns)
    with emulated_gpu(run=False, capability=(9, 0)) as gpu, mock.patch.object(small, 'get_kernel', lambda *a, **k: asked.update(a[3:]) or cuda.get_kernel(*a, **k)):
        for M in (9, 16):
            for dual in (False, True): w8a8_small(torch.randn(M, 3072).bfloat16(), weight, scale_w, dual=dual)
            w8a16_small(torch.randn(M, 3072).bfloat16(), weight, scale_w)
    assert asked == {227*1024} and len({launch.shared for launch in gpu.launches}) > 2


def test_a_nan_stays_in_its_row():
    columns = PackedColumns((200,))
    weight, scale_w = weights(20, columns, 4, group=64)
    x = torch.randn(3, 200).bfloat16()
    x[1, 77] = torch.nan
    with emulated_gpu(processors=1): y = w8a16_small(x, weight, scale_w, columns=columns, group=64)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_scales_that_do_not_fit_are_fetched_again():
    "More rows in a block than have room for their scales"
    columns = PackedColumns((32,)*200)
    weight, scale_w = weights(100, columns, per_span=True)
    x = torch.randn(2, 6400).bfloat16()
    with emulated_gpu(processors=1): y = w8a8_small(x, weight, scale_w, columns=columns)
    assert same(y, w8a8_small_reference(x, weight, scale_w, columns=columns))
    with emulated_gpu(processors=1): y = w8a16_small(x, weight, scale_w, columns=columns, dtype=torch.float32)
    exact, magnitude = w8a16_reference(x, weight, scale_w, columns=columns)
    assert ((y - exact).abs() <= 4*2**-24*magnitude).all()


def test_rows_are_shared_out_where_they_do_not_fit():
    columns = PackedColumns((10240,))
    weight, scale_w = weights(5, columns)
    x = torch.randn(16, 10240).bfloat16()
    with emulated_gpu(processors=1, capability=(8, 9)) as gpu: y = w8a8_small(x, weight, scale_w)
    assert gpu.launches[1].grid[1] == 4 and gpu.launches[1].shared <= 99*1024
    assert same(y, w8a8_small_reference(x, weight, scale_w))


def test_the_largest_sum_fits():
    for bits, code in ((8, -128), (4, -8)):
        weight = torch.full((1, 32768), code, dtype=torch.int8)
        given = Codes(torch.full((1, 32768), -128, dtype=torch.int8), torch.ones(1, 1))
        with emulated_gpu(processors=1): y = w8a8_small(given, pack_int4(weight) if bits == 4 else weight, torch.ones(1), dtype=torch.float32)
        assert y.item() == 32768*128*-code


def test_two_runs_are_equal_whatever_the_order_of_threads():
    columns = PackedColumns((300,))
    weight, scale_w = weights(40, columns, 4)
    x, runs = torch.randn(9, 300).bfloat16(), []
    for seed in range(3):
        with emulated_gpu(seed, processors=2): runs.append((w8a8_small(x, weight, scale_w, columns=columns, dual=True), w8a16_small(x, weight, scale_w, columns=columns, dtype=torch.float32)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


# ---- around the kernel ----

def test_every_block_fits_its_gpu():
    for arch, room in (('sm_80', 163), ('sm_89', 99), ('sm_90a', 227), ('sm_120', 99)):
        for M in range(1, 17):
            for width in (64, 3072, 15360, 32768):
                for segments, spans, paths in ((1, 1, 1), (2, 2, 2), (24, 24, 1), (1, min(width//128, 60), 1)):
                    for N in (1, 1000, 18432, 100000):
                        grid, block = _int8_block(M, N, width, 8, segments*paths, spans, spans, paths, arch, 108)
                        assert 1 <= block.tokens <= M and block.made % 16 == 0 and block.shared <= 1024*room and block.stages >= 3
                        assert block.rows % 32 == 0 < block.rows and grid <= 108
    assert small_block(1, 32, 8, 'sm_89', token=99*1024, row=4, sums=lambda tokens: 4) is None


def test_what_the_kernels_do_not_take():
    assert not small_reason(16, 32768) and not small_reason(1, 16384, floating=True)
    assert small_reason(17, 64) == '17 rows: expected 1 to 16'
    many = PackedColumns((32,)*500)
    with emulated_gpu(run=False), pytest.raises(ValueError, match='500 spans'): w8a8_small(torch.randn(1, 16000), torch.zeros(4, 16000, dtype=torch.int8), torch.ones(500, 4), columns=many, dual=True)
    assert '16384' in small_reason(1, 16448, floating=True)
    assert not small_reason(16, 3072, spans=96, dual=True, arch='sm_89') and not small_reason(16, 3072, True, 96, arch='sm_89')
    assert '500 spans' in small_reason(1, 16000, spans=500, dual=True) and 'sm_89' in small_reason(1, 16000, True, 500, arch='sm_89')
    columns = PackedColumns((64,))
    weight, scale_w = weights(4, columns)
    with emulated_gpu(run=False) as gpu:
        assert w8a8_small(torch.randn(0, 64), weight, scale_w).shape == (0, 4)
        assert w8a16_small(torch.randn(2, 64).half(), weight[:0], scale_w[:0]).shape == (2, 0)
        with pytest.raises(ValueError, match='32832 packed columns'): w8a8_small(torch.randn(1, 32832), torch.zeros(4, 32832, dtype=torch.int8), scale_w)
    assert not gpu.launches


def test_a_refused_call_launches_nothing():
    columns = PackedColumns((100, 28))
    weight, scale_w = weights(6, columns)
    given = dict(x=torch.randn(3, 128).bfloat16(), weight=weight, scale_w=scale_w, columns=columns)
    wrong = [dict(x=[1]), dict(x=given['x'].int()), dict(x=given['x'][:, :100]), dict(x=given['x'].to('meta')), dict(weight=weight.float()), dict(weight=weight[:, :64].contiguous()),
             dict(weight=weight.T), dict(weight=weight.flatten()[1:1 + 5*192].view(5, 192)), dict(scale_w=scale_w.half()), dict(scale_w=torch.ones(3, 6)), dict(bias=torch.ones(5)),
             dict(columns=PackedColumns((128,))), dict(group=33), dict(group=16), dict(dtype=torch.int8), dict(residual=torch.ones(3, 6)), dict(gate=torch.ones(1, 6))]
    only8 = [dict(scale=torch.ones(1, 1)), dict(scale=torch.ones(2, 2)), dict(smooth=torch.ones(128)), dict(duals=(True,)), dict(codes='fp8e4m3'), dict(x=torch.randn(17, 128)),
             dict(x=Codes(torch.zeros(3, 128, dtype=torch.int8), torch.ones(2, 3))), dict(x=Codes(torch.zeros(3, 192, dtype=torch.int8), torch.ones(2, 3)), smooth=torch.ones(192))]
    with emulated_gpu() as gpu:
        for layer, changes in ((w8a8_small, wrong + only8), (w8a16_small, [*wrong, dict(x=torch.randn(3, 128))])):
            for change in changes:
                with pytest.raises((TypeError, ValueError)) as error: layer(**{**given, **change})
                assert str(error.value).endswith('.') and '\n' not in str(error.value), change
    assert not gpu.launches


def test_a_launch_names_its_options_and_sizes():
    columns = PackedColumns((3072,))
    weight, scale_w = weights(18432, columns)
    with emulated_gpu(run=False, capability=(9, 0), processors=132) as gpu: w8a8_small(torch.randn(1, 3072).bfloat16(), weight, scale_w, dual=True)
    before, launch = gpu.launches
    assert launch.function == 's8_gemv' and launch.grid[0] == 132 and max(launch.grid[1:], default=1) == 1 and {'-DDUAL=1', '-DSPANS=0', '-DTILES=1', '-DOVERLAP=1'} <= set(launch.options)
    assert [int(a) for a in launch.arguments if isinstance(a, np.int32)][-5:] == [3072, 139, 84, 1, 1]  # width, rows of a block, blocks with one more, tokens of a block, rows of a gate
    assert before.function == 'rows_codes' and before.grid == (1,) and {'-DOVERLAP=1', '-DALIGNED=1', '-DHELD=1'} <= set(before.options)


def test_only_the_product_starts_early_and_on_hopper_only():
    columns = PackedColumns((64,))
    weight, scale_w = weights(8, columns)
    for capability, counts in (((9, 0), [0, 1]), ((8, 0), [0, 0]), ((12, 0), [0, 0])):
        for layer in (w8a8_small, w8a16_small):
            made, launcher = [], cuda._launcher
            with emulated_gpu(capability=capability), mock.patch.object(cuda, '_launcher', lambda *a: made.append(launcher(*a)) or made[-1]):
                layer(torch.randn(1, 64).bfloat16(), weight, scale_w)
            assert [launcher.attributes[1] for launcher in made] == counts
            for address, count in (launcher.attributes for launcher in made):
                if count: assert struct.unpack('=I4xI60x', ctypes.string_at(address, 72)) == (6, 1)  # CUlaunchAttribute


# ---- would it be noticed? ----

BREAKS = [  # source, what is broken, early copies or late ones
    ('gemv/stream.cuh', 'copies_wait<STAGES - 2>();', '', False),
    ('gemv/stream.cuh', 'copies_wait<STAGES - 2>', 'copies_wait<STAGES - 1>', False),
    ('gemv/stream.cuh', 'loader.place + 1 == STAGES ? 0 : loader.place + 1;', 'loader.place;', True),
    ('gemv/stream.cuh', 'l.piece -= l.at.pieces;', 'l.piece = 0;', False),
    ('gemv/stream.cuh', 'column >= l.at.start && column < l.at.end ? l.last : 0', 'l.last', False),
    ('gemv/sm80_s8_gemv.cu', '        __syncthreads();\n        for_results', '        for_results', False),
    ('gemv/sm80_s8_gemv.cu', 'made_bytes);\n    __syncthreads();', 'made_bytes);', False),
    ('gemv/sm80_s8_gemv.cu', 'atomicAdd(to + place + column * pitch + i / 2 * 8, sums.of[n][i / 4][i % 4])', 'to[place + column * pitch + i / 2 * 8] = sums.of[n][i / 4][i % 4]', False),
    ('gemv/sm80_s8_rows.cu', '    __syncthreads();\n#endif\n#endif', '#endif\n#endif', False),
    ('gemv/sm80_s8_rows.cu', '    q = fmaf(fmaf(-q, by.scale, x), by.reciprocal, q);\n    return fmaf(fmaf(-q, by.scale, x), by.reciprocal, q);', '    return q;', False)]


@pytest.mark.parametrize('file, right, wrong, early', BREAKS, ids=range(len(BREAKS)))
def test_a_broken_kernel_is_noticed(file, right, wrong, early, monkeypatch):
    sources = dict(cuda.cuda_sources())
    assert sources[file].count(right) >= 1
    sources[file] = sources[file].replace(right, wrong)
    monkeypatch.setattr(cuda, 'cuda_sources', lambda: sources)
    columns = PackedColumns((32, 944))  # a boundary inside of a piece
    weight, scale_w = weights(70, columns)
    x = (torch.arange(976*5).view(5, 976) - 2000)/8*torch.linspace(3, .1, 5)[:, None]
    x[0], x[0, 200] = 0, 127*.3
    x[0, :200] = (torch.arange(200) - 99.5)*(x[0, 200]/127)  # next to ties
    want, differs = w8a8_small_reference(x, weight, scale_w, columns=columns, dtype=torch.float32), False
    for seed in range(4):
        with emulated_gpu(seed, early_copies=early, processors=1):
            try: differs |= not torch.equal(w8a8_small(x, weight, scale_w, columns=columns, dtype=torch.float32), want)
            except RuntimeError as e: differs |= any(word in str(e) for word in ('copies', 'stuck', 'different operations', 'aligned'))
    assert differs


INSIDE = '''
from segquant_nb.codes import PackedColumns
from segquant_nb.formats import pack_int4
from segquant_nb.small import w8a16_small, w8a8_small, w8a8_small_reference
for before in (False, True):
    torch.empty = lambda *a, **k: guarded(*a, before=before, **k)
    g = torch.Generator().manual_seed(0)
    for M, N, sizes, bits in ((3, 5, (40, 104), 8), (16, 35, (33, 70), 4), (1, 18, (64,), 4), (2, 33, (600,), 8)):
        columns = PackedColumns(sizes)
        codes = columns.pack(torch.randint(-8, 8, (N, columns.columns), dtype=torch.int8, generator=g))
        weight = moved(pack_int4(codes) if bits == 4 else codes, before)
        x, scale_w, bias = (moved(t, before) for t in (torch.randn(M, columns.columns).bfloat16(), torch.rand(len(sizes), N), torch.randn(N)))
        smooth, residual = moved(torch.rand(columns.width), before), moved(torch.randn(M, N).bfloat16(), before)
        with emulated_gpu(processors=2): y = w8a8_small(x, weight, scale_w, bias, columns, True, smooth=smooth, residual=residual)
        assert torch.equal(y, w8a8_small_reference(x, weight, scale_w, bias, columns, True, smooth=smooth, residual=residual))
        with emulated_gpu(processors=2): w8a16_small(x, weight, scale_w, bias, columns)
'''


def test_nothing_is_touched_outside_of_the_tensors():
    call = """
w = moved(torch.zeros(4, 64, dtype=torch.int8), False)
with emulated_gpu(): w8a8_small(moved(torch.randn(3, 64), False)[:, :60], w[:, :60], torch.ones(4))
"""
    done = in_guarded_memory(INSIDE, call)
    assert done.returncode != -signal.SIGSEGV and 'expected' in done.stderr, done
