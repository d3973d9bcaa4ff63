"""The Hopper product without a Hopper: its layouts compiled for the host, its launches recorded, its registers counted."""
import ctypes
import random
import shutil
import struct
import subprocess
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from emulate import emulated_gpu
from hopper import defines, host_library, random_sizes, recorded_maps

import segquant_nb.hopper_gemm as hopper_gemm
from segquant_nb.codes import PackedColumns
from segquant_nb.cuda import cuda_src_dir, kernel_cost
from segquant_nb.hopper_gemm import HopperLinear, HopperTile, fp8_sm90, hopper_tiles, pick_hopper_tile, w8a8_sm90

NVCC = shutil.which('nvcc')

SOURCE = '''
#include "wgmma/layout.cuh"
extern "C" unsigned swizzle(unsigned row, unsigned chunk) { return swizzled(row, chunk); }
extern "C" unsigned long long describe(unsigned address) { return swizzled_rows(address); }
extern "C" void tiles(int tiles_m, int tiles_n, int band, int* out) {
    for (int i = 0; i < tiles_m * tiles_n; ++i) {
        Tile tile = tile_at(i, tiles_m, tiles_n, band);
        out[2 * i] = tile.m, out[2 * i + 1] = tile.n;
    }
}
extern "C" void places(int tiles_m, int tiles_n, int band, int halves, int rows, int columns, int N, int* out) {
    for (int i = 0; i < tiles_m * tiles_n + (halves > 0 ? halves : 0); ++i) {
        Place tile = place_at(i, tiles_m, tiles_n, band, halves, rows, columns, N);
        out[3 * i] = tile.row, out[3 * i + 1] = tile.column, out[3 * i + 2] = tile.columns;
    }
}
'''


@pytest.fixture(scope='module')
def layout(tmp_path_factory):
    library = host_library(tmp_path_factory.mktemp('layout'), SOURCE)
    library.describe.restype = ctypes.c_ulonglong
    return library


def test_swizzle_is_a_permutation_without_bank_conflicts(layout):
    places = [[layout.swizzle(row, chunk) for chunk in range(8)] for row in range(32)]
    assert sorted(sum(places, [])) == list(range(0, 32*128, 16))
    for chunk in range(8):
        for first in range(0, 32, 8):
            assert len({places[first + r][chunk]//16 % 8 for r in range(8)}) == 8
    assert places[3][5] == 3*128 + (5 ^ 3)*16


def test_descriptor_has_address_stride_and_swizzle(layout):
    for address in (0, 1024, 1024 + 96, 230400):
        word = layout.describe(address)
        assert word & 0x3fff == address//16 and word >> 32 & 0x3fff == 1024//16 and word >> 62 == 1
        assert word & ~(0x3fff | 0x3fff << 32 | 3 << 62) == 0


def test_bands_visit_every_tile_once(layout):
    rng = random.Random(0)
    for _ in range(200):
        m, n, band = rng.randint(1, 40), rng.randint(1, 40), rng.randint(1, 20)
        out = (ctypes.c_int*(2*m*n))()
        layout.tiles(m, n, band, out)
        tiles = list(zip(out[::2], out[1::2]))
        assert sorted(tiles) == [(i, j) for i in range(m) for j in range(n)]
        assert [i//band for i, _ in tiles] == sorted(i//band for i, _ in tiles)
        assert tiles[:min(m, band)] == [(i, 0) for i in range(min(m, band))]


def test_tiles_and_halves_of_tiles_cover_every_column_once(layout):
    rng, cut = random.Random(0), 0
    for _ in range(300):
        tile = HopperTile(rng.choice((64, 128, 192, 256)), rng.choice((1, 2, 3)))
        M, N, processors = rng.randint(1, 3000), rng.randint(1, 300)*8, rng.randint(1, 132)
        m, n, halves = -(-M//tile.rows), -(-N//tile.columns), tile.halves(M, N, processors=processors)
        count, whole = m*n + (halves or 0), m*n - (halves or 0)
        out = (ctypes.c_int*(3*count))()
        layout.places(m, n, 2048//tile.rows, -1 if halves is None else halves, tile.rows, tile.columns, N, out)
        places = [p for p in zip(out[::3], out[1::3], out[2::3]) if p[1] < N]
        for row in range(0, M, tile.rows):
            spans = sorted((c, c + w) for r, c, w in places if r == row)
            assert spans[0][0] == 0 and spans[-1][1] >= N and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
        assert {w for _, _, w in places} <= ({tile.columns} if halves is None else {tile.columns, tile.columns//2})
        assert whole % processors == 0 or not halves, 'whole tiles fill whole waves'
        cut += bool(halves)
    assert cut > 20


@pytest.fixture
def driver(monkeypatch): yield from recorded_maps(monkeypatch)


def call(rng, dtype):
    "Arguments of random shapes"
    (M, N, columns), dual = random_sizes(rng), rng.random() < .5
    sizes = columns.sizes
    codes, weight = (torch.zeros(rows, columns.width, dtype=torch.int8) for rows in (M, N))
    given = dict(codes=codes, weight=weight, scale_x=torch.ones(len(sizes)*(1 + dual), rng.choice((1, M))), columns=columns,
                 scale_w=torch.ones(N) if rng.random() < .5 else torch.ones(len(sizes), N), dual=dual, dtype=dtype)
    if rng.random() < .5: given['bias'] = torch.zeros(N)
    if dual and rng.random() < .5: given['duals'] = tuple(rng.random() < .5 for _ in sizes)
    if rng.random() < .3: given |= dict(residual=torch.zeros(M, N, dtype=dtype))
    if 'residual' in given and rng.random() < .7: given |= dict(gate=torch.zeros(rng.choice([d for d in (1, 2, 3) if M % d == 0]), N))
    if rng.random() < .4:
        rank, kind = rng.randint(1, 20)*8, rng.choice((torch.bfloat16, torch.float16))
        given['low_rank'] = torch.zeros(M, rank, dtype=kind), torch.zeros(N, rank, dtype=kind)
    if rng.random() < .3: given |= {name: given[name].to(torch.float8_e4m3fn) for name in ('codes', 'weight')}
    return given


def test_launches_of_random_shapes(driver):
    rng = random.Random(1)
    for _ in range(120):
        dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
        given = call(rng, dtype)
        driver.clear()
        hopper_gemm.tensor_map.cache_clear()
        with emulated_gpu(run=False, capability=(9, 0)) as gpu: y = (w8a8_sm90 if given['codes'].dtype is torch.int8 else fp8_sm90)(**given)
        (M, K), N, segments = given['codes'].shape, len(given['weight']), len(given['columns'].sizes)
        assert y.shape == (M, N) and y.dtype == dtype
        launch, = gpu.launches
        options = defines(launch)
        columns, consumers, stages = (options[n] for n in ('BN', 'CONSUMERS', 'STAGES'))
        tile = HopperTile(columns, consumers)
        t, up = given.get('low_rank', (None, None))
        kind = given['dual'], segments > 1, 'residual' in given
        assert tile in hopper_tiles(*kind)
        sizes = [end - start for start, end in zip(given['columns'].starts, given['columns'].ends)]
        form = 2 if segments == 2 and not given['dual'] and min(sizes) >= 128 else int(segments > 1)
        assert [int(options[n]) for n in ('DUAL', 'SEGMENTED', 'RESIDUAL', 'LOW_RANK', 'FP8')] == [
            int(given['dual']), form, int('residual' in given), 0 if t is None else 1 + (t.dtype is torch.float16), given['codes'].dtype is not torch.int8]
        assert stages == tile.stages >= 3 and launch.shared == tile.shared <= 227*1024 and launch.block == (128*(consumers + 1),)
        # what struct Shared in the source takes
        boxes = (1 if consumers == 3 or columns == 192 else 2)*4*consumers*2048
        assert launch.shared >= stages*(64*consumers + columns)*128 + boxes + (1 if form == 0 else 2)*(columns*8 + 16) + 28*stages + 8*consumers*stages
        halves = tile.halves(M, N, *kind, t is not None, 108)
        assert int(options['HALVES']) == (halves is not None)
        w_box = columns if halves is None else columns//2
        maps = {m['address']: m for m in driver}
        x_map, w_map, y_map = (maps[a.data_ptr()] for a in (given['codes'], given['weight'], y))
        assert x_map == dict(kind=0, rank=2, address=given['codes'].data_ptr(), sizes=[K, M], strides=[K], box=[128, tile.rows])
        assert w_map == dict(kind=0, rank=2, address=given['weight'].data_ptr(), sizes=[K, N], strides=[K], box=[128, w_box])
        item = dtype.itemsize
        assert y_map == dict(kind={2: 1, 4: 2}[item], rank=2, address=y.data_ptr(), sizes=[N, M], strides=[N*item], box=[128//item, 16])
        given_maps = [driver[bytes(a.tobytes())[0] - 1] for a in (*launch.arguments[:3], *launch.arguments[12:])]
        assert given_maps[:3] == [x_map, w_map, y_map]
        if t is not None:
            rank = t.shape[1]
            assert given_maps[3:] == [dict(kind=1, rank=2, address=t.data_ptr(), sizes=[rank, M], strides=[2*rank], box=[64, tile.rows]),
                                      dict(kind=1, rank=2, address=up.data_ptr(), sizes=[rank, N], strides=[2*rank], box=[64, w_box])]
        numbers = struct.unpack('12i', launch.arguments[3].tobytes())
        tiles_m, tiles_n = -(-M//tile.rows), -(-N//columns)
        assert launch.grid == (min(tiles_m*tiles_n, 108),)
        gate = given.get('gate')
        assert numbers == (M, N, K, tiles_m, tiles_n, given['scale_x'].shape[1], segments,
                           N if given['scale_w'].ndim == 2 else 0, M if gate is None else M//len(gate), 2048//tile.rows,
                           0 if t is None else -(-t.shape[1]//16), halves or 0)
        assert [int(a) != 0 for a in launch.arguments[4:12]] == [True, True, 'bias' in given, True, 'duals' in given,
                                                                 'gate' in given, 'residual' in given, False]


def test_a_layer_called_again_launches_the_same(driver):
    weight, up = torch.zeros(72, 128, dtype=torch.int8), torch.zeros(72, 16, dtype=torch.float16)
    with emulated_gpu(run=False, capability=(9, 0)) as gpu:
        linear = HopperLinear(weight, torch.ones(72), up=up)
        inputs = [(torch.zeros(M, 128, dtype=torch.int8), torch.ones(1, M), torch.zeros(M, 16, dtype=torch.float16), torch.zeros(M, 72)) for M in (5, 300)]
        for _ in range(2):
            for codes, scale, low, out in inputs: assert linear(codes, scale, torch.float32, low=low, out=out) is out
    first, again = gpu.launches[:2], gpu.launches[2:]
    for a, b in zip(first, again):
        assert a.grid == b.grid and [bytes(x.tobytes()) for x in a.arguments] == [bytes(x.tobytes()) for x in b.arguments]
    assert len(linear.plans) == 2 and struct.unpack('12i', first[0].arguments[3].tobytes())[0] == 5


def test_sums_of_floats_can_be_cut(driver):
    columns = PackedColumns((100, 40, 96))  # end at 128, 192, 320
    given = dict(codes=torch.zeros(9, 320, dtype=torch.float8_e4m3fn), weight=torch.zeros(24, 320, dtype=torch.float8_e4m3fn), columns=columns,
                 scale_x=torch.ones(6, 9), scale_w=torch.ones(3, 24), dual=True, duals=(True, False, True))
    with emulated_gpu(run=False, capability=(9, 0)) as gpu: fp8_sm90(**given, cut=96)
    launch, = gpu.launches
    assert struct.unpack('12i', launch.arguments[3].tobytes())[6] == 5 and all(int(launch.arguments[i]) for i in (7, 8, 11))
    ends, duals, rows = (t.tolist() for t in hopper_gemm._parts(columns, (True, False, True), 96, torch.device('cpu')))
    assert ends == [96, 128, 192, 288, 320] and duals == [1, 1, 0, 1, 1] and rows == [0, 0, 1, 2, 2]


def test_what_does_not_fit_is_named(driver):
    weight, scale = torch.zeros(16, 256, dtype=torch.int8), torch.ones(16)
    halves = PackedColumns((128, 128))
    with emulated_gpu(run=False, capability=(9, 0)) as gpu:
        for change, message in ((dict(scale_w=None), 'scale_w: expected a tensor, got NoneType'), (dict(weight=None), 'weight: expected a tensor'),
                                (dict(scale_w=[1.]*16), 'scale_w: expected a tensor, got list'), (dict(columns=(256,)), 'columns: expected PackedColumns, got tuple'),
                                (dict(bias=[0]*16), 'bias: expected a tensor')):
            with pytest.raises(TypeError, match=message): HopperLinear(**dict(weight=weight, scale_w=scale) | change)
        codes = torch.zeros(3, 256, dtype=torch.int8)
        with pytest.raises(TypeError, match='codes: expected a tensor, got NoneType'): HopperLinear(weight, scale)(None, torch.ones(1, 1))
        for linear, terms in ((HopperLinear(weight, scale, columns=halves), 2), (HopperLinear(weight, scale, dual=True), 2)):
            with pytest.raises(ValueError, match='tile of 128 × 256 has more sums than'): linear(codes, torch.ones(terms, 1), tile=HopperTile(256))
        assert not gpu.launches
        HopperLinear(weight, scale)(codes, torch.ones(1, 1), tile=HopperTile(256))
        assert len(gpu.launches) == 1


@pytest.mark.parametrize('sizes,dual,cut,form', [((256,), False, None, 0), ((256,), False, 64, 1), ((256,), False, 256, 0), ((128, 128), False, None, 2), ((160, 224), False, None, 2),
                                                 ((128, 128), True, None, 1), ((96, 160), False, None, 1), ((128, 128), False, 64, 1), ((128,)*3, False, None, 1)])
def test_two_segments_of_a_stage_or_more_have_two_sums(driver, sizes, dual, cut, form):
    columns = PackedColumns(sizes)
    kind = torch.int8 if cut is None else torch.float8_e4m3fn
    with emulated_gpu(run=False, capability=(9, 0)) as gpu:
        linear = HopperLinear(torch.zeros(16, columns.width, dtype=kind), torch.ones(16), None, columns, dual, cut=cut)
        linear(torch.zeros(5, columns.width, dtype=kind), torch.ones(len(sizes)*(1 + dual), 5))
    launch, = gpu.launches
    assert f'-DSEGMENTED={form}' in launch.options


def test_empty_results_need_no_launch(driver):
    with emulated_gpu(run=False, capability=(9, 0)) as gpu:
        y = w8a8_sm90(torch.zeros(0, 64, dtype=torch.int8), torch.zeros(8, 64, dtype=torch.int8), torch.ones(1, 1), torch.ones(8))
    assert y.shape == (0, 8) and not gpu.launches


def test_an_encoding_that_the_driver_refuses_is_an_error(monkeypatch):
    monkeypatch.setattr(hopper_gemm, '_driver', lambda: SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 1))
    with pytest.raises(RuntimeError, match='error 1 for 3 rows of 256 bytes'): hopper_gemm.tensor_map(4096, 1, 3, 256, 64, 128)


@pytest.mark.parametrize('dual,segmented,residual', [*product((False, True), repeat=3)])
def test_the_picked_tile_fits(dual, segmented, residual):
    for tile in hopper_tiles(dual, segmented, residual):
        assert tile.shared <= 227*1024 < tile.shared + tile.rows*128 + tile.columns*128 or tile.stages == 8
        assert 128*(tile.consumers + 1)*{1: 256, 2: 168, 3: 128}[tile.consumers] <= 65536
    for M, N in product((1, 77, 333, 512, 4096, 4608), (64, 640, 2432, 12288)):
        assert pick_hopper_tile(M, N, dual, segmented, residual) in hopper_tiles(dual, segmented, residual)


@pytest.mark.skipif(NVCC is None, reason='no nvcc on this machine')
@pytest.mark.parametrize('kind', [(False, 0, False, 0, False, True), (True, 0, False), (True, 0, False, 1), (True, 0, True, 1), (False, 1, False, 1, False, True),
                                  (False, 2, False, 0, False, True), (False, 2, True, 1), (True, 1, True, 2), (False, 0, True, 2, True)])
def test_the_largest_tiles_do_not_spill(kind, tmp_path):
    tile = max(hopper_tiles(*map(bool, kind[:4])), key=lambda t: (t.columns, t.consumers == 2))
    defines = [f'-D{k}={int(v)}' for k, v in hopper_gemm._defines(tile, torch.bfloat16, *kind).items()]
    done = subprocess.run([NVCC, '-gencode=arch=compute_90a,code=sm_90a', '-std=c++17', '-cubin', '-Xptxas', '-v', f'-I{cuda_src_dir()}',
                           *defines, '-o', tmp_path/'kernel.cubin', cuda_src_dir()/'wgmma/sm90_s8_gemm.cu'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Performance Loss' not in done.stderr, done.stderr
    cost = kernel_cost(done.stderr)
    assert cost.spilled == 0 and cost.registers <= {1: 255, 2: 168, 3: 128}[tile.consumers], cost
