"""What the package compiles: every kernel source, with the options that are used, for the compile test.

(source, options, GPUs). A source that is for one kind of GPU only names it.
"""
from itertools import product

import torch

from segquant_nb import hopper_gemm, int4
from segquant_nb.codes import PackedColumns
from segquant_nb.gemm import _LARGE, _MIDDLE, _SMALL, _THIN, _WIDE

EVERY_GPU = ('sm_80', 'sm_89', 'sm_90a')
BLACKWELL = ('sm_100a', 'sm_120a')  # for which the portable kernels compile, too


def gemm(tile, dual=0, segmented=0, output=0, residual=0, form=0, short=0, branch=0, half=0):
    return dict(zip(('BM', 'BN', 'WM', 'WN', 'STAGES'), tile), DUAL=dual, SEGMENTED=segmented, OUTPUT=output, RESIDUAL=residual, FORMAT=form, SHORT=short, LOW_RANK=branch, HALF=half)


def codes(input=0, format=0, rounded=0, dual=0, dynamic=1, smooth=0, rotate=0, block=0, segmented=0, aligned=1, whole=1, chunks=1, across=192, down=1, resident=5, group=16, producer=0, **more):
    return dict(INPUT=input, FORMAT=format, ROUNDED=rounded, DUAL=dual, DYNAMIC=dynamic, SMOOTH=smooth, ROTATE=rotate, BLOCK=block, SEGMENTED=segmented, ALIGNED=aligned, STAGED=aligned, WHOLE=whole, CHUNKS=chunks,
                ACROSS=across, DOWN=down, RESIDENT=resident, GROUP=group, PRODUCER=producer, **more)


def norm(kind=1, weight=0, bias=0, scaled=1, shifted=1, **given):
    return codes(producer=kind, **given, WEIGHT=weight, BIAS=bias, SCALED=scaled, SHIFTED=shifted)


def activation(kind, gated=0, **given): return codes(producer=3, **given, ACTIVATION=kind, GATED=gated)


def hopper(*kind, **options):
    "The tile for a layer of FLUX"
    tile = hopper_gemm.pick_hopper_tile(4096, 3072, *map(bool, kind))
    return {k: int(v) for k, v in hopper_gemm._defines(tile, torch.bfloat16, *kind, **options).items()}


def hopper4(tile, sizes=(3072,), group=None, dtype=torch.bfloat16, half=None):
    t = None if half is None else torch.empty(0, dtype=half)
    return {k: int(v) for k, v in int4._defines(int4.Int4Tile(*tile), dtype, int4._granules(PackedColumns(sizes), group), t).items()}


def gemv(output=0, bits=8, tiles=1, dual=0, spans=0, grouped=0, overlap=0):
    warps = 8 if spans == 2 or spans and tiles > 2 else 16  # as _int8_block
    return dict(OUTPUT=output, W_BITS=bits, TILES=tiles, DUAL=dual, SPANS=spans, GROUPED=grouped, WARPS=warps, STAGES=48//warps, OVERLAP=overlap)


def few_codes(input=0, bits=8, codes=8, dual=0, dynamic=1, smooth=0, silu=0, segmented=0, aligned=1, held=1, overlap=0):
    return dict(INPUT=input, W_BITS=bits, X_BITS=codes, DUAL=dual, DYNAMIC=dynamic, SMOOTH=smooth, SILU=silu, SEGMENTED=segmented, ALIGNED=aligned, HELD=held, OVERLAP=overlap)


def gemv16(input=0, output=0, bits=8, tiles=1, grouped=0, overlap=0):
    return dict(INPUT=input, OUTPUT=output, W_BITS=bits, TILES=tiles, GROUPED=grouped, WARPS=8 if grouped else 16, STAGES=3, OVERLAP=overlap)


VARIANTS = [
    ('quantize/sm80_unpack_int4.cu', {}, EVERY_GPU),
    *(('quantize/sm80_decode.cu', dict(W_BITS=bits, OUTPUT=output), EVERY_GPU) for bits in (8, 4) for output in (0, 1)),
    *(('quantize/sm80_codes.cu', codes(format=f), EVERY_GPU) for f in range(6)),
    ('quantize/sm80_codes.cu', codes(format=5, rounded=1, group=32), EVERY_GPU),
    ('quantize/sm80_codes.cu', codes(dynamic=0), EVERY_GPU),
    ('quantize/sm80_codes.cu', codes(dual=1, smooth=2), EVERY_GPU),
    ('quantize/sm80_codes.cu', codes(dual=1, segmented=1, across=960, resident=1), EVERY_GPU),
    ('quantize/sm80_codes.cu', codes(rotate=1), EVERY_GPU),
    ('quantize/sm80_codes.cu', codes(rotate=2, segmented=1, dual=1, across=96), ('sm_80',)),
    ('quantize/sm80_codes.cu', codes(input=1, dual=1, smooth=1, aligned=0, whole=0, across=96), ('sm_80',)),
    ('quantize/sm80_codes.cu', codes(dual=1, smooth=1, chunks=2, across=512, resident=1), ('sm_80',)),
    ('quantize/sm80_codes.cu', codes(input=2, dual=1, smooth=1, across=960, resident=1, segmented=1), ('sm_80',)),
    ('quantize/sm80_codes.cu', norm(), EVERY_GPU),
    ('quantize/sm80_codes.cu', norm(weight=1, bias=1, scaled=0, shifted=0, across=64, down=2, resident=8), EVERY_GPU),
    ('quantize/sm80_codes.cu', norm(2, weight=1, input=2), ('sm_80',)),
    *(('quantize/sm80_codes.cu', activation(kind, gated, across=768, resident=1), EVERY_GPU if kind == 1 else ('sm_80',)) for kind, gated in product(range(3), (0, 1))),
    *(('between/sm80_heads.cu', dict(INPUT=i, COLUMNS=c, WEIGHT=w, ROUNDED=r, ROWS=4), EVERY_GPU) for i, c, w, r in ((0, 128, 1, 0), (1, 72, 1, 1), (0, 256, 0, 0))),
    *(('between/sm80_rows.cu', dict(INPUT=i, PARTS=4, ACROSS=a, LEFT=l), EVERY_GPU) for i, a, l in ((0, 384, 0), (1, 1920, 384))),
    ('mma/sm80_s8_gemm_naive.cu', dict(DUAL=1), ('sm_80',)),
    *(('mma/sm80_s8_gemm.cu', gemm(_MIDDLE if d else _LARGE, d, s), EVERY_GPU) for d, s in product((0, 1), (0, 1))),
    *(('mma/sm80_s8_gemm.cu', gemm(tile, d, s), ('sm_80',)) for tile in (_SMALL, _THIN) for d, s in product((0, 1), (0, 1))),
    *(('mma/sm80_s8_gemm.cu', gemm(_MIDDLE if d else _LARGE, d, s, residual=1), ('sm_80', 'sm_90a')) for d, s in product((0, 1), (0, 1))),
    *(('mma/sm80_s8_gemm.cu', gemm(_LARGE, 0, 0, output), ('sm_80',)) for output in (1, 2)),
    *(('mma/sm80_s8_gemm.cu', gemm(_MIDDLE if d else _LARGE, d, s, branch=b), EVERY_GPU) for d, s, b in ((0, 0, 1), (1, 0, 2), (0, 1, 1), (1, 1, 2))),
    *(('mma/sm80_s8_gemm.cu', gemm(tile, d, s, form=1, short=s > 0), EVERY_GPU) for tile, d, s in ((_WIDE, 0, 0), (_LARGE, 1, 0), (_LARGE, 0, 2), (_MIDDLE, 1, 2), (_MIDDLE, 0, 3), (_MIDDLE, 1, 3))),
    *(('mma/sm80_s8_gemm.cu', gemm(tile, d, s, form=1, short=s > 0), ('sm_80',)) for tile in (_SMALL, _THIN) for d, s in ((0, 0), (1, 3))),
    *(('mma/sm80_s8_gemm.cu', gemm(tile, d, s, form=1, short=1, branch=1, residual=1), ('sm_90a',)) for tile, d, s in ((_LARGE, 0, 2), (_MIDDLE, 1, 3), (_SMALL, 0, 2))),
    ('mma/sm80_s8_gemm.cu', gemm(_LARGE, 0, 2), EVERY_GPU),
    *(('mma/sm80_s8_gemm.cu', gemm(_MIDDLE if d or s else _LARGE, d, s, form=2), ('sm_89', 'sm_90a')) for d, s in product((0, 1), (0, 1))),
    *(('mma/sm80_s8_gemm.cu', gemm(tile, form=2), ('sm_89', 'sm_90a')) for tile in (_SMALL, _THIN)),
    *(('mma/sm80_s8_gemm.cu', gemm(_LARGE, segmented=2*s, form=f, half=h, branch=s), ('sm_80', 'sm_90a')) for f, h, s in product((3, 4), (0, 1), (0, 1))),
    *(('mma/sm80_s8_gemm.cu', given, BLACKWELL) for given in (gemm(_LARGE), gemm(_MIDDLE, 1, 1, branch=1), gemm(_LARGE, form=1, segmented=2, short=1), gemm(_LARGE, form=2))),
    *(('quantize/sm80_codes.cu', codes(format=f, dual=1, segmented=1), BLACKWELL) for f in (0, 3)),
    *(('gemv/sm80_s8_gemv.cu', gemv(bits=b, dual=d, tiles=n*(1 + d), spans=s, grouped=int(s > 0 and b == 4)), EVERY_GPU) for b, d, n, s in product((8, 4), (0, 1), (1, 2), range(3))),
    *(('gemv/sm80_s8_gemv.cu', gemv(output=n % 3, dual=n % 2, tiles=n, overlap=1), ('sm_90a',)) for n in (1, 2, 3, 4)),
    *(('gemv/sm80_s8_rows.cu', few_codes(dual=d, dynamic=y, held=h, overlap=o), ('sm_90a',) if o else EVERY_GPU) for d, y, h, o in product((0, 1), (0, 1), (1, 4), (0, 1))),
    *(('gemv/sm80_s8_rows.cu', few_codes(input=i, bits=b, dual=1, dynamic=i < 2, smooth=i < 3, silu=i < 3, segmented=i < 3, aligned=i > 2, held=2), ('sm_80', 'sm_90a')) for i, b in product(range(4), (8, 4))),
    ('gemv/sm80_s8_rows.cu', few_codes(codes=4, silu=1, held=8), EVERY_GPU),
    *(('gemv/sm80_f16_gemv.cu', gemv16(i, i, b, t, grouped=g), EVERY_GPU) for i, b, t, g in product((0, 1), (8, 4), (1, 2), (0, 1))),
    *(('gemv/sm80_f16_gemv.cu', gemv16(output=2, tiles=n, overlap=1), ('sm_90a',)) for n in (1, 2)),
    *(('gemv/sm80_s8_rows.cu', few_codes(input=i, bits=b, codes=16, dynamic=0, silu=i, segmented=i, aligned=1 - i, held=2), EVERY_GPU) for i, b in product((0, 1), (8, 4))),
    *((hopper_gemm._SOURCE, hopper(*kind), ('sm_90a',)) for kind in product((False, True), repeat=3)),
    *((hopper_gemm._SOURCE, hopper(False, 2, residual), ('sm_90a',)) for residual in (False, True)),
    *((int4._SOURCE, hopper4(tile), ('sm_90a',)) for tile in ((256, 2), (192, 3), (176, 3), (112, 1), (16, 1))),
    *((int4._SOURCE, hopper4(tile, sizes, group), ('sm_90a',)) for scales, sizes, groups in ((1, (128, 192), (None,)), (2, (3072,), (128, 64, 32, 256, 96)), (3, (128, 192), (128, 64, 96)))
      for group in groups for tile in ((int4._MOST[scales][1], 2), (int4._MOST[scales][2], 3))),
    *((int4._SOURCE, hopper4(*more), ('sm_90a',)) for more in (((256, 2), (3072,), None, torch.float32), ((192, 3), (3072,), None, torch.bfloat16, torch.bfloat16),
                                                               *(((int4._CROWDED[scales][1], 2), (1024,)*(1 + scales % 2), 96 if scales > 1 else None, torch.float32, torch.float16) for scales in (1, 2, 3)))),
    *((hopper_gemm._SOURCE, hopper(d, s, False, low_rank=1 + d, fp8=f, halves=not d), ('sm_90a',)) for d, s, f in product((False, True), repeat=3)),
]
