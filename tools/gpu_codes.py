"""Check the passes that make codes, and those that make activations on the way, on this GPU; then time them.

    python tools/gpu_codes.py                                 # check, time, print
    python tools/gpu_codes.py --only check
    python tools/gpu_codes.py --only time --codes nbs/results/codes.json --producers nbs/results/producers.json

Each time stands beside that of a device copy that moves as many bytes. As in tools/gpu.py: medians over
replays of a CUDA graph, inputs that take turns and are larger than the L2 cache, poisoned results in checks.
"""
import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

import gpu
from gpu import DEVICE, activations, geomean, microseconds, report, same, turns
from segquant_nb import cuda
from segquant_nb.codes import CodesKernel, PackedColumns, quantize_cuda, quantize_reference
from segquant_nb.producers import ActivationCodes, NormCodes, activation_reference, norm_reference

CODES = [(4608, (3072,)), (4608, (3072, 12288)), (4096, (12288,)), (4096, (9728,)), (4096, (2432,)), (4096, (1536,)), (4096, (640,)), (1024, (5120,)), (1024, (1280,)), (333, (2432,))]
NORMS = [(4608, 3072, 'adaln'), (4096, 2432, 'adaln'), (4096, 1536, 'adaln'), (1024, 1280, 'affine'), (4096, 640, 'affine'), (4096, 3072, 'rms')]
ACTIVATIONS = [(4096, 12288, 'gelu-tanh'), (4096, 9728, 'gelu-tanh'), (4096, 6144, 'gelu'), (1024, 5120, 'geglu'), (4096, 2560, 'geglu'), (4096, 8192, 'swiglu'), (4096, 3072, 'silu')]
TORCH = {'silu': F.silu, 'gelu': F.gelu, 'gelu-tanh': lambda x: F.gelu(x, approximate='tanh')}
PARTS = {'geglu': 'gelu', 'swiglu': 'silu'}  # gated activations


def options(name, columns, x):
    "What a kind of pass is asked for"
    n, most = len(columns.sizes), float(x.abs().max())
    smooth = torch.rand(columns.width, device=DEVICE) + .5
    def static(*steps): return torch.tensor(steps*n, device=DEVICE)[:, None].contiguous()
    return {'static': dict(scale=static(most/127)), 'dynamic': {}, 'static dual': dict(dual=True, scale=static(most/127, .17/128)), 'dynamic dual': dict(dual=True),
            'smooth': dict(smooth=smooth), 'dual, smooth': dict(dual=True, smooth=smooth), 'int4 packed': dict(dtype='int4', packed=True), 'e4m3': dict(dtype='fp8e4m3'),
            'quartz': dict(quartz=16), 'quartz rounded': dict(quartz=16, rounded=True), 'rotated': dict(blocks=tuple(min(256, s & -s) for s in columns.sizes))}[name]


KINDS = ('static', 'dynamic', 'static dual', 'dynamic dual', 'smooth', 'dual, smooth', 'int4 packed', 'e4m3', 'quartz', 'quartz rounded', 'rotated')


# ---- checks ----

def check_codes(sizes, given):
    columns, given, wrong = PackedColumns(sizes), dict(given), []
    for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        x = activations(301, columns.columns, dtype, accidents=True)
        if i == 1: given['smooth'] = columns.pack(torch.rand(1, columns.columns, device=DEVICE) + .5)[0]
        if i == 2: x = torch.cat([x, x], 1)[:, columns.columns:]  # rows that lie apart
        if i == 2 and len(sizes) == 1: x = x[:, :columns.columns]
        got, again, want = quantize_cuda(x, columns, **given), quantize_cuda(x, columns, **given), quantize_reference(x, columns, **given)
        fixed = {**given, 'scale': got.scale*.7}  # some values are clamped
        if not (same(got, want) and same(got, again) and same(quantize_cuda(x, columns, **fixed), quantize_reference(x, columns, **fixed))): wrong.append(str(dtype))
    report(f'codes {sizes} {given if "smooth" not in given else {k: v for k, v in given.items() if k != "smooth"}}', not wrong, ' '.join(wrong))


def apart(a, b):
    "How many codes differ, by how much at most, and how far scales are apart"
    off = (a.codes.float() - b.codes.float()).abs()
    return dict(codes=(off > 0).float().mean().item(), most=off.max().item(), scale=((a.scale - b.scale)/b.scale).abs().max().item())


def produced(kind, x, given, images=1):
    "Kernel, precise reference and unfused model"
    K = x.shape[-1] // (2 if kind in PARTS else 1)
    columns = PackedColumns((K,))
    def vector(*shape): return (torch.randn(*shape, device=DEVICE)*.3).to(x.dtype)
    if kind in ('adaln', 'affine', 'rms'):
        own = {'adaln': {}, 'affine': dict(weight=vector(K) + 1, bias=vector(K)), 'rms': dict(weight=vector(K) + 1, kind='rms')}[kind]
        shift, scale = vector(images, 6*K).chunk(6, 1)[1:3] if kind == 'adaln' else (None, None)
        made = NormCodes(columns, device=DEVICE, **given, **own)
        run, precise = lambda x: made(x, shift, scale), lambda x: norm_reference(x, shift, scale, columns=columns, **own)
        def model(x):
            if kind == 'rms': return (x.float()*torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)*own['weight']
            y = F.layer_norm(x, (K,), own.get('weight'), own.get('bias'), 1e-6)
            return y if kind == 'affine' else (y.view(images, -1, K)*(1 + scale[:, None]) + shift[:, None]).view_as(y)
    else:
        act, gated = PARTS.get(kind, kind), kind in PARTS
        run, precise = ActivationCodes(columns, device=DEVICE, **given, activation=act, gated=gated), lambda x: activation_reference(x, act, gated)
        def model(x):
            if not gated: return TORCH[act](x)
            hidden, gate = x.chunk(2, -1)
            return hidden*TORCH[act](gate)
    return columns, run, precise, model


def check_producer(kind, K, dtype, given, found):
    x = (torch.randn(201, K*(2 if kind in PARTS else 1), device=DEVICE)*2 + torch.randn(201, 1, device=DEVICE)).to(dtype)
    columns, run, precise, model = produced(kind, x, given, images=3)
    got, want, unfused = run(x), quantize_reference(precise(x), columns, **given), quantize_reference(model(x), columns, **given)
    off, norm = apart(got, want), kind in ('adaln', 'affine', 'rms')
    ok = same(got, run(x)) and (same(got, want) if norm else off['codes'] < 2e-3 and off['scale'] < 8e-3)
    off_model = apart(got, unfused)
    found.append(dict(kind='exactness', what=kind, K=K, dtype=str(dtype)[6:], given={k: str(v) for k, v in given.items()}, reference=off, unfused=off_model))
    report(f'{kind} {K} {str(dtype)[6:]} {given}', ok, f'reference {off} unfused {off_model}')


def check(found, limit):
    started = time.time()
    formats = [dict(), dict(dual=True), dict(dtype='int4'), dict(dtype='int4', packed=True, dual=True), dict(dtype='fp8e4m3', dual=True), dict(quartz=16), dict(quartz=32, packed=True),
               dict(quartz=16, rounded=True), dict(quartz=32, rounded=True, packed=True)]
    cases = [(check_codes, (3072,), o) for o in formats] + [(check_codes, (1, 31, 5000), o) for o in formats[:4]] + [(check_codes, (3072, 12288), dict(dual=True)), (check_codes, (1000,)*24, {})]
    cases += [(check_codes, (3072, 12288), dict(dual=True, duals=(False, True), blocks=(256, 256))), (check_codes, (640,), dict(blocks=(128,), dtype='fp8e4m3')),
              (check_codes, (40, 256, 64), dict(blocks=(8, 256, 32), dual=True)), (check_codes, (32, 3328), dict(blocks=(32, 256), quartz=32, rounded=True)), (check_codes, (2432,), dict(blocks=(64,)))]
    types = [(3072, torch.bfloat16, {}), (640, torch.float16, dict(dual=True)), (1000, torch.float32, {}), (5120, torch.bfloat16, dict(dtype='fp8e4m3'))]
    cases += [(check_producer, kind, *t, found) for kind in ('adaln', 'affine', 'rms', 'silu', 'gelu', 'gelu-tanh', 'geglu', 'swiglu') for t in types]

    def one(case):
        if time.time() - started > limit: return print('skipped', case[1:-1], flush=True)
        try: case[0](*case[1:])
        except Exception as e: report(str(case[:3]), False, repr(e)[:300])

    with ThreadPoolExecutor(16) as pool: list(pool.map(one, cases))  # most of the time goes into compiling


# ---- times ----

def copy_time(size, n):
    pairs = [(torch.empty(size//2, dtype=torch.uint8, device=DEVICE).random_(), torch.empty(size//2, dtype=torch.uint8, device=DEVICE)) for _ in range(n)]
    return microseconds(lambda pair: pair[1].copy_(pair[0]), pairs, 5)


def warm():
    "Compile what will be timed, on several threads"
    def one(job):
        try: job()
        except Exception as e: print('not compiled:', repr(e)[:300], flush=True)
    jobs = []
    for M, sizes in CODES:
        columns = PackedColumns(sizes)
        x = activations(4, columns.columns)
        jobs += [lambda x=x, columns=columns, name=name: CodesKernel(columns, device=DEVICE, **options(name, columns, x))(x) for name in KINDS]
    for M, K, kind in NORMS + ACTIVATIONS:
        x = activations(4, K*(2 if kind in PARTS else 1))
        jobs += [lambda x=x, kind=kind, given=given: produced(kind, x, given)[1](x) for given in ({}, dict(dual=True))]
    with ThreadPoolExecutor(16) as pool: list(pool.map(one, jobs))


def time_codes(results, limit):
    started, copies = time.time(), {}
    print(f'{"(M, K)":15} {"kind":16} {"µs":>8} {"GB/s":>6} {"of a copy":>9} {"× eager":>8}')
    for M, sizes in CODES:
        columns = PackedColumns(sizes)
        K = columns.columns
        xs = [activations(M, K) for _ in range(turns(M*K*3))]
        for name in KINDS:
            if time.time() - started > limit: return print('out of time')
            given = options(name, columns, xs[0])
            moved = M*K*2 + M*columns.width//(1 + given.get('packed', 0))
            if moved not in copies: copies[moved] = copy_time(moved, len(xs))
            took, copy = microseconds(CodesKernel(columns, device=DEVICE, **given), xs, 3), copies[moved]
            row = dict(kind='codes', M=M, K=K, sizes=sizes, what=name, us=took, copy_us=copy)
            if name in ('static', 'dynamic', 'dynamic dual') and K in (3072, 12288, 1280): row['eager_us'] = microseconds(lambda x: quantize_reference(x, columns, **given), xs[:2], 1)
            results.append(row)
            print(f'({M}, {K})'.ljust(15), f'{name:16} {took:8.2f} {moved/took/1e3:6.0f} {copy/took:9.0%} {row.get("eager_us", float("nan"))/took:8.1f}', flush=True)
        torch.cuda.empty_cache()
    for name in KINDS: print(f'{name:16} {geomean([r["copy_us"]/r["us"] for r in results if r.get("what") == name]):.0%} of a copy')


def time_producers(results, limit):
    started = time.time()
    for M, K, kind in NORMS + ACTIVATIONS:
        width = K*(2 if kind in PARTS else 1)
        xs = [(torch.randn(M, width, device=DEVICE)*2).bfloat16() for _ in range(turns(2*M*width + M*K))]
        copy = copy_time(2*M*width + M*K, len(xs))
        for given in ({}, dict(dual=True)):
            if time.time() - started > limit: return print('out of time')
            columns, run, _, model = produced(kind, xs[0], given)
            plain = CodesKernel(columns, device=DEVICE, **given)
            took, apart = microseconds(run, xs, 3), microseconds(lambda x: plain(model(x)), xs, 1)
            results.append(dict(kind='producer', what=kind, M=M, K=K, dual='dual' in given, us=took, copy_us=copy, unfused_us=apart))
            print(f'{kind:10} ({M}, {K}) {"dual" if given else "":5} {took:8.2f} µs {copy/took:5.0%} of a copy, unfused {apart:8.2f} µs: {apart/took:.1f}', flush=True)
        torch.cuda.empty_cache()


def time_down(results):
    "The down-projection of a low-rank branch beside the pass, and after it, when the input is in the L2 cache"
    for M, K in ((4608, 3072), (4096, 12288), (4608, 15360), (4096, 1536)):
        columns = PackedColumns((K,))
        xs = [activations(M, K) for _ in range(turns(M*K*3))]
        for rank in (32, 64):
            down, run = (torch.randn(rank, K, device=DEVICE)*.1).bfloat16(), CodesKernel(columns, device=DEVICE)
            def both(x): run(x); F.linear(x, down)
            row = dict(kind='down', M=M, K=K, rank=rank, pass_us=microseconds(run, xs, 3), product_us=microseconds(lambda x: F.linear(x, down), xs, 3), both_us=microseconds(both, xs, 3))
            results.append(row)
            print(f'({M}, {K}) rank {rank}: pass {row["pass_us"]:.1f} µs, product {row["product_us"]:.1f} µs, both {row["both_us"]:.1f} µs', flush=True)
        torch.cuda.empty_cache()


def time_launches(results):
    "What a call costs the CPU"
    x, columns = activations(64, 640), PackedColumns((640,))
    v = torch.zeros(1, 640, device=DEVICE, dtype=torch.bfloat16)
    made, norm, act = CodesKernel(columns, device=DEVICE), NormCodes(columns, device=DEVICE), ActivationCodes(columns, device=DEVICE)
    for name, call in (('quantize_cuda', lambda: quantize_cuda(x, columns)), ('CodesKernel', lambda: made(x)), ('NormCodes', lambda: norm(x, v, v)), ('ActivationCodes', lambda: act(x)),
                       ('torch.empty twice', lambda: (torch.empty(64, 640, dtype=torch.int8, device=DEVICE), torch.empty(1, 64, device=DEVICE)))):
        times = []
        for _ in range(8):
            for _ in range(20): call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100): call()
            times.append((time.perf_counter() - start)*1e4)
            torch.cuda.synchronize()
        results.append(dict(kind='launch', what=name, us=statistics.median(times)))
        print(f'{name}: {results[-1]["us"]:.1f} µs of the CPU per call')


def rounded(value):
    if isinstance(value, dict): return {k: rounded(v) for k, v in value.items()}
    return float(f'{value:.4g}') if isinstance(value, float) else value


def write(path, about, rows):
    if not path: return
    path.write_text(json.dumps(dict(machine=about, command=' '.join(['tools/gpu_codes.py', *sys.argv[1:]]), results=[rounded(r) for r in rows])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=('check', 'time', 'warm'), default=('check', 'time'))
    parser.add_argument('--limit', type=float, default=600, help='seconds for each part')
    parser.add_argument('--codes', type=Path, help='where to write the times of passes, as JSON')
    parser.add_argument('--producers', type=Path, help='where to write what was found about producers, as JSON')
    args = parser.parse_args()
    if problem := cuda.cuda_problem(): sys.exit(problem)
    torch.manual_seed(torch.seed() % 2**31)
    about, codes, producers = gpu.machine(), [], []
    print(json.dumps(about))
    if 'warm' in args.only: warm()
    if 'check' in args.only:
        torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what torch.empty returns
        check(producers, args.limit)
        torch.use_deterministic_algorithms(False)
    if 'time' in args.only:
        time_launches(codes)
        time_codes(codes, args.limit)
        write(args.codes, about, codes)
        time_producers(producers, args.limit/2)
        write(args.producers, about, producers)
        time_down(codes)
    write(args.codes, about, codes)
    write(args.producers, about, producers)
    if gpu.FAILED: sys.exit(f'{len(gpu.FAILED)} checks failed: ' + '; '.join(gpu.FAILED))


if __name__ == '__main__':
    main()
