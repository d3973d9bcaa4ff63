"""Check the kernels for a few rows on fresh random data, then time whole layers of 1 to 16 rows.

    python tools/gpu_small.py --out nbs/results/small.json
    python tools/gpu_small.py --only check

A whole layer: 16-bit activations in, quantized, multiplied, scaled, bias added, 16 bits out. Beside it: the layer in bfloat16, and a copy that
moves as many bytes as the weight has, half of them read and half of them written. Each number is the median over replays of a CUDA graph that makes one call
after the other, on weights that take turns and together are larger than the L2 cache.
"""
import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu import CACHE, activations, geomean, machine
from gpu_shapes import SHAPES

from segquant_nb import cuda, small
from segquant_nb.codes import PackedColumns, quantize_cuda, quantize_reference
from segquant_nb.formats import pack_int4
from segquant_nb.gemm import granule_columns
from segquant_nb.small import w8a16_reference, w8a16_small, w8a8_small, w8a8_small_reference

DEVICE = torch.device('cuda', 0)
ROWS = (1, 2, 4, 8, 16)
LAYERS = {(N, K): f'{model} {what}' for model, layers in SHAPES.items() for M, N, K, _, what in layers if M <= 16}
FAILED = []


# ---- checks ----

def weights(N, columns, bits, group=None, per_span=False):
    highest = 2**(bits - 1) - 1
    codes = columns.pack(torch.randint(-highest - 1, highest + 1, (N, columns.columns), dtype=torch.int8, device=DEVICE))
    spans = len(granule_columns(columns, group)[1])
    scale = torch.rand(*((spans, N) if group or per_span else (N,)), device=DEVICE)*.1/highest
    return pack_int4(codes) if bits == 4 else codes, scale


def same(a, b): return a.dtype == b.dtype and torch.equal(a.float().nan_to_num(9e9), b.float().nan_to_num(9e9))


def check_one(seed):
    "What is wrong with a random layer"
    pick = Random(seed)
    choices = ((1, 31, 32, 64, 100, 257, 700), (768, 1024, 1536, 2432, 3072))[seed % 2]
    columns = PackedColumns([pick.choice(choices) for _ in range(pick.choice((1, 1, 2, 3, 9)))])
    M, N, bits, group = pick.randint(1, 16), pick.choice((1, 7, 50, 75, 1000, 2433, 9216)), pick.choice((8, 4)), pick.choice((None, None, 32, 64, 128))
    if group and columns.width//group > 256: group = 128  # there is no room for the sums of more spans
    dtype, result = pick.choice((torch.bfloat16, torch.float16, torch.float32)), pick.choice((None, torch.float32))
    weight, scale_w = weights(N, columns, bits, group, pick.random() < .3)
    bias = torch.randn(N, device=DEVICE) if pick.random() < .5 else None
    given = dict(bias=bias, columns=columns, group=group, dtype=result)
    if pick.random() < .3: given |= dict(residual=torch.randn(M, N, device=DEVICE).to(result or dtype), gate=torch.randn(1, N, device=DEVICE))
    name = f'({M}, {N}) {columns.sizes if len(columns.sizes) < 4 else "9 segments"} int{bits} group {group} {str(dtype)[6:]}'
    if seed % 4 == 3: return check_floats(name, M, N, weight, scale_w, given, pick)
    dual, kind = pick.random() < .5, pick.choice(('int8', 'int8', 'int4'))
    duals = tuple(pick.random() < .5 for _ in columns.sizes) if dual and pick.random() < .5 else None
    rows = pick.choice((None, None, 1, M))
    scale = None if rows is None else torch.rand(len(columns.sizes)*(1 + dual), rows, device=DEVICE)*.1 + .01
    smooth = columns.pack(torch.rand(1, columns.columns, device=DEVICE) + .5)[0] if pick.random() < .4 else None
    x = activations(M, columns.columns, dtype, accidents=True)
    given |= dict(dual=dual, duals=duals)
    if pick.random() < .3: x, given['dtype'] = quantize_reference(x, columns, kind, scale, dual, smooth, duals=duals), result or dtype
    else: given |= dict(scale=scale, smooth=smooth, codes=kind, silu=dtype != torch.float32 and pick.random() < .3)
    want, runs = w8a8_small_reference(x, weight, scale_w, **given), [w8a8_small(x, weight, scale_w, **given) for _ in range(2)]
    return f'{name} dual {duals or dual} {kind} scales {rows} smooth {smooth is not None} silu {given.get("silu")}', all(same(y, want) for y in runs)


def check_floats(name, M, N, weight, scale_w, given, pick):
    "Against float64: half a step of the result's type, and what float32 sums may lose"
    dtype, silu = pick.choice((torch.bfloat16, torch.float16)), pick.random() < .5
    x, residual, gate = torch.randn(M, given['columns'].columns, device=DEVICE).to(dtype), given.pop('residual', None), given.pop('gate', None)
    plain = {k: v for k, v in given.items() if k != 'dtype'}
    exact, magnitude = w8a16_reference(x, weight, scale_w, **plain, silu=silu)
    if residual is not None:
        residual = residual.to(given['dtype'] or dtype)
        given |= dict(residual=residual, gate=gate)
        exact, magnitude = residual.double() + gate*exact, residual.double().abs() + gate.abs()*magnitude
    y, again = (w8a16_small(x, weight, scale_w, **given, silu=silu) for _ in range(2))
    half_step = torch.exp2(torch.frexp(exact).exponent.double() - 1).clamp(min=torch.finfo(y.dtype).tiny)*torch.finfo(y.dtype).eps/2
    beyond = (((y - exact).abs() - half_step)/magnitude).max().item()*2**24
    return f'{name} {str(dtype)[6:]} inputs, silu {silu}: {beyond:.1f} · 2⁻²⁴ beyond half a step', beyond < 32 and torch.equal(y, again)


def check(cases):
    "On several threads: most of the time goes into compiling"
    def one(seed):
        try: name, ok = check_one(seed)
        except Exception as e: name, ok = f'seed {seed}: {type(e).__name__}: {e}', False
        if not ok: FAILED.append(name)
        print(f'{"ok " if ok else "BAD"} {name}', flush=True)
        return ok

    start = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as pool: right = sum(pool.map(one, range(cases)))
    silu = {}
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, device=DEVICE).to(torch.uint16).view(dtype)
        x = torch.where(x.isfinite(), x, 0)
        # A layer of one column whose only weight is 1, with a scale of 1, passes codes on; as floats it passes everything.
        weight, one_ = torch.ones(1, 64, dtype=torch.int8, device=DEVICE), torch.ones(1, device=DEVICE)
        rows = F.pad(x.view(-1, 1), (0, 63)).view(-1, 16, 64)
        got = torch.cat([w8a16_small(r, weight, one_, silu=True, dtype=torch.float32) for r in rows]).view(-1)
        silu[str(dtype)[6:]] = int((got != F.silu(x).float()).sum())
        if silu[str(dtype)[6:]]: FAILED.append(f'silu {dtype}')
    print(f'{right} of {cases} layers right; values of 65536 that differ from F.silu: {silu}; {time.time() - start:.0f} s')
    return dict(layers=cases, wrong=cases - right, silu_differs=silu)


# ---- times ----

def apart(call):
    "With kernels that do not overlap"
    with mock.patch.object(small, '_early', lambda arch: False): return call()


def kinds(columns, x, weight8, weight4, scale_w, group_scale, bias):
    "What is timed, by name: a call for the i-th weight"
    K, made, dual = columns.columns, quantize_cuda(x, columns), quantize_cuda(x, columns, dual=True)
    step = torch.full((1, 1), .03, device=DEVICE)
    halves = PackedColumns((K//128*64, K - K//128*64))
    return {
        'W8A8': lambda i: w8a8_small(x, weight8[i], scale_w, bias),
        'W8A8 without overlap': lambda i: apart(lambda: w8a8_small(x, weight8[i], scale_w, bias)),
        'W8A8 static': lambda i: w8a8_small(x, weight8[i], scale_w, bias, scale=step),
        'W8A8 dual': lambda i: w8a8_small(x, weight8[i], scale_w, bias, dual=True),
        'W8A8 two segments': lambda i: w8a8_small(x, weight8[i], scale_w, bias, halves),
        'W8A8 with SiLU': lambda i: w8a8_small(x, weight8[i], scale_w, bias, silu=True),
        'W8A8 from codes': lambda i: w8a8_small(made, weight8[i], scale_w, bias),
        'W8A8 dual from codes': lambda i: w8a8_small(dual, weight8[i], scale_w, bias, dual=True),
        'W4A8': lambda i: w8a8_small(x, weight4[i], scale_w, bias),
        'W4A8 groups of 128': lambda i: w8a8_small(x, weight4[i], group_scale, bias, group=128),
        'W8A16': lambda i: w8a16_small(x, weight8[i], scale_w, bias),
        'W4A16': lambda i: w8a16_small(x, weight4[i], scale_w, bias),
        'W4A16 groups of 128': lambda i: w8a16_small(x, weight4[i], group_scale, bias, group=128)}


def microseconds(call, n, repeats=7):
    "Median time of one call, from replays of a graph that makes a call on every weight, twice"
    for i in range(n): call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in (*range(n), *range(n)): call(i)
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(); graph.replay(); end.record(); end.synchronize()
        times.append(start.elapsed_time(end)*1000/(2*n))
        time.sleep(.001)  # the card runs at its power limit
    return statistics.median(times[2:])


def layer(N, K, n=1):
    columns = PackedColumns((K,))
    weight8 = [torch.randint(-128, 128, (N, K), dtype=torch.int8, device=DEVICE) for _ in range(n)]
    weight4 = [torch.randint(256, (N, K//2), dtype=torch.uint8, device=DEVICE) for _ in range(n)]
    return columns, weight8, weight4, torch.rand(N, device=DEVICE)*.01, torch.rand(-(-K//128), N, device=DEVICE)*.01, torch.randn(N, device=DEVICE)


def compile_all(shapes):
    "Everything that will be timed, on several threads"
    calls, alone = [], []  # what changes the module must not run beside others
    for N, K in shapes:
        columns, *rest = layer(N, K)
        for M in ROWS:
            for name, call in kinds(columns, activations(M, K), *rest).items(): (alone if 'without' in name else calls).append(call)
    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(lambda call: call(0), calls))
    for call in alone: call(0)
    torch.cuda.synchronize()


def time_layers(shapes, seconds):
    "A line for each layer and number of rows"
    start, rows = time.time(), []
    print(f'{"(M, N, K)":18}{"copy":>7}{"bf16":>7} | ' + 'µs and share of the copy\'s bandwidth')
    for N, K in shapes:
        n = min(64, max(3, math.ceil(2.5*CACHE/(N*K))))
        columns, *rest = layer(N, K, n)
        room = [torch.empty(2, N*K//2, dtype=torch.uint8, device=DEVICE).random_() for _ in range(n)]
        copy = microseconds(lambda i: room[i][1].copy_(room[i][0]), n)
        halves = [torch.empty(2, N*K//4, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2*n)]
        copy4 = microseconds(lambda i: halves[i][1].copy_(halves[i][0]), 2*n)
        weight16, bias16 = [torch.randn(N, K, device=DEVICE).bfloat16() for _ in range(n)], torch.randn(N, device=DEVICE).bfloat16()
        for M in ROWS:
            if time.time() - start > seconds: return rows
            x = activations(M, K)
            took = {name: microseconds(call, n) for name, call in kinds(columns, x, *rest).items()}
            bf16 = microseconds(lambda i: F.linear(x, weight16[i], bias16), n)
            rows.append(dict(M=M, N=N, K=K, what=LAYERS[N, K], copy_us=copy, copy_half_us=copy4, bf16_us=bf16, us=took))
            print(f'({M}, {N}, {K})'.ljust(18) + f'{copy:7.2f}{bf16:7.2f} | ' + ' | '.join(
                f'{name} {us:.2f} {(copy4 if "W4" in name else copy)/us:.0%}' for name, us in took.items()), flush=True)
    return rows


def summary(rows):
    for M in dict.fromkeys(r['M'] for r in rows):
        these = [r for r in rows if r['M'] == M]
        def mean(value): return geomean([value(r) for r in these])
        print(f'{M:2} rows, geometric means: W8A8 {mean(lambda r: r["copy_us"]/r["us"]["W8A8"]):.0%} of a copy, {mean(lambda r: r["bf16_us"]/r["us"]["W8A8"]):.2f} × bf16, dual '
              f'{mean(lambda r: r["us"]["W8A8 dual"]/r["us"]["W8A8"]):.2f} × single, two segments {mean(lambda r: r["us"]["W8A8 two segments"]/r["us"]["W8A8"]):.2f} × one; '
              f'× bf16: W4A8 {mean(lambda r: r["bf16_us"]/r["us"]["W4A8"]):.2f}, W8A16 {mean(lambda r: r["bf16_us"]/r["us"]["W8A16"]):.2f}, W4A16 {mean(lambda r: r["bf16_us"]/r["us"]["W4A16"]):.2f}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=('check', 'time', 'compile'), help='default: check, then time')
    parser.add_argument('--cases', type=int, default=160, help='random layers to check')
    parser.add_argument('--seconds', type=float, default=1e9, help='stop timing after this time')
    parser.add_argument('--out', type=Path, help='where to write the numbers, as JSON; what is there of the other part is kept')
    args = parser.parse_args()
    if problem := cuda.cuda_problem(): sys.exit(problem)
    about = machine()
    print(json.dumps(about))
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    found |= dict(machine=about, command=shlex.join(['python', *sys.argv]))
    if args.only in (None, 'check'):
        torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what torch.empty returns
        found['check'] = check(args.cases)
        torch.use_deterministic_algorithms(False)
    if args.only in (None, 'compile', 'time'): compile_all(LAYERS)
    if args.only in (None, 'time'):
        found['layers'] = time_layers(LAYERS, args.seconds)
        summary(found['layers'])
    def rounded(value):
        if isinstance(value, dict): return {k: rounded(v) for k, v in value.items()}
        if isinstance(value, list): return [rounded(v) for v in value]
        return round(value, 2) if isinstance(value, float) else value
    if args.out: args.out.write_text(json.dumps(rounded(found), indent=0, ensure_ascii=False) + '\n')
    if FAILED: sys.exit(f'{len(FAILED)} checks failed: ' + '; '.join(FAILED))


if __name__ == '__main__':
    main()
