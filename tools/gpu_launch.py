"""What the CPU pays for a call of a quantized layer, piece by piece, in microseconds: medians of seven loops over calls on a layer so small that the GPU waits.

    python tools/gpu_launch.py
"""
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segquant_nb import cuda, ops
from segquant_nb.codes import PackedColumns, quantize_cuda
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.gemm import w8a8_sm80
from segquant_nb.seglinear import Plan, SegLinear

DEVICE, TOKEN = torch.device('cuda', 0), dict(axis=-1, dynamic=True)


def cost(f, calls=57):
    "Microseconds of the CPU"
    times = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(calls): f()
        times.append(1e6*(time.perf_counter() - start)/calls)
        torch.cuda.synchronize()
    return round(statistics.median(times[1:]), 2)


@torch.no_grad()
def main():
    x, linear, columns = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16), nn.Linear(256, 256, device=DEVICE, dtype=torch.bfloat16), PackedColumns((256,))
    kernel = cuda.get_kernel('quantize/sm80_unpack_int4.cu', 'unpack_int4', DEVICE)
    packed, room = torch.randint(256, (24, 48), dtype=torch.uint8, device=DEVICE), torch.empty(24, 96, dtype=torch.int8, device=DEVICE)
    start, a, b = cuda.Launcher(kernel, (256,), 'P P q'), packed.data_ptr(), room.data_ptr()
    weight, scale = torch.randint(-127, 128, (256, 256), device=DEVICE, dtype=torch.int8), torch.rand(256, device=DEVICE)
    codes = quantize_cuda(x, columns)
    pieces = {'nn.Linear': lambda: linear(x), 'x + x': lambda: x + x, 'torch.empty(M, N)': lambda: torch.empty(64, 256, dtype=torch.int8, device=DEVICE),
              'Launcher.run': lambda: start.run((1,), (a, b, 144)), 'cuLaunchKernelEx only': lambda: cuda._driver().cuLaunchKernelEx(*start.room.given),
              'CuPy call': lambda: kernel.raw((1,), (256,), (np.uint64(a), np.uint64(b), np.int64(144))), 'quantize_cuda': lambda: quantize_cuda(x, columns),
              'w8a8_sm80': lambda: w8a8_sm80(codes.codes, weight, codes.scale, scale, scale, columns)}
    for name, inputs in (('static', [(256, Quantizer())]), ('per token', [(256, Quantizer(**TOKEN))]), ('mixed', [(96, Quantizer(**TOKEN)), (160, DualScale(**TOKEN))])):
        layer = SegLinear.of(linear, Plan(inputs, [256], Quantizer('int8', axis=1)), x)
        ops.use_kernels(layer)
        pieces[f'SegLinear {name}'] = lambda layer=layer: layer(x)
    rows, heads = x.view(1, 64, 256), x.view(1, 64, 2, 128)
    for name, norm, given in (('LayerNorm', nn.LayerNorm(256), rows), ('RMSNorm', nn.RMSNorm(128, eps=1e-6), heads)):
        norm = norm.to(DEVICE, torch.bfloat16)
        quick = copy.deepcopy(norm)
        ops.use_quick_parts(quick)
        pieces |= {name: lambda norm=norm, given=given: norm(given), f'{name}, quick': lambda quick=quick, given=given: quick(given)}
    print(json.dumps({name: cost(f) for name, f in pieces.items()}, indent=1))


if __name__ == '__main__': main()
