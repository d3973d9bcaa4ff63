"""Check the Hopper W8A8 product on fresh random data, then time it on the shapes of diffusion models.

    python tools/gpu_gemm.py --out nbs/results/hopper_gemm.json           # check, time, print a line a shape
    python tools/gpu_gemm.py --tune --out nbs/results/hopper_tiles.json   # time every tile on every shape
    python tools/gpu_gemm.py --check                                      # only check

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
from segquant_nb.hopper_gemm import HopperTile, hopper_tiles, pick_hopper_tile, w8a8_sm90

# One row is the business of other kernels.
SHAPES = {model: [(M, N, K, count) for M, N, K, count, _ in layers if M > 1] for model, layers in gpu_shapes.SHAPES.items()}
DEVICE = torch.device('cuda', 0)


def codes(rows, columns):
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=DEVICE)


def scales(*shape):
    return torch.rand(shape, device=DEVICE)*.02 + .001


# ---- correctness ----

def reference(given, duals, residual, gate, dtype):
    "The order of operations of the kernel: `w8a8_reference`, and what that does not know"
    if duals or residual is not None:
        codes, scale_x, columns = given['codes'], given['scale_x'].clone(), given['columns']
        plain = dict(given, columns=None, dual=False, bias=None, scale_x=scale_x[:1])
        y = torch.zeros(len(codes), len(given['weight']), device=DEVICE)
        for i, (start, end) in enumerate(zip(columns.starts, columns.ends)):
            part = dict(plain, weight=given['weight'][:, start:end])
            if given['scale_w'].ndim == 2: part['scale_w'] = given['scale_w'][i]
            terms = 1 + given['dual']
            both = given['dual'] and (duals is None or duals[i])
            x = codes[:, start:end]
            for path, half in enumerate((x.clamp(min=0), x.clamp(max=0)) if both else (x,)):
                part.update(codes=half, scale_x=scale_x[i*terms + path][None])
                y += w8a8_reference(**part, dtype=torch.float32)
        if given['bias'] is not None: y += given['bias']
        if residual is not None:
            by = gate.double().repeat_interleave(len(y)//len(gate), 0)
            y = (by*y.double() + residual.double()).float()
        y = y.to(dtype)
    else: y = w8a8_reference(**given, dtype=dtype)
    return y


def exactly(codes, weight, scale_x, scale_w, bias, columns, dual):
    "float64"
    y, scale_w = 0, scale_w.double().expand(len(columns.sizes), -1)
    for i, (start, end) in enumerate(zip(columns.starts, columns.ends)):
        x, w = codes[:, start:end].double(), weight[:, start:end].double()
        for path, half in enumerate((x.clamp(min=0), x.clamp(max=0)) if dual else (x,)):
            y = y + scale_x[i*(1 + dual) + path].double()[:, None]*scale_w[i]*(half @ w.T)
    return y if bias is None else y + bias.double()


def ordered(y):
    "The bits of floats as integers in the same order"
    bits = y.view({2: torch.int16, 4: torch.int32}[y.element_size()]).long()
    return torch.where(bits < 0, -(bits & (2**(8*y.element_size() - 1) - 1)), bits)


def check(M, N, sizes, dtype, tile, dual=False, tokens=True, bias=True, residual=False, duals=None):
    columns = PackedColumns(sizes)
    count, packed = len(sizes), columns.pack
    given = dict(codes=packed(codes(M, sum(sizes))), weight=packed(codes(N, sum(sizes))),
                 scale_x=scales(count*(1 + dual), M if tokens else 1), bias=torch.randn(N, device=DEVICE)*50 if bias else None,
                 scale_w=scales(count, N) if tokens and count > 1 else scales(N), columns=columns, dual=dual)
    onto = torch.randn(M, N, device=DEVICE).to(dtype)*20 if residual else None
    gate = torch.randn(2 if M % 2 == 0 else 1, N, device=DEVICE) if residual else None
    room = torch.full((M + 64, N), math.nan, dtype=dtype, device=DEVICE)  # NaN around the output and in it
    out = room[32:M + 32]
    run = lambda: w8a8_sm90(**given, dtype=dtype, duals=duals, residual=onto, gate=gate, out=out, tile=tile)
    run()
    torch.cuda.synchronize()
    y = out.clone()
    out.fill_(math.nan)
    run()
    same = torch.equal(out, y)
    outside = bool(room[:32].isnan().all() and room[M + 32:].isnan().all())
    off = (ordered(y) - ordered(reference(given, duals, onto, gate, dtype))).abs()
    # A float64 detour stands for the fused multiply-add of the gate; twice in 10^8 it rounds twice.
    bad = off > (1 if residual else 0)
    ok = same and outside and not bad.any() and not y.isnan().any()
    text = ''
    if not residual and not duals:
        ulp = (ordered(y) - ordered(exactly(**given).to(dtype))).abs()
        text = f'; from float64 {(ulp > 0).float().mean():.1e} differ, {(ulp > 1).float().mean():.1e} by more than 1 ulp'
    print(f'{"ok " if ok else "BAD"} {M}×{N}×{"+".join(map(str, sizes))} {str(dtype)[6:]} '
          f'{tile}{" dual" if dual else ""}{" residual" if residual else ""}: '
          f'{int(bad.sum())} of {y.numel()} differ{text}'
          f'{"" if same else ", NOT DETERMINISTIC"}{"" if outside else ", WROTE OUTSIDE"}', flush=True)
    if not ok: print(f'    first bad element {divmod(int((bad | y.isnan()).flatten().int().argmax()), N)}')
    return ok


def cut(K, count):
    "Random sizes that fill K"
    at = sorted(random.sample(range(1, K), count - 1))
    return tuple(b - a for a, b in zip([0, *at], [*at, K]))


def compile_all(variants):
    "Many at a time; a variant: tile, dtype, dual, segmented, residual"
    def one(variant):
        cuda._cubin_file(hopper_gemm._SOURCE, cuda.gpu_arch(DEVICE), hopper_gemm._defines(*variant))
    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(one, set(variants)))


def cases():
    "What is checked: every tile on ragged shapes, every type and option; then large shapes"
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    for dual, segmented in product((False, True), repeat=2):
        for i, tile in enumerate(hopper_tiles(dual, segmented)):
            for M, N, K in ((256, 512, 384), (77, 648, 336), (333, 2432, 1280), (1031, 1280, 640)):
                i += 1
                sizes = cut(K, random.choice((2, 3, 5))) if segmented else (K,)
                yield dict(M=M, N=N, sizes=sizes, dtype=dtypes[i % 3], tile=tile, dual=dual, tokens=i % 2 == 0,
                           bias=i % 4 != 0, residual=i % 5 == 0 and tile in hopper_tiles(dual, segmented, True),
                           duals=tuple(random.random() < .5 for _ in sizes) if dual and segmented and i % 2 else None)
    large, half = HopperTile(256), HopperTile(128)
    for M, N, sizes, tile, options in (
            (4608, 3072, (3072,), large, {}), (4096, 3072, (12288,), large, dict(dtype=torch.float16)),
            (4608, 3072, (3072, 12288), half, dict(dual=True, duals=(False, True))),
            (4096, 1536, (64,)*24, HopperTile(192), {}), (4096, 3072, (12288,), half, dict(dual=True))):
        yield dict(M=M, N=N, sizes=sizes, dtype=torch.bfloat16, tile=tile) | options


def check_all():
    chosen = list(cases())
    compile_all((c['tile'], c['dtype'], c.get('dual', False), len(c['sizes']) > 1, c.get('residual', False)) for c in chosen)
    results = [check(**c) for c in chosen]
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


def microseconds(contenders, rounds=5, milliseconds=20):
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

    def ours(self, sizes=None, dual=False, **options):
        columns = PackedColumns(sizes or (self.K,))
        count = len(columns.sizes)
        scale_x, scale_w = scales(count*(1 + dual), self.M), scales(count, self.N) if sizes else self.scale_w
        return self.each(lambda i: w8a8_sm90(self.x[i], self.w[i], scale_x, scale_w, self.bias, columns, dual,
                                             out=self.out[i], **options))

    def rivals(self):
        x16, w16 = [t.bfloat16() for t in self.x], [t.bfloat16() for t in self.w]
        bias, column, row = self.bias.bfloat16(), self.scale_x[:, None], self.scale_w
        w8, scale8 = [t.to(torch.float8_e4m3fn) for t in w16], self.scale_w[None]

        def int_mm(i): return torch._int_mm(self.x[i], self.w[i].t())

        def int_mm_epilogue(i): return (int_mm(i).float()*column*row + self.bias).bfloat16()

        def fp8(i):
            scale = x16[i].abs().amax(1, keepdim=True).float()/448
            x8 = (x16[i].float()/scale).to(torch.float8_e4m3fn)
            return torch._scaled_mm(x8, w8[i].t(), scale, scale8, bias=bias, out_dtype=torch.bfloat16)

        return {'bf16 linear': self.each(lambda i: F.linear(x16[i], w16[i], bias)),
                '_int_mm': self.each(int_mm), '_int_mm + eager epilogue': self.each(int_mm_epilogue),
                'fp8 quantize + _scaled_mm': self.each(fp8)}


def ratio(a, b): return a/b if a and b else math.nan


def geomean(values):
    values = [v for v in values if v == v]
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def time_all(models, l2):
    rows, seen = [], {}
    print(f'{"M":>5}{"N":>6}{"K":>6} |{"µs":>7}{"TOPS":>6} |{"bf16":>6}{"_int_mm":>8}{"+ epilogue":>11}{"fp8":>6} |'
          f'{"dual":>6}{"segments":>9}{"both":>6} (our time is 1)  tile', flush=True)
    for model in models:
        of_model = []
        for M, N, K, count in SHAPES[model]:
            if (M, N, K) not in seen:
                case = Case(M, N, K, l2)
                two = (K//64*32, K - K//64*32)
                contenders = {'ours': case.ours(), 'dual': case.ours(dual=True),
                              'segments': case.ours(two),
                              'dual segments': case.ours(two, True, duals=(False, True)), **case.rivals()}
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
                  f'{r["_int_mm + eager epilogue"]:11.2f}{r["fp8 quantize + _scaled_mm"]:6.2f} |'
                  f'{r["dual"]:6.2f}{r["segments"]:9.2f}{r["dual segments"]:6.2f}'
                  f'  {tile}', flush=True)
        rows += of_model
        means = {name: geomean([ratio(r['microseconds'][name], r['microseconds']['ours']) for r in of_model])
                 for name in of_model[0]['microseconds']}
        print(f'{model}: geometric means: ' + ', '.join(f'{k} {v:.2f}' for k, v in means.items() if k != 'ours'))
    return rows


def tune(models, l2):
    rows = []
    for model in models:
        for M, N, K, _ in SHAPES[model]:
            case = Case(M, N, K, l2)
            for dual, sizes in product((False, True), (None, (K//64*32, K - K//64*32))):
                segmented = sizes is not None
                times = microseconds({str(t): case.ours(sizes, dual, tile=t) for t in hopper_tiles(dual, segmented)},
                                     rounds=3, milliseconds=8)
                rows.append(dict(M=M, N=N, K=K, dual=dual, segmented=segmented,
                                 microseconds={k: round(v, 2) for k, v in times.items()}))
                print(f'{M}×{N}×{K}{" dual" if dual else ""}{" segments" if segmented else ""}: '
                      + '  '.join(f'{k} {v:.1f}' for k, v in sorted(times.items(), key=lambda item: item[1])), flush=True)
            del case
            torch.cuda.empty_cache()
    return rows


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
    parser.add_argument('--tune', action='store_true', help='time every tile on every shape')
    parser.add_argument('--models', nargs='+', default=list(SHAPES), choices=SHAPES)
    parser.add_argument('--out', help='where to write the results')
    args = parser.parse_args()
    if problem := cuda.cuda_problem(DEVICE): parser.exit(1, problem + '\n')
    about = machine()
    print(', '.join(f'{k} {v}' for k, v in about.items() if k != 'command'), flush=True)
    if args.tune:
        compile_all((tile, torch.bfloat16, dual, segmented, False) for dual, segmented in product((False, True), repeat=2)
                    for tile in hopper_tiles(dual, segmented))
        rows = tune(args.models, about['l2'])
    else:
        passed = check_all()
        if args.check or not passed: raise SystemExit(not passed)
        rows = time_all(args.models, about['l2'])
    if args.out:
        lines = ',\n'.join(' ' + json.dumps(row) for row in rows)
        Path(args.out).write_text(f'{{"machine": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
