"""Check SegLinear on GPU kernels against its exact arithmetic, then time whole linear layers against bfloat16.

    python tools/gpu_ops.py --out nbs/results/ops.json

Whole means: activations in, quantized, multiplied, rescaled, bias added, bfloat16 out. Times are medians over replays of a CUDA
graph of several calls on different inputs, and, for what the CPU adds, of one eager call after the other.
"""
import argparse
import copy
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpu_shapes

from segquant_nb import ops
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.ops import cuda_reason, cuda_tables, doctor, use_kernels
from segquant_nb.quartz import Quartz
from segquant_nb.seglinear import Plan, SegLinear

TOKEN = dict(axis=-1, dynamic=True)
W8, W4 = Quantizer('int8', axis=1), Quantizer('int4', axis=1)
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DEVICE = torch.device('cuda', 0)


def kinds(K):
    "Name: input segments"
    a = K//3
    return {'static': [(K, Quantizer())], 'per token': [(K, Quantizer(**TOKEN))], 'int4': [(K, Quantizer('int4', **TOKEN))],
            'dual': [(K, DualScale())], 'dual per token': [(K, DualScale(**TOKEN))],
            'segments': [(a, Quantizer()), (K - a, Quantizer())], 'mixed': [(a, Quantizer(**TOKEN)), (K - a, DualScale(**TOKEN))],
            'mixed static': [(a, DualScale()), (K - a, Quantizer())],
            'QuaRTZ': [(K, Quartz(**TOKEN))], 'QuaRTZ 16, static': [(K, Quartz(group=16))]}


def check():
    "Every kind, weight, type, extra and path; ragged and aligned shapes. Many at a time, for the compiler's sake"
    cases = list(product(((77, 200, 336), (256, 384, 768), (1, 96, 192)), kinds(96), (W8, W4), ('', 'smooth', 'low rank', 'both'),
                         ('cuda_sm80', 'cuda_sm90'), CLOSE))
    with ThreadPoolExecutor(os.cpu_count()) as pool: wrong = [w for w in pool.map(lambda case: check_one(*case), cases) if w]
    print('\n'.join(wrong[:20]))
    print(f'{len(cases) - len(wrong)} of {len(cases)} layers right', flush=True)
    return dict(layers=len(cases), wrong=len(wrong))


def check_one(shape, kind, w, extra, path, dtype):
    "What is wrong with a random layer"
    M, N, K = shape
    linear, rows = nn.Linear(K, N, device=DEVICE).requires_grad_(False), F.gelu(2*torch.randn(M, K, device=DEVICE))
    smooth = torch.rand(K, device=DEVICE) + .5 if extra in ('smooth', 'both') else None
    rank = (torch.randn(8, K, device=DEVICE)/K, torch.randn(N, 8, device=DEVICE)/8) if extra in ('low rank', 'both') else None
    q = SegLinear.of(linear, Plan(kinds(K)[kind], [N//4, N - N//4], w), rows, smooth, rank)
    ops._prepare(q, path)
    x = rows.to(dtype)
    try: y, again, right = q(x), q(x), q.integer(x)
    except Exception as e: return f'BAD {path} {kind} {M}×{N}×{K} {w.dtype.value} {extra} {dtype}: {type(e).__name__} {e}'
    off = (y.double() - right.double()).abs()/right.double().abs().max()
    # A value between two codes may go either way where it is multiplied with 1/s instead of divided by s.
    most, mean = (4*CLOSE[dtype], CLOSE[dtype]) if smooth is None else (.2, .01)
    if off.max() > most or off.mean() > mean or not y.isfinite().all() or not torch.equal(y, again) or y.dtype != dtype:
        return (f'BAD {path} {kind} {M}×{N}×{K} {w.dtype.value} {extra} {dtype}: {off.max():.1e}, mean {off.mean():.1e}'
                f'{"" if torch.equal(y, again) else ", not the same twice"}')


def check_use():
    "CUDA graphs, torch.compile, copies, moves, streams"
    N, K = 384, 768
    inputs = kinds(K)['mixed']
    q = SegLinear.of(nn.Linear(K, N, device=DEVICE, dtype=torch.bfloat16), Plan(inputs, [N], W8), None,
                     None, (torch.randn(8, K, device=DEVICE)/K, torch.randn(N, 8, device=DEVICE)/8))
    table = use_kernels(q)
    print(table)
    assert table.of[0].path == 'cuda_sm90'
    x = torch.randn(300, K, device=DEVICE, dtype=torch.bfloat16)
    y = q(x)
    graph, still = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph): out = q(still)
    still.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(out, y.flip(0)), 'graph'
    side = torch.cuda.Stream()
    with torch.cuda.stream(side): z = q(x)
    side.synchronize()
    assert torch.equal(z, y), 'stream'
    assert torch.equal(copy.deepcopy(q)(x), y), 'copy'
    there = copy.deepcopy(q).cpu().cuda()
    assert torch.equal(there(x), y), 'moved'
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(2, 150, K, device=DEVICE, dtype=torch.bfloat16))
        with torch.compiler.set_stance('fail_on_recompile'):
            for n in (300, 64, 1024):
                x = torch.randn(2, n, K, device=DEVICE, dtype=torch.bfloat16)
                torch.testing.assert_close(compiled(x), q(x), atol=.02, rtol=.02)
    print('graph, stream, copy, move, compile: right', flush=True)


def per_call(functions, replays=11, rest=.005):
    "Median microseconds, in a graph that calls each function once"
    for f in functions: f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for f in functions: f()
    times = []
    for i in range(replays):
        time.sleep(rest)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(); graph.replay(); end.record(); end.synchronize()
        times.append(1000*start.elapsed_time(end)/len(functions))
    return round(statistics.median(times), 2)


def overhead(f, calls=200):
    "Median microseconds that the CPU needs to start one call"
    f(); torch.cuda.synchronize()
    times = []
    for i in range(calls):
        start = time.perf_counter()
        f()
        times.append(1e6*(time.perf_counter() - start))
        if i % 20 == 19: torch.cuda.synchronize()
    return round(statistics.median(times), 1)


def speed(model):
    "A row for each shape"
    for M, N, K, count, what in gpu_shapes.SHAPES[model]:
        sets = max(2, min(12, math.ceil(1.5e8/(N*K + 2*M*K + 2*M*N))))
        xs = [torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16) for _ in range(sets)]
        plain = [nn.Linear(K, N, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False) for _ in range(sets)]
        row = dict(model=model, M=M, N=N, K=K, count=count, what=what, us={})
        row['us']['bf16'] = per_call([lambda x=x, l=l: l(x) for x, l in zip(xs, plain)])
        dual = 'GELU' in what or 'SiLU' in what or 'gelu' in what
        segments = [(3072, Quantizer(**TOKEN)), (12288, DualScale(**TOKEN))] if '|' in what else None
        recipes = {'static': ([(K, Quantizer())], W8), 'per token': ([(K, Quantizer(**TOKEN))], W8), 'W4A8': ([(K, Quantizer(**TOKEN))], W4)}
        if dual: recipes['as planned'] = (segments or [(K, DualScale(**TOKEN))], W8)
        if M == 4096: recipes['rank 32'] = recipes['per token']
        paths = ('cuda_sm80', 'cuda_sm90') if M <= 512 else ('cuda_sm90',)
        for name, (inputs, w) in recipes.items():
            rank = (torch.randn(32, K, device=DEVICE)/K, torch.randn(N, 32, device=DEVICE)/32) if name == 'rank 32' else None
            rank = rank and tuple(t.bfloat16() for t in rank)
            layers = [SegLinear.of(l, Plan(inputs, [N], w), xs[0][:64], None, rank) for l in plain]
            for path in paths:
                for q in layers: ops._prepare(q, path)
                label = name if path == 'cuda_sm90' else f'{name}, sm80'
                row['us'][label] = per_call([lambda x=x, q=q: q(x) for x, q in zip(xs, layers)])
        row['planned'] = 'as planned' if dual else 'per token'
        print(row, flush=True)
        yield row


def small():
    "Few rows: which of the two kernels, and is either worth it?"
    for (N, K), M in product(((18432, 3072), (9216, 3072), (9216, 1536)), (1, 4, 16, 64)):
        sets = max(2, math.ceil(1.5e8/(N*K)))
        xs = [torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16) for _ in range(sets)]
        plain = [nn.Linear(K, N, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False) for _ in range(sets)]
        row = dict(M=M, N=N, K=K, us={'bf16': per_call([lambda x=x, l=l: l(x) for x, l in zip(xs, plain)])})
        for name, q in (('per token', Quantizer(**TOKEN)), ('dual per token', DualScale(**TOKEN))):
            layers = [SegLinear.of(l, Plan([(K, q)], [N], W8)) for l in plain]
            for path in ('cuda_sm80', 'cuda_sm90'):
                for q in layers: ops._prepare(q, path)
                row['us'][f'{name}, {path}'] = per_call([lambda x=x, q=q: q(x) for x, q in zip(xs, layers)])
        print(row, flush=True)
        yield row


def overheads():
    "Microseconds of the CPU per call, on a layer so small that the GPU waits"
    x, l = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16), nn.Linear(256, 256, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    result = {'bf16': overhead(lambda: l(x))}
    for name, inputs in (('static', [(256, Quantizer())]), ('per token', [(256, Quantizer(**TOKEN))]), ('mixed', kinds(256)['mixed'])):
        q = SegLinear.of(l, Plan(inputs, [256], W8), x)
        use_kernels(q)
        result[name] = overhead(lambda: q(x))
    compiled = torch.compile(q, fullgraph=True)
    with torch.no_grad(): result['mixed, compiled'] = overhead(lambda: compiled(x))
    return result


def geomean(values): return math.exp(statistics.mean(map(math.log, values)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', help='results file')
    parser.add_argument('--only', nargs='*', default=['check', 'use', 'small', 'speed', 'overhead'])
    parser.add_argument('--models', nargs='*', default=['FLUX.1-dev'])
    args = parser.parse_args()
    torch.manual_seed(0)
    print(doctor(), flush=True)
    import cupy
    result = dict(machine=dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, cupy=cupy.__version__, python=platform.python_version()),
                  command='python tools/gpu_ops.py ' + shlex.join(sys.argv[1:]))
    def keep():
        if args.out: Path(args.out).write_text(json.dumps(result, indent=1) + '\n')
    if 'overhead' in args.only: result['overhead'] = overheads(); print(result['overhead'], flush=True)
    keep()
    with torch.no_grad():
        if 'small' in args.only: result['small'] = list(small())
        keep()
        if 'speed' in args.only:
            result['speed'] = [row for model in args.models for row in speed(model)]
            for model in args.models:
                rows = [r for r in result['speed'] if r['model'] == model]
                for name in ('static', 'per token', 'W4A8'): print(f'{model} {name}: {geomean([r["us"]["bf16"]/r["us"][name] for r in rows if r["M"] > 16]):.2f} × bf16')
                planned = sum(r['count']*r['us'][r['planned']] for r in rows)
                print(f'{model}: all linears {sum(r["count"]*r["us"]["bf16"] for r in rows)/planned:.2f} × bf16, as planned', flush=True)
        keep()
    if 'check' in args.only: result['check'] = check()
    keep()
    if 'use' in args.only: check_use()
    sys.exit(bool(result.get('check', {}).get('wrong')))


if __name__ == '__main__': main()
