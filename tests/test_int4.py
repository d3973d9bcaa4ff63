"""The int4 product of Hopper without a Hopper: its layouts compiled for the host, its launches recorded."""
import ctypes
import random
import struct

import pytest
import torch
from emulate import emulated_gpu
from hopper import defines, host_library, random_sizes, recorded_maps

import segquant_nb.hopper_gemm as hopper_gemm
import segquant_nb.int4 as int4
from segquant_nb.codes import PackedColumns
from segquant_nb.int4 import Int4Tile, _granules, _scales, _units, int4_tiles, pack_w4, pick_int4_tile, w4a8_sm90

SOURCE = '''
#include "wgmma/int4.cuh"
extern "C" void expand(const Words4* packed, unsigned int (*a)[4]) {
    for (int step = 0; step < 2; ++step) expand_int4(packed->word[2 * step], packed->word[2 * step + 1], *reinterpret_cast<uint32 (*)[4]>(a + step));
}
extern "C" unsigned row(int warp, int lane) { return turned_row(warp, lane); }
extern "C" unsigned place(int token, int channel, int tokens) { return turned_float(token, channel, tokens); }
'''


@pytest.fixture(scope='module')
def device_code(tmp_path_factory): return host_library(tmp_path_factory.mktemp('int4'), SOURCE)


def code_at(thread, i, byte):
    "Row and column of a byte of a thread's register i of wgmma's A, as the PTX manual draws it"
    warp, lane = divmod(thread, 32)
    return 16*warp + lane//4 + i % 2*8, i//2*16 + lane % 4*4 + byte


@pytest.mark.parametrize('N, K', [(64, 128), (100, 192), (8, 64)])
def test_packed_codes_unpack_to_what_wgmma_reads(device_code, N, K):
    w = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    packed = pack_w4(w)
    assert packed.shape == (-(-N//64), -(-K//128), 4096) and packed.dtype == torch.uint8
    got = torch.full((packed.shape[0]*64, packed.shape[1]*128), 99)
    registers = (ctypes.c_uint32*8)()
    for rows in range(packed.shape[0]):
        for stage in range(packed.shape[1]):
            for half in range(2):
                for thread in range(128):
                    words = packed[rows, stage].view(2, 128, 16)[half, thread].clone()
                    aligned = torch.empty(32, dtype=torch.uint8)
                    aligned = aligned[-aligned.data_ptr() % 16:][:16].copy_(words)
                    device_code.expand(ctypes.c_void_p(aligned.data_ptr()), registers)
                    codes = torch.tensor(list(bytes(registers)), dtype=torch.uint8).view(torch.int8).view(2, 4, 4)
                    for step in range(2):
                        for i in range(4):
                            for byte in range(4):
                                row, column = code_at(thread, i, byte)
                                got[64*rows + row, 128*stage + 64*half + 32*step + column] = codes[step, i, byte]
    wanted = torch.zeros_like(got)
    wanted[:N, :K] = 16*w.long()
    assert torch.equal(got, wanted)


def swizzled(row, chunk): return row*128 + ((chunk ^ row % 8) << 4)


def test_what_leaves_is_turned(device_code):
    "stmatrix with .trans: element e of lane l's register m is token 2 (l % 4) + e, channel l // 4 of block m"
    box = torch.full((16*128//2,), -1)
    for warp in range(4):
        rows = [device_code.row(warp, lane) for lane in range(32)]
        for lane in range(32):
            for m in range(4):  # the order of the registers: tokens 8j, channels 8h
                j, h = divmod(m, 2)
                for e in range(2):
                    token, channel = 8*j + lane % 4*2 + e, 16*warp + 8*h + lane//4
                    box[rows[8*m + token % 8]//2 + channel % 8] = 100*token + channel
    for token in range(16):
        for chunk in range(8):
            at = swizzled(token, chunk)//2
            assert box[at:at + 8].tolist() == [100*token + 8*chunk + i for i in range(8)]


@pytest.mark.parametrize('tokens', [16, 32])
def test_floats_that_leave_lie_in_two_boxes_without_bank_conflicts(device_code, tokens):
    places = {(token, channel): device_code.place(token, channel, tokens) for token in range(tokens) for channel in range(64)}
    assert places == {(token, channel): channel//32*tokens*128 + swizzled(token, channel % 32//4) + channel % 4*4 for token, channel in places}
    for warp in range(4):
        for e in range(2):
            banks = {places[lane % 4*2 + e, 16*warp + lane//4]//4 % 32 for lane in range(32)}
            assert len(banks) == 32


def test_sixteen_times_too_large_rounds_alike():
    rng = torch.Generator().manual_seed(0)
    sums = torch.randint(-2**27, 2**27, (100_000,), generator=rng)
    x, w = torch.rand(2, 100_000, generator=rng)*10**(torch.rand(2, 100_000, generator=rng)*20 - 16)
    assert torch.equal((16*sums).int().float()*(x*(w*.0625)), sums.int().float()*(x*w))


@pytest.fixture
def driver(monkeypatch): yield from recorded_maps(monkeypatch, int4)


def call(rng, dtype):
    "Arguments of random shapes"
    (M, N, columns), group = random_sizes(rng), rng.choice((None, None, 32, 64, 288))
    sizes, granules = columns.sizes, _granules(columns, group)
    given = dict(codes=torch.zeros(M, columns.width, dtype=torch.int8), weight=pack_w4(torch.zeros(N, columns.width, dtype=torch.int8)),
                 scale_x=torch.ones(len(sizes), rng.choice((1, M))), columns=columns, dtype=dtype, group=group,
                 scale_w=torch.ones(N) if group is None and rng.random() < .5 else torch.ones(len(granules), N))
    if rng.random() < .5: given['bias'] = torch.zeros(N)
    crowded = rng.random() < .3
    if rng.random() < .7: given['tile'] = rng.choice(int4_tiles(_scales(granules), crowded or dtype is torch.float32))
    if crowded:
        rank, half = rng.randint(1, 20)*8, rng.choice((torch.bfloat16, torch.float16))
        given['low_rank'] = torch.zeros(M, rank, dtype=half), torch.zeros(N, rank, dtype=half)
    return given


def test_launches_of_random_shapes(driver):
    rng = random.Random(1)
    for _ in range(60):
        dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
        given = call(rng, dtype)
        driver.clear()
        hopper_gemm.tensor_map.cache_clear()
        with emulated_gpu(run=False, capability=(9, 0)) as gpu: y = w4a8_sm90(**given)
        (M, K), N, columns = given['codes'].shape, given['scale_w'].shape[-1], given['columns']
        granules, (t, up) = _granules(columns, given['group']), given.get('low_rank', (None, None))
        assert y.shape == (M, N) and y.dtype == dtype
        launch, = gpu.launches
        options = defines(launch)
        tile, size = Int4Tile(options['TOKENS'], options['CONSUMERS']), dtype.itemsize
        assert tile == given.get('tile', tile) and tile in int4_tiles(_scales(granules), size == 4 or t is not None) and launch.block == (128*(tile.consumers + 1),)
        assert options['LOW_RANK'] == (0 if t is None else 1 + (t.dtype is torch.float16))
        assert options['SEGMENTED'] == _scales(granules)
        unit = options['UNIT']
        assert options['WHOLE'] == (options['SEGMENTED'] > 1 and [-(-end//unit) for end, _ in granules] == [*range(1, len(granules) + 1)])
        assert all(end % unit == 0 for end, _ in granules[:-1]) and (unit == 128 or any(end % (2*unit) for end, _ in granules[:-1]))
        # what struct Shared in the source takes
        stages, box = options['STAGES'], (16 if tile.tokens % 32 else 32)*64*size
        assert stages >= 4 and launch.shared == tile.shared(size) <= 227*1024
        assert launch.shared >= stages*(tile.tokens*128 + tile.consumers*4096) + tile.consumers*2*box + 2*tile.tokens*4 + 16*(stages + 2)
        w_map, x_map, y_map, t_map = (next((m for m in driver if x is not None and m['address'] == x.data_ptr()), None)
                                      for x in (given['weight'], given['codes'], y, t))
        assert w_map == dict(kind=2, rank=3, address=given['weight'].data_ptr(), sizes=[256, -(-K//128)*4, -(-N//64)], strides=[1024, -(-K//128)*4096],
                             box=[256, 4, tile.consumers])
        assert x_map == dict(kind=0, rank=2, address=given['codes'].data_ptr(), sizes=[K, M], strides=[K], box=[128, tile.tokens])
        assert y_map == dict(kind={2: 1, 4: 2}[size], rank=2, address=y.data_ptr(), sizes=[N, M], strides=[N*size], box=[128//size, box//(64*size)])
        if t is not None: assert t_map == dict(kind=1, rank=2, address=t.data_ptr(), sizes=[t.shape[1], M], strides=[2*t.shape[1]], box=[64, tile.tokens])
        tiles_m, tiles_n = -(-M//tile.tokens), -(-N//tile.channels)
        assert launch.grid == (min(tiles_m*tiles_n, 108),)
        assert struct.unpack('12i', launch.arguments[3].tobytes()) == (
            M, N, -(-K//128), tiles_m, tiles_n, given['scale_x'].shape[1], len(columns.sizes), len(granules),
            N if given['scale_w'].ndim == 2 else 0, max(1, 2048//tile.tokens), 0 if t is None else t.shape[1], -(-K//unit))
        assert [int(a) != 0 for a in launch.arguments[4:8]] == [True, True, 'bias' in given, True]
        assert [a for a in launch.arguments[9:]] == ([] if up is None else [up.data_ptr()])


def test_granules_end_where_segments_do():
    columns = PackedColumns((40, 100, 33))
    assert columns.ends == (64, 192, 256)
    assert _granules(columns, None) == ((64, True), (192, True), (256, True))
    assert _granules(columns, 96) == ((64, True), (160, False), (192, True), (256, True))
    assert _granules(PackedColumns((32,)), 32) == ((64, True),)  # the padding belongs to the last one
    # as the kernel reads them: steps of 32 columns, and whether a segment ends
    assert int4._table(_granules(columns, 96), torch.device('cpu')).tolist() == [2*2 + 1, 5*2, 6*2 + 1, 8*2 + 1]


@pytest.mark.parametrize('sizes, group, scales, units', [
    ((3072,), None, 0, (128, False)), ((3072, 12288), None, 1, (128, False)), ((100, 40), None, 1, (128, False)), ((40, 100), None, 1, (64, False)),
    ((3072,), 128, 2, (128, True)), ((320,), 128, 2, (128, True)), ((320,), 64, 2, (64, True)), ((3072,), 256, 2, (128, False)), ((640,), 96, 2, (32, False)),
    ((640,), 32, 2, (32, True)), ((128, 256), 64, 3, (64, True)), ((100, 300), 128, 3, (128, True)), ((300, 100), 128, 3, (64, False)), ((40, 100), 192, 1, (64, False)), ((40,), 64, 0, (128, False))])
def test_units_end_where_scales_do(sizes, group, scales, units):
    granules = _granules(PackedColumns(sizes), group)
    assert _scales(granules) == scales and _units(granules) == units


def test_empty_results_need_no_launch(driver):
    with emulated_gpu(run=False, capability=(9, 0)) as gpu:
        y = w4a8_sm90(torch.zeros(0, 64, dtype=torch.int8), pack_w4(torch.zeros(8, 64, dtype=torch.int8)), torch.ones(1, 1), torch.ones(8))
    assert y.shape == (0, 8) and not gpu.launches


@pytest.mark.parametrize('scales', range(4))
@pytest.mark.parametrize('crowded', [False, True])
def test_the_picked_tile_fits(scales, crowded):
    assert {*int4_tiles(scales, True)} <= {*int4_tiles(scales)}
    for tile in int4_tiles(scales, crowded):
        for size in (2, 4):
            assert tile.shared(size) <= 227*1024 and tile.stages(size) >= 4
    for M in (1, 77, 333, 512, 4096, 4608):
        for N in (64, 640, 2432, 12288):
            assert pick_int4_tile(M, N, scales, crowded=crowded) in int4_tiles(scales, crowded)
