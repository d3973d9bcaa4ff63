"""What the package compiles: every kernel source, with the options that are used, for the compile test.

(source, options, GPUs). A source that is for one kind of GPU only names it.
"""
from itertools import product

import torch

from segquant_nb import hopper_gemm
from segquant_nb.gemm import _LARGE, _MIDDLE, _SMALL, _THIN

EVERY_GPU = ('sm_80', 'sm_89', 'sm_90a')


def gemm(tile, dual=0, segmented=0, output=0, residual=0):
    return dict(zip(('BM', 'BN', 'WM', 'WN', 'STAGES'), tile), DUAL=dual, SEGMENTED=segmented, OUTPUT=output, RESIDUAL=residual)


def codes(input=0, format=0, dual=0, dynamic=1, smooth=0, segmented=0, aligned=1, chunks=1, threads=256, group=16):
    return dict(INPUT=input, FORMAT=format, DUAL=dual, DYNAMIC=dynamic, SMOOTH=smooth, SEGMENTED=segmented, ALIGNED=aligned, CHUNKS=chunks, THREADS=threads, GROUP=group)


def hopper(*kind):
    "The tile for a layer of FLUX"
    tile = hopper_gemm.pick_hopper_tile(4096, 3072, *kind)
    return {k: int(v) for k, v in hopper_gemm._defines(tile, torch.bfloat16, *kind).items()}


VARIANTS = [
    ('quantize/sm80_unpack_int4.cu', {}, EVERY_GPU),
    *(('quantize/sm80_codes.cu', codes(format=f), EVERY_GPU) for f in range(6)),
    ('quantize/sm80_codes.cu', codes(dynamic=0), EVERY_GPU),
    ('quantize/sm80_codes.cu', codes(dual=1, chunks=2, segmented=1, threads=480), EVERY_GPU),
    ('quantize/sm80_codes.cu', codes(input=1, dual=1, smooth=1, aligned=0, chunks=2), ('sm_80',)),
    ('quantize/sm80_codes.cu', codes(input=2, dual=1, smooth=1, chunks=4, threads=512), ('sm_80',)),
    ('mma/sm80_s8_gemm_naive.cu', dict(DUAL=1), ('sm_80',)),
    *(('mma/sm80_s8_gemm.cu', gemm(_MIDDLE if d or s else _LARGE, d, s), EVERY_GPU) for d, s in product((0, 1), (0, 1))),
    *(('mma/sm80_s8_gemm.cu', gemm(tile, d, s), ('sm_80',)) for tile in (_SMALL, _THIN) for d, s in product((0, 1), (0, 1))),
    *(('mma/sm80_s8_gemm.cu', gemm(_MIDDLE if d or s else _LARGE, d, s, residual=1), ('sm_80', 'sm_90a')) for d, s in product((0, 1), (0, 1))),
    *(('mma/sm80_s8_gemm.cu', gemm(_LARGE, 0, 0, output), ('sm_80',)) for output in (1, 2)),
    *((hopper_gemm._SOURCE, hopper(*kind), ('sm_90a',)) for kind in product((False, True), repeat=3)),
]
