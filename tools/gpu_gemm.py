"""Check the Hopper W8A8 product on fresh random data, then time it on the shapes of diffusion models.

    python tools/gpu_gemm.py --out nbs/results/hopper_gemm.json           # check, time, print a line a shape
    python tools/gpu_gemm.py --tune --out nbs/results/hopper_tiles.json   # time every tile on every shape
    python tools/gpu_gemm.py --check                                      # only check
    python tools/gpu_gemm.py --time --out nbs/results/hopper_gemm.json    # only time

Each number is the median over replays of a CUDA graph that runs one function again and again, over inputs
and outputs that take turns and together are larger than the L2 cache. So launch overhead is in none of the
numbers, the eager baselines' either.
"""
import argparse
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpu_shapes

from segquant_nb import cuda, hopper_gemm
from segquant_nb.codes import PackedColumns
from segquant_nb.gemm import w8a8_reference
from segquant_nb.hopper_gemm import HopperLinear, HopperTile, fp8_sm90, hopper_tiles, pick_hopper_tile, w8a8_sm90

# One row is the business of other kernels.
SHAPES = {model: [(M, N, K, count) for M, N, K, count, _ in layers if M > 1] for model, layers in gpu_shapes.SHAPES.items()}
DEVICE = torch.device('cuda', 0)


def codes(rows, columns):
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=DEVICE)


def floats8(rows, columns):
    "8-bit floats over most of their range"
    x = torch.randn(rows, columns, device=DEVICE)*2**torch.randint(-6, 6, (rows, columns), device=DEVICE)
    return x.to(torch.float8_e4m3fn)


def scales(*shape):
    return torch.rand(shape, device=DEVICE)*.02 + .001


# ---- correctness ----

def exactly(codes, weight, scale_x, scale_w, bias, columns, dual, duals=None, residual=None, gate=None, low_rank=None):
    "float64, and the sum of the magnitudes of all that is added"
    y = size = torch.zeros(len(codes), len(weight), dtype=torch.float64, device=DEVICE)
    scale_w = scale_w.double().expand(len(columns.sizes), -1)
    for i, (start, end) in enumerate(zip(columns.starts, columns.ends)):
        x, w = codes[:, start:end].double(), weight[:, start:end].double()
        both = dual and (duals is None or duals[i])
        for path, half in enumerate((x.clamp(min=0), x.clamp(max=0)) if both else (x,)):
            step = scale_x[i*(1 + dual) + path].double()[:, None]*scale_w[i]
            y, size = y + step*(half @ w.T), size + step*(half.abs() @ w.abs().T)
    if low_rank is not None:
        t, up = (v.double() for v in low_rank)
        y, size = y + t @ up.T, size + t.abs() @ up.abs().T
    if bias is not None: y, size = y + bias.double(), size + bias.double().abs()
    if residual is None: return y, size
    by = 1. if gate is None else gate.double().repeat_interleave(len(y)//len(gate), 0)
    return by*y + residual.double(), abs(by)*size + residual.double().abs()


def ordered(y):
    "The bits of floats as integers in the same order"
    bits = y.view({2: torch.int16, 4: torch.int32}[y.element_size()]).long()
    return torch.where(bits < 0, -(bits & (2**(8*y.element_size() - 1) - 1)), bits)


def check(M, N, sizes, dtype, tile, dual=False, tokens=True, bias=True, residual=False, duals=None, gated=True, low=0, fp8=False,
          cut=None):
    columns = PackedColumns(sizes)
    count = len(sizes)
    matrix = floats8 if fp8 else codes
    def packed(rows):  # there are no copies of slices of 8-bit floats
        return columns.pack(matrix(rows, sum(sizes)).view(torch.int8)).view(torch.float8_e4m3fn if fp8 else torch.int8)
    given = dict(codes=packed(M), weight=packed(N), scale_x=scales(count*(1 + dual), M if tokens else 1),
                 bias=torch.randn(N, device=DEVICE)*50 if bias else None,
                 scale_w=scales(count, N) if tokens and count > 1 else scales(N), columns=columns, dual=dual)
    extra = dict(duals=duals)
    if residual: extra |= dict(residual=(torch.randn(M, N, device=DEVICE)*20).to(dtype))
    if residual and gated: extra |= dict(gate=torch.randn(2 if M % 2 == 0 else 1, N, device=DEVICE))
    if low:
        kind = torch.float16 if low//8 % 2 else torch.bfloat16
        extra |= dict(low_rank=tuple(torch.randn(n, low, device=DEVICE).to(kind)*5 for n in (M, N)))
    room = torch.full((M + 64, N), math.nan, dtype=dtype, device=DEVICE)  # NaN around the output and in it
    out = room[32:M + 32]
    options = dict(dtype=dtype, out=out, tile=tile) | (dict(cut=cut) if fp8 else {})
    run = lambda: (fp8_sm90 if fp8 else w8a8_sm90)(**given, **extra, **options)
    run()
    torch.cuda.synchronize()
    y = out.clone()
    out.fill_(math.nan)
    run()
    same = torch.equal(out, y)
    outside = bool(room[:32].isnan().all() and room[M + 32:].isnan().all())
    exact, size = exactly(**given, **extra)
    if fp8 or low:
        # The tensor cores add 8-bit floats with about 13 bits, 16-bit ones with 23 or more; a wrong column is far outside.
        bound = size*(2**-9 if fp8 and not cut else 2**-11 if fp8 else (low + 8)*2**-23) + exact.abs()*torch.finfo(dtype).eps/2
        bad = ~((y.double() - exact).abs() <= bound)
        error = (y.double() - exact).norm()/exact.norm()
        text = f'; error {error:.1e} of the norm, at most {((y.double() - exact).abs()/bound).max():.2f} of the bound'
    else:
        off = (ordered(y) - ordered(w8a8_reference(**given, **extra, dtype=dtype))).abs()
        # A float64 detour stands for the fused multiply-add of the gate; twice in 10^8 it rounds twice.
        bad = off > (1 if residual else 0)
        ulp = (ordered(y) - ordered(exact.to(dtype))).abs()
        text = f'; from float64 {(ulp > 0).float().mean():.1e} differ, {(ulp > 1).float().mean():.1e} by more than 1 ulp'
    ok = same and outside and not bad.any() and not y.isnan().any()
    words = ' dual'*dual + ' residual'*residual + ' fp8'*fp8 + (f' rank {low}' if low else '') + (f' cut {cut}' if cut else '')
    print(f'{"ok " if ok else "BAD"} {M}×{N}×{"+".join(map(str, sizes))} {str(dtype)[6:]} {tile}{words}: '
          f'{int(bad.sum())} of {y.numel()} differ{text}'
          f'{"" if same else ", NOT DETERMINISTIC"}{"" if outside else ", WROTE OUTSIDE"}', flush=True)
    if not ok: print(f'    first bad element {divmod(int((bad | y.isnan()).flatten().int().argmax()), N)}')
    return ok


def random_sizes(K, count):
    "Random sizes that fill K"
    at = sorted(random.sample(range(1, K), count - 1))
    return tuple(b - a for a, b in zip([0, *at], [*at, K]))


def compile_all(variants):
    "Many at a time; a variant: tile, dtype, dual, segmented, residual, type of the low-rank product, fp8"
    def one(variant):
        cuda._cubin_file(hopper_gemm._SOURCE, cuda.gpu_arch(DEVICE), hopper_gemm._defines(*variant))
    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(one, set(variants)))


def variant(M, N, sizes, dtype=torch.bfloat16, tile=None, dual=False, residual=False, low=0, fp8=False, cut=None, **_):
    "What `compile_all` takes, for a check"
    form = hopper_gemm._form(PackedColumns(sizes), dual, cut)
    kind = dual, form > 0, residual, low > 0
    tile = tile or pick_hopper_tile(M, N, *kind)
    return tile, dtype, dual, form, residual, (1 + low//8 % 2 if low else 0), fp8, tile.halves(M, N, *kind) is not None


def cases():
    "What is checked: every tile on ragged shapes, every type and option; then large shapes"
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    i = 0
    for dual, segmented, low, fp8 in product((False, True), repeat=4):
        for tile in hopper_tiles(dual, segmented, False, low):
            for M, N, K in random.sample([(256, 512, 384), (77, 648, 336), (333, 2432, 1280), (1031, 1280, 640)], 2):
                i += 1
                sizes = random_sizes(K, random.choice((2, 3, 5))) if segmented else (K,)
                if segmented and i % 3 == 0: sizes = 2*K//5, K - 2*K//5  # two of more than a stage
                yield dict(M=M, N=N, sizes=sizes, dtype=dtypes[i % 3], tile=tile, dual=dual, tokens=i % 2 == 0,
                           bias=i % 4 != 0, residual=i % 5 == 0 and tile in hopper_tiles(dual, segmented, True, low), gated=i % 3 != 0,
                           duals=tuple(random.random() < .5 for _ in sizes) if dual and segmented and i % 2 else None,
                           low=random.choice((8, 24, 32, 64, 72, 128)) if low else 0, fp8=fp8,
                           cut=random.choice((32, 96, 128, 256)) if fp8 and segmented and i % 2 else None)
    wide, large, half = HopperTile(256), HopperTile(192), HopperTile(128)
    for M, N, sizes, tile, options in (
            (4608, 3072, (3072,), wide, {}), (4096, 3072, (12288,), wide, dict(dtype=torch.float16)),
            (4608, 3072, (3072, 12288), half, dict(dual=True, duals=(False, True))),
            (4096, 1536, (64,)*24, large, {}), (4096, 3072, (12288,), half, dict(dual=True)),
            (4608, 3072, (3072,), HopperTile(192, 3), dict(low=32)), (4096, 3072, (3072, 3072), large, dict(low=64)),
            (4096, 3072, (12288,), wide, dict(fp8=True)), (4096, 3072, (12288,), large, dict(fp8=True, cut=512)),
            (4096, 3072, (12288,), large, dict(fp8=True, cut=128)),
            # halves of tiles: the last ones, where y ends early, both
            *((M, N, sizes, large if tile is wide and len(sizes) > 1 else tile, dict(dtype=dtype, low=low, dual=dual and tile is not wide and len(sizes) == 1))
              for M, N, tile in ((4608, 3072, large), (4608, 3064, wide), (4096, 2432, wide), (4590, 2304 + 72, large), (400, 328, half))
              for sizes, dtype, low, dual in (((640,), torch.bfloat16, 0, True), ((320, 352), torch.float16, 0, False), ((704,), torch.float32, 32, True)))):
        yield dict(M=M, N=N, sizes=sizes, dtype=torch.bfloat16, tile=tile) | options


def check_all():
    chosen, results = list(cases()), []
    for i in range(0, len(chosen), 48):
        compile_all(variant(**c) for c in chosen[i:i + 48])
        results += [check(**c) for c in chosen[i:i + 48]]
    print(f'{sum(results)} of {len(results)} checks passed', flush=True)
    return all(results)


# ---- speed ----

def graph_of(functions):
    "A CUDA graph that runs each function once"
    for f in functions: f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for f in functions: f()
    return graph


def microseconds(contenders, rounds=3, milliseconds=4):
    """Median time of each contender's functions; None where one does not run

    The card runs at its power limit, and what ran before a contender decides the clock it gets. So they run in random
    order, each after a rest.
    """
    graphs, times = {}, {}
    for name, functions in contenders.items():
        try: graphs[name] = graph_of(functions), len(functions)
        except Exception as e: print(f'{name}: {type(e).__name__} {str(e).splitlines()[0]}', file=sys.stderr)
    for _ in range(rounds):
        for name in random.sample(list(graphs), len(graphs)):
            graph, count = graphs[name]
            time.sleep(2e-3*milliseconds)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(); graph.replay(); end.record(); end.synchronize()
            replays = max(3, min(200, int(milliseconds/start.elapsed_time(end))))
            events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            events[0].record()
            for e in events[1:]:
                graph.replay()
                e.record()
            events[-1].synchronize()
            times.setdefault(name, []).extend(1000*a.elapsed_time(b)/count for a, b in zip(events, events[1:]))
    return {name: statistics.median(times[name]) if name in times else None for name in contenders}


class Case:
    "Inputs of one shape that take turns, more of them than the L2 cache holds"

    def __init__(self, M, N, K, l2):
        size = M*K + N*K + 2*M*N
        self.M, self.N, self.K = M, N, K
        sets = max(2, min(24, math.ceil(2.5*l2/size)))
        self.x, self.w = [codes(M, K) for _ in range(sets)], [codes(N, K) for _ in range(sets)]
        self.out = [torch.empty(M, N, dtype=torch.bfloat16, device=DEVICE) for _ in range(sets)]
        self.scale_x, self.scale_w, self.bias = scales(M), scales(N), torch.randn(N, device=DEVICE)
        self.sets, self.launches = sets, max(sets, min(48, int(200e9/(M*N*K))))

    def each(self, f):
        return [lambda i=i: f(i % self.sets) for i in range(self.launches)]

    def ours(self, sizes=None, dual=False, low=0, fp8=False, **options):
        columns = PackedColumns(sizes or (self.K,))
        count = len(columns.sizes)
        scale_x, scale_w = scales(count*(1 + dual), self.M), scales(count, self.N) if sizes else self.scale_w
        if low: options['low_rank'] = tuple(torch.randn(n, low, device=DEVICE).bfloat16() for n in (self.M, self.N))
        x, w = self.floats() if fp8 else (self.x, self.w)
        return self.each(lambda i: (fp8_sm90 if fp8 else w8a8_sm90)(x[i], w[i], scale_x, scale_w, self.bias, columns, dual,
                                                                    out=self.out[i], **options))

    def floats(self):
        "The codes as 8-bit floats"
        if not hasattr(self, 'x8'): self.x8, self.w8 = ([t.to(torch.float8_e4m3fn) for t in ts] for ts in (self.x, self.w))
        return self.x8, self.w8

    def rivals(self):
        x16, w16 = [t.bfloat16() for t in self.x], [t.bfloat16() for t in self.w]
        bias, column, row = self.bias.bfloat16(), self.scale_x[:, None], self.scale_w
        (x8, w8), scale8 = self.floats(), self.scale_w[None]

        def int_mm(i): return torch._int_mm(self.x[i], self.w[i].t())

        def int_mm_epilogue(i): return (int_mm(i).float()*column*row + self.bias).bfloat16()

        def fp8(i):
            scale = x16[i].abs().amax(1, keepdim=True).float()/448
            x = (x16[i].float()/scale).to(torch.float8_e4m3fn)
            return torch._scaled_mm(x, w8[i].t(), scale, scale8, bias=bias, out_dtype=torch.bfloat16)

        def scaled_mm(i, fast=False):
            return torch._scaled_mm(x8[i], w8[i].t(), column, scale8, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast)

        t, up = (torch.randn(n, 32, device=DEVICE).bfloat16() for n in (self.M, self.N))

        def branch(i):
            return w8a8_sm90(self.x[i], self.w[i], column.view(1, -1), row, self.bias, residual=F.linear(t, up), out=self.out[i])

        return {'bf16 linear': self.each(lambda i: F.linear(x16[i], w16[i], bias)),
                '_int_mm': self.each(int_mm), '_int_mm + eager epilogue': self.each(int_mm_epilogue),
                'fp8 quantize + _scaled_mm': self.each(fp8), '_scaled_mm': self.each(scaled_mm),
                '_scaled_mm, fast': self.each(lambda i: scaled_mm(i, True)), 'rank 32 as residual': self.each(branch)}


def ratio(a, b): return a/b if a and b else math.nan


def geomean(values):
    values = [v for v in values if v == v]
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def time_all(models, l2):
    compile_all(variant(M, N, sizes, dual=dual, low=low, fp8=fp8) for model in models for M, N, K, _ in SHAPES[model]
                for two in [(K//64*32, K - K//64*32)] for sizes, dual, low, fp8 in (
                    ((K,), False, 0, False), ((K,), True, 0, False), (two, False, 0, False), (two, True, 0, False), ((K,), False, 32, False),
                    ((K,), False, 0, True)))
    compile_all(variant(M, N, (K,), residual=True) for model in models for M, N, K, _ in SHAPES[model])
    rows, seen = [], {}
    print(f'{"M":>5}{"N":>6}{"K":>6} |{"µs":>7}{"TOPS":>6} |{"bf16":>6}{"_int_mm":>8}{"+ epilogue":>11}{"_scaled_mm":>11}{"+ quant.":>9} |{"dual":>6}'
          f'{"segments":>9}{"both":>6}{"rank 32":>8}{"rank 64":>8}{"fp8":>6} (our time is 1)  tile', flush=True)
    for model in models:
        of_model = []
        for M, N, K, count in SHAPES[model]:
            if (M, N, K) not in seen:
                case = Case(M, N, K, l2)
                two = (K//64*32, K - K//64*32)
                contenders = {'ours': case.ours(), 'dual': case.ours(dual=True),
                              'segments': case.ours(two),
                              'dual segments': case.ours(two, True, duals=(False, True)), 'rank 32': case.ours(low=32),
                              'rank 64': case.ours(low=64), 'fp8': case.ours(fp8=True), **case.rivals()}
                seen[M, N, K] = microseconds(contenders)
                del case, contenders
                torch.cuda.empty_cache()
            t = seen[M, N, K]
            row = dict(model=model, M=M, N=N, K=K, count=count, microseconds={k: v and round(v, 2) for k, v in t.items()},
                       tops=round(2e-6*M*N*K/t['ours'], 1))
            of_model.append(row)
            tile = pick_hopper_tile(M, N)
            r = {name: ratio(value, t['ours']) for name, value in t.items()}
            print(f'{M:5}{N:6}{K:6} |{t["ours"]:7.1f}{row["tops"]:6.0f} |{r["bf16 linear"]:6.2f}{r["_int_mm"]:8.2f}'
                  f'{r["_int_mm + eager epilogue"]:11.2f}{r["_scaled_mm"]:11.2f}{r["fp8 quantize + _scaled_mm"]:9.2f} |'
                  f'{r["dual"]:6.2f}{r["segments"]:9.2f}{r["dual segments"]:6.2f}{r["rank 32"]:8.2f}{r["rank 64"]:8.2f}{r["fp8"]:6.2f}'
                  f'  {tile}', flush=True)
        rows += of_model
        means = {name: geomean([ratio(r['microseconds'][name], r['microseconds']['ours']) for r in of_model])
                 for name in of_model[0]['microseconds']}
        print(f'{model}: geometric means: ' + ', '.join(f'{k} {v:.2f}' for k, v in means.items() if k != 'ours'))
    return rows


def tune(models, l2):
    rows = {}
    for M, N, K, _ in [shape for model in models for shape in SHAPES[model]]:
        if (M, N, K, False, False) in rows: continue
        case = Case(M, N, K, l2)
        for dual, sizes in product((False, True), (None, (K//64*32, K - K//64*32))):
            kind = dual, sizes is not None
            times = microseconds({str(t): case.ours(sizes, dual, tile=t) for t in hopper_tiles(*kind)}, rounds=2, milliseconds=3)
            rows[M, N, K, *kind] = dict(M=M, N=N, K=K, dual=dual, segmented=kind[1], microseconds={k: round(v, 2) for k, v in times.items()})
            print(f'{M}×{N}×{K}{" dual" if dual else ""}{" segments" if sizes else ""} picks {pick_hopper_tile(M, N, *kind)}: '
                  + '  '.join(f'{k} {v:.1f}' for k, v in sorted(times.items(), key=lambda item: item[1])), flush=True)
        del case
        torch.cuda.empty_cache()
    return list(rows.values())


def machine():
    properties = torch.cuda.get_device_properties(DEVICE)
    driver = subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'],
                            capture_output=True, text=True).stdout.split('\n')[0]
    import cupy
    return dict(gpu=properties.name, processors=properties.multi_processor_count, l2=properties.L2_cache_size,
                driver=driver, torch=torch.__version__, cuda=torch.version.cuda, cupy=cupy.__version__,
                nvrtc='.'.join(map(str, cupy.cuda.nvrtc.getVersion())), python=platform.python_version(),
                command=shlex.join(['python', 'tools/gpu_gemm.py', *(a if not a.endswith('.json') else f'nbs/results/{Path(a).name}'
                                                                     for a in sys.argv[1:])]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='only check')
    parser.add_argument('--time', action='store_true', help='only time')
    parser.add_argument('--tune', action='store_true', help='time every tile on every shape')
    parser.add_argument('--models', nargs='+', default=list(SHAPES), choices=SHAPES)
    parser.add_argument('--out', help='where to write the results')
    args = parser.parse_args()
    if problem := cuda.cuda_problem(DEVICE): parser.exit(1, problem + '\n')
    about = machine()
    print(', '.join(f'{k} {v}' for k, v in about.items() if k != 'command'), flush=True)
    if args.tune:
        compile_all(variant(M, N, (K,)*(1 + segmented), tile=tile, dual=dual) for model in args.models for M, N, K, _ in SHAPES[model]
                    for dual, segmented in product((False, True), repeat=2) for tile in hopper_tiles(dual, segmented))
        rows = tune(args.models, about['l2'])
    else:
        passed = args.time or check_all()
        if args.check or not passed: raise SystemExit(not passed)
        rows = time_all(args.models, about['l2'])
    if args.out:
        lines = ',\n'.join(' ' + json.dumps(row) for row in rows)
        Path(args.out).write_text(f'{{"machine": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
