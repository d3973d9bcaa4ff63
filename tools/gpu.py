"""Check every kernel on this GPU on fresh random data, then time it on the layers of diffusion models.

    python tools/gpu.py                                  # check, time, print, write results
    python tools/gpu.py --only check
    python tools/gpu.py --only codes gemm --models FLUX.1-dev SDXL --out results.json

Times are medians over replays of a CUDA graph that runs one function over inputs that take turns and
together are larger than the L2 cache: what is timed is the GPU's work, and that it can be captured is checked
on the way. Results of a check are poisoned before each run.
"""
import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gpu_shapes import SHAPES

from segquant_nb import cuda
from segquant_nb.codes import PackedColumns, quantize_cuda, quantize_reference
from segquant_nb.formats import pack_int4, unpack_int4
from segquant_nb.gemm import _LARGE, _MIDDLE, _SMALL, _THIN, _WIDE, Operands, PortableLinear, granule_columns, w8a16_sm80, w8a8_naive, w8a8_reference, w8a8_sm80

DEVICE = torch.device('cuda', 0)
CACHE = 80e6  # bytes: more than any L2 so far
CHOSEN: list[str] = []  # names of products; none: all


def products() -> dict:
    "The products that this GPU can run, by name"
    found = {'sm80': w8a8_sm80}
    if torch.cuda.get_device_capability() == (9, 0):
        from segquant_nb.hopper_gemm import w8a8_sm90
        found['sm90'] = w8a8_sm90
    return {name: product for name, product in found.items() if not CHOSEN or name in CHOSEN}


def activations(rows, columns, dtype=torch.bfloat16, accidents=False):
    "GELU outputs; with accidents: rows of zeros and of ties, NaN, infinities, tiny and large numbers"
    x = F.gelu(torch.randn(rows, columns, device=DEVICE)*2)
    if accidents:
        x *= 10**(torch.rand(rows, 1, device=DEVICE)*6 - 3)
        for value in (0, torch.nan, torch.inf, -torch.inf): x[torch.rand(rows, columns, device=DEVICE) < .002] = value
        if rows > 3: x[1], x[2], x[3] = 0, torch.arange(columns, device=DEVICE)/2 - columns//4, torch.linspace(-1, 1, columns, device=DEVICE)*1e-41
    return x.to(dtype)


def layer(M, N, sizes, dual=False, tokens=True, bias=True):
    columns, terms = PackedColumns(sizes), len(sizes)*(1 + dual)
    def codes(rows): return columns.pack(torch.randint(-128, 128, (rows, columns.columns), dtype=torch.int8, device=DEVICE))
    return dict(codes=codes(M), weight=codes(N), scale_x=torch.rand(terms, M if tokens else 1, device=DEVICE)*.02 + .001,
                scale_w=torch.rand(N, device=DEVICE)*.02 + .001, bias=torch.randn(N, device=DEVICE) if bias else None, columns=columns, dual=dual)


# ---- checks ----

FAILED = []


def report(name, ok, note=''):
    if not ok: FAILED.append(name)
    print(f'{"ok " if ok else "BAD"} {name} {note}', flush=True)


def same(a, b):
    return all(x is y or x.dtype == y.dtype and torch.equal(x.float().nan_to_num(999), y.float().nan_to_num(999)) for x, y in zip(a, b))


def check_one_pass(sizes, options):
    columns, given, wrong = PackedColumns(sizes), dict(options), []
    if 'duals' in given: given['duals'] = (True,) + (False,)*(len(sizes) - 1)
    for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)[:2 + (columns.width <= 16384)]):
        x = activations(301, columns.columns, dtype, accidents=True)
        if i == 1: given['smooth'] = columns.pack(torch.rand(1, columns.columns, device=DEVICE) + .5)[0]
        if i == 2 and len(sizes) == 1: x = torch.cat([x, x], 1)[:, columns.columns:]  # rows that lie apart
        got, again, want = quantize_cuda(x, columns, **given), quantize_cuda(x, columns, **given), quantize_reference(x, columns, **given)
        static = quantize_cuda(x, columns, **{**given, 'scale': got.scale})
        if not (same(got, want) and same(got, again) and same(got, static)): wrong.append(str(dtype))
    report(f'codes {sizes if len(sizes) < 4 else f"{len(sizes)} segments"} {options}', not wrong, ' '.join(wrong))


def check_product(name, M, N, sizes, i):
    product, wrong = products()[name], []
    for dual in (False, True):
        given = layer(M, N, sizes, dual, tokens=i % 3 > 0, bias=i % 2 > 0)
        dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
        more = {}
        if i % 4 == 1: more = dict(residual=torch.randn(M, N, device=DEVICE).to(dtype), gate=torch.randn(1, N, device=DEVICE))
        if dual and len(sizes) > 1 and i % 4 == 2: more['duals'] = (False,) + (True,)*(len(sizes) - 1)
        want = w8a8_reference(**given, dtype=dtype, **more)
        for tile in ((None, _LARGE, _MIDDLE, _SMALL, _THIN) if name == 'sm80' else (None,)):
            if dual and len(sizes) > 1 and tile == _LARGE: continue  # not enough registers
            for _ in range(2):
                y = product(**given, dtype=dtype, tile=tile, **more)
                if not torch.equal(y, want): wrong.append((dual, tile, int((y != want).sum()), divmod(int((y != want).flatten().int().argmax()), N)))
    report(f'{name} ({M}, {N}) {sizes} {str(dtype)[6:]}', not wrong, wrong or '')


def portable_layer(form, M, N, sizes, dual=False, group=None, rank=0, dtype=torch.bfloat16, tokens=True, bias=True):
    "As `layer`, with weights of a format, granules of a group of columns, and a low-rank branch"
    given = layer(M, N, sizes, dual, tokens, bias) | dict(group=group)
    columns = given['columns']
    if group: given['scale_w'] = torch.rand(len(granule_columns(columns, group)[1]), N, device=DEVICE)*.02 + .001
    if form in ('int4', 'w4a16'): given['weight'] = pack_int4(columns.pack(torch.randint(-8, 8, (N, columns.columns), dtype=torch.int8, device=DEVICE)))
    if form == 'e4m3':
        for name, rows in (('codes', M), ('weight', N)):
            given[name] = columns.pack(torch.randn(rows, columns.columns, device=DEVICE)*30).to(torch.float8_e4m3fn)
    if form.endswith('a16'): given |= dict(codes=columns.pack(activations(M, columns.columns)).to(dtype), scale_x=torch.ones(len(sizes), 1, device=DEVICE))
    if rank: given['low_rank'] = tuple(torch.randn(rows, rank, device=DEVICE).to(dtype) for rows in (M, N))
    return given


def portable_product(given, **more):
    "The portable kernel, for codes or 16-bit activations"
    if given['codes'].dtype not in (torch.bfloat16, torch.float16): return w8a8_sm80(**given, **more)
    return w8a16_sm80(given['codes'], **{k: v for k, v in given.items() if k not in ('codes', 'scale_x', 'dual')}, **more)


def beyond_rounding(y, given, want):
    "By how much y misses the exact result beyond the rounding of its type, in 2⁻²⁴ of the magnitudes of what went into it"
    positive = {k: v for k, v in given.items() if k != 'bias'} | dict(dtype=torch.float32)
    for name in ('codes', 'weight'):
        if given[name].dtype is torch.uint8: positive[name] = unpack_int4(given[name]).abs()
        elif given[name].dtype in (torch.int8, torch.bfloat16, torch.float16): positive[name] = given[name].float().abs()
        else: positive[name] = given[name].float().abs().to(given[name].dtype)
    if given['dual']: positive['scale_x'] = given['scale_x'].view(-1, 2, given['scale_x'].shape[1]).amax(1).repeat_interleave(2, 0)
    if 'low_rank' in given: positive['low_rank'] = tuple(t.abs() for t in given['low_rank'])
    magnitude = w8a8_reference(**positive).double() + (0 if given['bias'] is None else given['bias'].abs())
    step = torch.finfo(y.dtype).eps*want.double().abs()/2
    return (((y.double() - want.double()).abs() - step).clamp(min=0)/magnitude).max().item()*2**24


def check_portable(form, M, N, sizes, i):
    "The formats of the portable kernel: codes bit for bit, floats within a bound, prepared calls as checked ones"
    wrong, worst = [], 0.
    floats = form.endswith('a16')
    for dual, group, rank in ((False, None, 0), (True, 64, 0), (False, 128, 32), (True, None, 40)):
        dual = dual and not floats
        dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
        given = portable_layer(form, M, N, sizes, dual, group, rank, (torch.bfloat16, torch.float16)[i % 2], tokens=i % 3 > 0, bias=i % 2 > 0)
        rounded = rank or floats or form == 'e4m3'
        want = w8a8_reference(**given, dtype=torch.float32 if rounded else dtype)
        fixed = Operands(*(given[k] for k in ('weight', 'scale_w', 'bias', 'columns', 'dual')), group=group, up=given['low_rank'][1] if rank else None)
        prepared = PortableLinear(fixed, given['codes'].dtype if floats else None)
        for tile in (None, (_LARGE, _MIDDLE, _SMALL, _THIN, _WIDE)[i % 5]):
            if (dual or tile == _WIDE) and (group or len(sizes) > 1) and tile in (_LARGE, _WIDE) or tile == _WIDE and (dual or form != 'int4'): continue  # not enough registers
            y = portable_product(given, dtype=dtype, tile=tile)
            if rounded:
                off = beyond_rounding(y, given, want)
                worst = max(worst, off)
                fits = off < 16 + (given['columns'].width/16*2 if floats or form == 'e4m3' else 0)  # 2⁻²³ of the terms for each step of K
            else: fits = torch.equal(y, want)
            again = portable_product(given, dtype=dtype, tile=tile)
            if not (fits and torch.equal(y, again)): wrong.append((dual, group, rank, tile))
            if tile is None and not torch.equal(y, prepared(given['codes'], None if floats else given['scale_x'], dtype, low=given['low_rank'][0] if rank else None)): wrong.append('prepared')
    report(f'portable {form} ({M}, {N}) {sizes} {str(dtype)[6:]}', not wrong, wrong or (f'{worst:.2f} · 2⁻²⁴ of the terms' if worst else ''))


def portable_cases():
    forms = ('int8', 'int4', 'w8a16', 'w4a16') + ('e4m3',)*(torch.cuda.get_device_capability() >= (8, 9))
    shapes = [(1, 67, (64,)), (16, 208, (1000,)), (17, 1003, (40, 100, 6)), (333, 80, (3072, 1024)), (513, 384, (31, 33, 700, 256)), (1000, 3072, (3072,))]
    return [(check_portable, form, *shape, i + j) for i, form in enumerate(forms) for j, shape in enumerate(shapes)]


def run_cases(cases):
    with ThreadPoolExecutor(16) as pool: list(pool.map(lambda case: case[0](*case[1:]), cases))


def check():
    "All of them, on several threads: most of the time goes into compiling"
    options = [dict(), dict(dual=True), dict(dtype='int4'), dict(dtype='int4', packed=True, dual=True), dict(dtype='fp8e4m3'), dict(dtype='fp8e4m3', dual=True),
               dict(quartz=16), dict(quartz=32), dict(quartz=16, packed=True), dict(dual=True, duals='first')]
    cases = [(check_one_pass, sizes, given) for sizes in ((64,), (3072,), (40, 100, 6), (3072, 12288), (1, 31, 5000), (1000,)*24) for given in options]
    rows, cuts = [(1, 64), (16, 208), (17, 1008), (333, 80), (513, 384), (1000, 3072)], [(64,), (1000,), (3072,), (40, 100, 6), (3072, 1024), (31, 33, 700, 256)]
    for name in products():
        for i, (M, N) in enumerate(rows):
            cases += [(check_product, name, M, N - (5 if name == 'sm80' and i % 2 else 0), sizes, i + j) for j, sizes in enumerate(cuts)]
    if 'sm80' in products(): cases += portable_cases()
    run_cases(cases)
    packed, given = torch.randint(256, (3000, 1536), dtype=torch.uint8, device=DEVICE), layer(70, 75, (40, 100), True)
    report('unpack int4', torch.equal(cuda.unpack_int4_cuda(packed), unpack_int4(packed)))
    report('naive', torch.equal(w8a8_naive(**given), w8a8_reference(**given, dtype=torch.float32)))


# ---- times ----

def microseconds(call, inputs, repeats=7):
    "Median time of one call, from replays of a graph that makes a call on every input, twice"
    for x in inputs: call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in (*inputs, *inputs): call(x)
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(); graph.replay(); end.record(); end.synchronize()
        times.append(start.elapsed_time(end)*1000/(2*len(inputs)))
    return statistics.median(times[2:])


def turns(size): return min(64, max(2, math.ceil(2*CACHE/size)))


def geomean(values): return math.exp(sum(map(math.log, values))/len(values)) if values else math.nan


def time_codes(results):
    print('\n-- activation → codes: share of a copy that moves as many bytes')
    print(f'{"(M, K)":15} {"kind":16} {"µs":>8} {"GB/s":>6} {"of a copy":>9} {"× eager":>8}')
    shares = []
    for M, sizes in ((4608, (3072,)), (4608, (3072, 12288)), (4096, (12288,)), (4096, (1536,)), (4096, (640,)), (1024, (5120,)), (333, (2432,))):
        columns = PackedColumns(sizes)
        K = columns.columns
        xs = [activations(M, K) for _ in range(turns(M*K*3))]
        for name, given in (('static', dict(scale=torch.full((len(sizes), 1), .03, device=DEVICE))), ('dynamic', {}), ('dynamic dual', dict(dual=True)),
                            ('dual, smooth', dict(dual=True, smooth=torch.rand(columns.width, device=DEVICE) + .5)), ('int4 packed', dict(dtype='int4', packed=True)),
                            ('e4m3', dict(dtype='fp8e4m3')), ('quartz', dict(quartz=16))):
            moved = M*K*2 + M*columns.width//(1 + given.get('packed', 0))
            copies = [(torch.empty(moved//2, dtype=torch.uint8, device=DEVICE).random_(), torch.empty(moved//2, dtype=torch.uint8, device=DEVICE)) for _ in xs]
            copy = microseconds(lambda pair: pair[1].copy_(pair[0]), copies)
            took = microseconds(lambda x: quantize_cuda(x, columns, **given), xs)
            eager = microseconds(lambda x: quantize_reference(x, columns, **given), xs[:3], 3) if name in ('static', 'dynamic', 'dynamic dual') else math.nan
            shares.append(copy/took)
            print(f'({M}, {K})'.ljust(15), f'{name:16} {took:8.1f} {moved/took/1e3:6.0f} {copy/took:9.0%} {eager/took:8.1f}', flush=True)
            results.append(dict(kind='codes', M=M, K=K, sizes=sizes, what=name, us=took, copy_us=copy, eager_us=eager))
    print(f'geometric mean: {geomean(shares):.0%} of a copy')


def eager_linear(x, w, scale_w, bias):
    "Dynamic W8A8 as eager PyTorch does it: quantize, torch._int_mm, scale"
    step = x.abs().amax(1, keepdim=True).float()/127
    codes = (x.float()/step).round().clamp(-128, 127).to(torch.int8)
    return (torch._int_mm(codes, w.T).float()*(step*scale_w) + bias).to(x.dtype)


def time_products(results, models):
    for model in models:
        print(f'\n-- {model}: µs | TOPS | GB/s | × bf16 | × _int_mm, no scaling | whole linear × bf16 | × eager W8A8 | dual / single | 2 segments / single')
        factors, weights = {}, {}
        for M, N, K, count, what in SHAPES[model]:
            n = turns(M*K + N*K + 2*M*N)
            columns = PackedColumns((K,))
            many = [layer(M, N, (K,)) for _ in range(n)]
            xs = [activations(M, K) for _ in range(n)]
            w16 = [torch.randn(N, K, device=DEVICE).bfloat16() for _ in range(n)]
            bias16 = torch.randn(N, device=DEVICE).bfloat16()
            bf16 = microseconds(lambda i: F.linear(xs[i], w16[i], bias16), range(n))
            int_mm = microseconds(lambda g: torch._int_mm(g['codes'], g['weight'].T), many) if M > 16 else math.nan
            eager = microseconds(lambda i: eager_linear(xs[i], many[i]['weight'], many[i]['scale_w'], many[i]['bias']), range(n)) if M > 16 else math.nan
            for name, product in products().items():
                took = microseconds(lambda g: product(**g), many)
                whole = microseconds(lambda i: product(*quantize_cuda(xs[i], columns)[:1], many[i]['weight'], many[i]['scale_x'], many[i]['scale_w'], many[i]['bias'], columns), range(n))
                half, two = PackedColumns((K//128*64, K - K//128*64)), torch.rand(2, M, device=DEVICE)*.02
                dual = microseconds(lambda g: product(**{**g, 'dual': True, 'scale_x': two}), many)
                parts = microseconds(lambda g: product(**{**g, 'columns': half, 'scale_x': two}), many)
                row = dict(kind=name, model=model, M=M, N=N, K=K, count=count, what=what, us=took, whole_us=whole, bf16_us=bf16, int_mm_us=int_mm, eager_us=eager,
                           dual_us=dual, segments_us=parts)
                results.append(row)
                for key, over, under in (('bf16', bf16, took), ('int_mm', int_mm, took), ('whole', bf16, whole), ('eager', eager, whole)):
                    if not math.isnan(over): factors.setdefault((name, key), []).append(over/under)
                for key, value in (('bf16', bf16), ('whole', whole)): weights[name, key] = weights.get((name, key), 0) + count*value
                print(f'{name} ({M}, {N}, {K})'.ljust(26), f'{took:8.1f} | {2*M*N*K/took/1e6:5.0f} | {(M*K + N*K + 2*M*N)/took/1e3:5.0f} | {bf16/took:5.2f} | {int_mm/took:5.2f} | '
                      f'{bf16/whole:5.2f} | {eager/whole:5.2f} | {dual/took:5.2f} | {parts/took:5.2f}  {what}', flush=True)
        for name in products():
            print(f'{name} geometric means: ' + ', '.join(f'{key} {geomean(v):.2f}' for (who, key), v in factors.items() if who == name)
                  + f'; all linears of a pass: bf16 {weights[name, "bf16"]/1000:.2f} ms, W8A8 {weights[name, "whole"]/1000:.2f} ms')


KINDS = (('int8', 'int8', {}), ('int4', 'int4', {}), ('int4, groups of 128', 'int4', dict(group=128)), ('int4, groups of 64', 'int4', dict(group=64)),
         ('int8, rank 32', 'int8', dict(rank=32)), ('int4, rank 64', 'int4', dict(rank=64)), ('int4, dual', 'int4', dict(dual=True)), ('e4m3', 'e4m3', {}), ('int8 × 16 bits', 'w8a16', {}), ('int4 × 16 bits', 'w4a16', {}),
         ('int4 × 16 bits, groups of 64', 'w4a16', dict(group=64)))


def time_portable(results, kinds):
    "The formats of the portable kernel, next to int8 without anything"
    print('\n-- portable formats: µs | TOPS | × bf16 | of int8\'s speed')
    for M, N, K in ((4608, 3072, 15360), (4096, 3072, 3072), (4096, 12288, 3072), (512, 3072, 3072), (64, 3072, 3072)):
        n, plain = min(12, turns(M*K + N*K + 2*M*N)), 0
        xs, w16 = [activations(M, K) for _ in range(n)], [torch.randn(N, K, device=DEVICE).bfloat16() for _ in range(n)]
        bf16 = microseconds(lambda i: F.linear(xs[i], w16[i]), range(n), 5)
        for name, form, kind in (k for k in KINDS if k[0] in kinds):
            if form == 'e4m3' and torch.cuda.get_device_capability() < (8, 9): continue
            many = [portable_layer(form, M, N, (K,), **kind) for _ in range(n)]
            took = microseconds(portable_product, many, 5)
            plain = plain or took
            print(f'({M}, {N}, {K}) {name}'.ljust(44), f'{took:8.1f} | {2*M*N*K/took/1e6:5.0f} | {bf16/took:5.2f} | {plain/took:5.2f}', flush=True)
            results.append(dict(kind='portable', M=M, N=N, K=K, what=name, us=took, bf16_us=bf16))


def time_launches(results):
    "What a call costs the CPU"
    x, columns = activations(64, 640), PackedColumns((640,))
    given = layer(64, 640, (640,))
    for name, call in (('quantize_cuda', lambda: quantize_cuda(x, columns)), ('w8a8_sm80', lambda: w8a8_sm80(**given)),
                       ('PortableLinear', lambda p=PortableLinear(Operands(*(given[k] for k in ('weight', 'scale_w', 'bias', 'columns')))): p(given['codes'], given['scale_x'])), ('F.linear', lambda w=torch.randn(640, 640, device=DEVICE).bfloat16(): F.linear(x, w))):
        import time
        for _ in range(50): call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(300): call()
        took = (time.perf_counter() - start)/300*1e6
        torch.cuda.synchronize()
        print(f'{name}: {took:.1f} µs of the CPU per call')
        results.append(dict(kind='launch', what=name, us=took))


def machine() -> dict:
    driver = subprocess.run(['nvidia-smi', '--query-gpu=name,driver_version', '--format=csv,noheader'], capture_output=True, text=True).stdout.splitlines()[0]
    import cupy
    return dict(gpu=driver, torch=torch.__version__, cuda=torch.version.cuda, cupy=cupy.__version__, nvrtc='.'.join(map(str, cupy.cuda.nvrtc.getVersion())), python=platform.python_version())


def write(path, about, results):
    "As JSON, a row a line"
    rows = [{k: round(v, 2) if isinstance(v, float) else v for k, v in row.items() if v == v} for row in results]
    lines = ',\n'.join(' ' + json.dumps(row) for row in rows)
    path.write_text(f'{{"machine": {json.dumps(about)},\n"command": {json.dumps(" ".join(sys.argv))},\n"results": [\n{lines}\n]}}\n')


PARTS = ('check', 'codes', 'gemm', 'portable', 'launch')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--models', nargs='+', choices=SHAPES, default=list(SHAPES))
    parser.add_argument('--products', nargs='+', choices=('sm80', 'sm90'), default=[], help='default: all that this GPU can run')
    parser.add_argument('--kinds', nargs='+', choices=[k[0] for k in KINDS], default=[k[0] for k in KINDS], help='of the portable formats')
    parser.add_argument('--out', type=Path, help='where to write the numbers, as JSON')
    args = parser.parse_args()
    CHOSEN.extend(args.products)
    if problem := cuda.cuda_problem(): sys.exit(problem)
    torch.manual_seed(torch.seed() % 2**31)
    about, results = machine(), []
    print(json.dumps(about))
    if 'check' in args.only:
        torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what torch.empty returns
        check()
        torch.use_deterministic_algorithms(False)
    parts = dict(codes=time_codes, portable=lambda results: time_portable(results, args.kinds), launch=time_launches, gemm=lambda results: time_products(results, args.models))
    for name in (part for part in parts if part in args.only):
        parts[name](results)
        if args.out: write(args.out, about, results)
    if FAILED: sys.exit(f'{len(FAILED)} checks failed: ' + '; '.join(FAILED))


if __name__ == '__main__':
    main()
