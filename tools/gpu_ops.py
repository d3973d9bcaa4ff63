"""Check SegLinear on GPU kernels against its exact arithmetic, then time whole linear layers against bfloat16.

    python tools/gpu_ops.py --out nbs/results/ops.json
    python tools/gpu_ops.py --only zoo          # pictures of the zoo's pipelines; needs diffusers

Whole means: activations in, quantized, multiplied, rescaled, bias added, bfloat16 out. Times are medians over replays of a CUDA
graph of several calls on different inputs, and, for what the CPU adds, of one eager call after the other.
"""
import argparse
import contextlib
import copy
import io
import json
import math
import os
import platform
import random
import shlex
import statistics
import sys
import threading
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
from segquant_nb.codes import PackedColumns
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.gemm import Operands, PortableLinear
from segquant_nb.ops import cuda_reason, doctor, use_emulation, use_kernels
from segquant_nb.quartz import Quartz
from segquant_nb.seglinear import Plan, SegLinear

TOKEN = dict(axis=-1, dynamic=True)
W8, W4 = Quantizer('int8', axis=1), Quantizer('int4', axis=1)
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DEVICE = torch.device('cuda', 0)


def kinds(K):
    "Name: input segments, for integer weights"
    a = K//3
    return {'static': [(K, Quantizer())], 'per token': [(K, Quantizer(**TOKEN))], 'int4': [(K, Quantizer('int4', **TOKEN))],
            'dual': [(K, DualScale())], 'dual per token': [(K, DualScale(**TOKEN))],
            'segments': [(a, Quantizer()), (K - a, Quantizer())], 'mixed': [(a, Quantizer(**TOKEN)), (K - a, DualScale(**TOKEN))],
            'mixed static': [(a, DualScale()), (K - a, Quantizer())],
            'QuaRTZ': [(K, Quartz(**TOKEN))], 'QuaRTZ 16, static': [(K, Quartz(group=16))], 'QuaRTZ rounded': [(K, Quartz(rounded=True, **TOKEN))],
            'rotated': [(K, Quantizer(**TOKEN))], 'rotated segments': [(a, Quantizer()), (K - a, Quantizer())], 'weight only': [(K, Quantizer('bf16'))]}


def cases():
    "Every kind, weight, type, extra and path; ragged and aligned shapes, few rows and many"
    shapes, extras = ((77, 200, 336), (256, 384, 768), (1, 96, 192), (5, 384, 768), (16, 72, 96)), ('', 'smooth', 'low rank', 'both')
    whole = list(product(shapes, kinds(96), ('W8', 'W4', 'W8 in groups', 'W4 in groups'), extras, ('cuda_sm80', 'cuda_sm90'), CLOSE))
    whole += list(product(shapes, ('FP8', 'FP8 static', 'FP8 dual', 'FP8 segments'), ('FP8',), extras, ('cuda_sm80', 'cuda_sm90'), CLOSE))
    return [c for c in whole if not (c[1] == 'weight only' and c[4] == 'cuda_sm90')]


def check(seconds):
    "As many as there is time for, in random order, many at a time for the compiler's sake"
    left = cases()
    random.Random(int(time.time())).shuffle(left)
    end, wrong, done = time.monotonic() + seconds, [], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for w in pool.map(lambda case: check_one(*case) if time.monotonic() < end else None, left):
            done += w is not None
            if w: wrong.append(w)
    print('\n'.join(wrong[:30]))
    print(f'{done - len(wrong)} of {done} layers right, of {len(left)} possible ones', flush=True)
    return dict(layers=done, wrong=len(wrong), possible=len(left))


def made(shape, kind, w, extra, dtype=torch.float32):
    "A random layer and inputs"
    M, N, K = shape
    linear, rows = nn.Linear(K, N, device=DEVICE).requires_grad_(False), F.gelu(2*torch.randn(M, K, device=DEVICE))
    smooth = torch.rand(K, device=DEVICE) + .5 if extra in ('smooth', 'both') else None
    rank = (torch.randn(8, K, device=DEVICE)/K, torch.randn(N, 8, device=DEVICE)/8) if extra in ('low rank', 'both') else None
    fp8, a = dict(dtype='fp8e4m3'), K//3
    inputs = {'FP8': [(K, Quantizer(**fp8, **TOKEN))], 'FP8 static': [(K, Quantizer(**fp8))], 'FP8 dual': [(K, DualScale(**fp8, **TOKEN))],
              'FP8 segments': [(a, Quantizer(**fp8, **TOKEN)), (K - a, Quantizer(**fp8, **TOKEN))]} | kinds(K)
    weight = Quantizer('fp8e4m3' if w == 'FP8' else 'int4' if 'W4' in w else 'int8', axis=1, group=32 if 'groups' in w else None)
    blocks = [min(size & -size, 256) for size, _ in inputs[kind]] if 'rotated' in kind else ()
    return SegLinear.of(linear, Plan(inputs[kind], [N//4, N - N//4], weight, blocks), rows, smooth, rank), rows.to(dtype)


def check_one(shape, kind, w, extra, path, dtype):
    "What is wrong with a random layer"
    q, x = made(shape, kind, w, extra, dtype)
    name = f'BAD {path} {kind} {"×".join(map(str, shape))} {w} {extra} {dtype}'
    if why := cuda_reason(q, 'sm_90a'): return '' if kind == 'weight only' and 'rotat' in why else f'{name}: no kernel: {why}'
    if kind == 'weight only': path = 'cuda_16bit'
    ops._prepare(q, path)
    try: y, again, third, right = q(x), q(x), q(x.clone()), q.integer(x)
    except Exception as e: return f'{name}: {type(e).__name__} {e}'
    off = (y.double() - right.double()).abs()/right.double().abs().max()
    # A value between two codes may go either way where it is multiplied with 1/s instead of divided by s
    most, mean = (4*CLOSE[dtype], CLOSE[dtype]) if q.smooth is None else (.2, .01)
    if kind == 'weight only' or q.down is not None: most, mean = max(most, 4*2**-8), max(mean, 2**-8)  # a 16-bit product
    if w == 'FP8': most, mean = max(most, 2e-3), max(mean, 1e-3)  # tensor cores add them up in fewer bits
    same = torch.equal(y, again) and torch.equal(y, third)
    if off.max() > most or off.mean() > mean or not y.isfinite().all() or not same or y.dtype != dtype:
        return f'{name}: {off.max():.1e}, mean {off.mean():.1e}{"" if same else ", not the same again"}'
    return ''


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
    other = {k: v.neg() if k in ('bias', 'weight_scale') else v*2 if k in ('up', 'input0_scale') else v.clone() for k, v in q.state_dict().items()}
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q.load_state_dict(other)
    graph.replay()
    fresh = SegLinear.restore(q.plan, other, q.dtype)
    use_kernels(fresh)
    assert torch.equal(out, fresh(x.flip(0))) and torch.equal(q(x), fresh(x)) and not torch.equal(fresh(x), y), 'graph after load_state_dict'
    with torch.no_grad(): q.bias.mul_(-2)  # an eager call sees it and writes it where the graph reads
    assert not torch.equal(q(x), fresh(x))
    graph.replay()
    assert torch.equal(out, q(x.flip(0))), 'graph after a change in place'
    q.load_state_dict(before)
    assert torch.equal(q(x), y), 'states'
    side = torch.cuda.Stream()
    with torch.cuda.stream(side): z = q(x)
    side.synchronize()
    assert torch.equal(z, y), 'stream'
    assert torch.equal(copy.deepcopy(q)(x), y), 'copy'
    there = copy.deepcopy(q).cpu().cuda()
    assert torch.equal(there(x), y), 'moved'
    found = []

    def work():
        for i in range(40): found.append(torch.equal(q(x.roll(i, 0).contiguous()), y.roll(i, 0)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 320 and all(found), 'threads'
    torch.library.opcheck(ops.linear_op, (x, *ops._tables(q), q.spec))
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(2, 150, K, device=DEVICE, dtype=torch.bfloat16))
        with torch.compiler.set_stance('fail_on_recompile'):
            for n in (300, 64, 1024):
                x = torch.randn(2, n, K, device=DEVICE, dtype=torch.bfloat16)
                torch.testing.assert_close(compiled(x), q(x), atol=.02, rtol=.02)
        torch._dynamo.reset()
        compiled, x = torch.compile(q, fullgraph=True, mode='reduce-overhead'), torch.randn(300, K, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(4): torch.testing.assert_close(compiled(x), q(x), atol=.02, rtol=.02)
        q.load_state_dict(other)
        torch.testing.assert_close(compiled(x), fresh(x), atol=.02, rtol=.02)  # a graph of the compiler's
        torch._dynamo.reset()
        compiled = torch.compile(q, fullgraph=True)
        compiled(x)
        q.bias.mul_(-2)
        torch.testing.assert_close(compiled(x), q.integer(x), atol=.05, rtol=.05)
    print('graph, stream, copy, move, threads, opcheck, compile: right', flush=True)


def per_call(functions, replays=11, rest=.003):
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
        token = [(K, Quantizer(**TOKEN))]
        recipes = {'static': ([(K, Quantizer())], W8), 'per token': (token, W8), 'W4A8': (token, W4), 'W4A8 in groups': (token, Quantizer('int4', axis=1, group=64))}
        if M <= 16: recipes |= {'W8A16': ([(K, Quantizer('bf16'))], W8), 'W4A16': ([(K, Quantizer('bf16'))], W4)}
        else: recipes['FP8'] = [(K, Quantizer('fp8e4m3', **TOKEN))], Quantizer('fp8e4m3', axis=1)
        if dual: recipes['as planned'] = (segments or [(K, DualScale(**TOKEN))], W8)
        if M == 4096: recipes['rank 32'] = recipes['per token']
        paths = ('cuda_sm80', 'cuda_sm90') if 16 < M <= 512 else ('cuda_sm90',)
        for name, (inputs, w) in recipes.items():
            rank = (torch.randn(32, K, device=DEVICE)/K, torch.randn(N, 32, device=DEVICE)/32) if name == 'rank 32' else None
            rank = rank and tuple(t.bfloat16() for t in rank)
            layers = [SegLinear.of(l, Plan(inputs, [N], w), xs[0][:64], None, rank) for l in plain]
            for path in ('cuda_16bit',) if 'A16' in name else paths:
                for q in layers: ops._prepare(q, path)
                label = f'{name}, sm80' if path == 'cuda_sm80' else name
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


def weight_only():
    "16-bit inputs, more than a few rows: the weight in 16 bits and PyTorch's product, or codes that are unpacked on the way"
    shapes = ((3072, 3072), (12288, 3072), (3072, 12288))
    for (N, K), bits in product(shapes, (8, 4)):
        sets, w = max(2, math.ceil(1.5e8/(N*K))), W8 if bits == 8 else W4
        plain = [nn.Linear(K, N, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False) for _ in range(sets)]
        layers = [SegLinear.of(l, Plan([(K, Quantizer('bf16'))], [N], w)) for l in plain]
        for q in layers: ops._prepare(q, 'cuda_16bit')
        products = [PortableLinear(Operands(q.codes, q.cuda_scale_w, q.cuda_bias, PackedColumns((K,))), torch.bfloat16) for q in layers]
        for M in (32, 128, 512, 4608):
            xs = [torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16) for _ in range(min(sets, 4))]*sets
            right, y, z = layers[0].integer(xs[0].float()), products[0](xs[0], None), layers[0](xs[0])
            off = [((t.float() - right).abs().max()/right.abs().max()).item() for t in (y, z)]
            row = dict(M=M, N=N, K=K, bits=bits, off=[float(f'{o:.1e}') for o in off], us={'bf16': per_call([lambda x=x, l=l: l(x) for x, l in zip(xs, plain)])})
            row['us']['16 bits anew'] = per_call([lambda x=x, q=q: q(x) for x, q in zip(xs, layers)])
            row['us']['unpacked on the way'] = per_call([lambda x=x, p=p: p(x, None) for x, p in zip(xs, products)])
            print(row, flush=True)
            yield row


def crossing():
    "Up to 16 rows: one launch that reads the weight once, or codes first and a product then"
    token, dual = Quantizer(**TOKEN), DualScale(**TOKEN)
    for (N, K), (name, x, w) in product(((18432, 3072), (9216, 3072), (3072, 3072)), (('W8A8', token, W8), ('W4A8', token, W4), ('dual', dual, W8))):
        sets = max(2, math.ceil(1.5e8/(N*K)))
        plain = [nn.Linear(K, N, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False) for _ in range(sets)]
        layers = [SegLinear.of(l, Plan([(K, x)], [N], w)) for l in plain]
        for q in layers: ops._prepare(q, 'cuda_sm90')
        for M in (1, 4, 8, 16):
            xs = [torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16) for _ in range(sets)]
            row, made = dict(M=M, N=N, K=K, kind=name), [ops._made_ready(q, torch.bfloat16) for q in layers]
            row['us'] = {'bf16': per_call([lambda x=x, l=l: l(x) for x, l in zip(xs, plain)], 7)}
            for way in ('few', 'many'): row['us'][way] = per_call([lambda x=x, m=m: getattr(m, way)(x) for x, m in zip(xs, made)], 7)
            print(row, flush=True)
            yield row


PRESETS = ('segquant-g-w8a8', 'segquant-a-fp8', 'svdquant-w4a8', 'w4a4', 'w4a16')


def zoo(names, device=DEVICE, presets=PRESETS, steps=8):
    "Pictures on kernels against pictures by emulation, and after all that people do with a model"
    from segquant_nb.graph import denoiser
    from segquant_nb.metrics import psnr
    from segquant_nb.quantization import quantize_pipeline
    from segquant_nb.zoo import generate, load
    prompts = ['a large red striped circle left of a small blue plain square, gray gradient background',
               'a small yellow checkered triangle above a large purple plain ring, plain light background']
    for name, preset in product(names, presets):
        pipe = load(name).to(device)
        whole = dict(name=name, preset=preset, wrong=[])
        def draw(p): return generate(p, prompts, seed=7, num_inference_steps=steps).cpu()
        def against(what, new, old, least):
            whole[what] = round(psnr(new, old).min().clamp(max=200).item(), 1)
            print(f'{name} {preset} {what}: {whole[what]} dB, {time.perf_counter() - start:.0f} s', flush=True)
            if not whole[what] >= least: whole['wrong'].append(what)
        start, plain = time.perf_counter(), draw(pipe)
        with contextlib.redirect_stderr(io.StringIO()):
            made = quantize_pipeline(pipe, prompts, preset, steps=4, progress=False, height=64, width=64, **(dict(max_sequence_length=24) if 'max_sequence_length' in pipe.__call__.__code__.co_varnames else {}))
        model = denoiser(made)
        whole['seconds'] = round(time.perf_counter() - start, 1)
        calls = {}
        def noted(layer, args): calls[id(layer), args[0].shape] = layer, args[0]
        layers = [m for m in model.modules() if isinstance(m, SegLinear)]
        hooks = [m.register_forward_pre_hook(noted) for m in layers]
        use_emulation(model)
        emulated = draw(made)
        for h in hooks: h.remove()
        table = use_kernels(model)
        print(f'\n{name} {preset}\n{table}', flush=True)
        if any(c.path == 'emulation' for c in table.of): whole['wrong'].append('emulated layers')
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # compile side by side
            for _ in pool.map(lambda call: (call[0](call[1]), call[0](call[1].bfloat16())), list(calls.values())): pass
        whole['compiled'] = round(time.perf_counter() - start, 1)
        kernels = draw(made)
        against('against emulation', kernels, emulated, 25 if '4' in preset else 30)
        against('against the pipeline', kernels, plain, 10)
        against('again', draw(made), kernels, 200)
        made.to('cpu').to(device)
        against('moved', draw(made), kernels, 200)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        for layer in layers: layer.codes.zero_(), layer.weight_scale.mul_(3)
        if psnr(draw(made), kernels).min() > 30: whole['wrong'].append('no other picture from other weights')
        model.load_state_dict(state)
        against('loaded', draw(made), kernels, 200)
        twin = copy.copy(made)
        twin.register_modules(**{k: copy.deepcopy(v) for k, v in made.components.items() if v is model})
        against('copied', draw(twin), kernels, 200)
        half = twin.to(torch.bfloat16)
        in_16 = draw(half)
        use_emulation(denoiser(half))
        against('bfloat16 against emulation', in_16, draw(half), 20)
        print(whole, flush=True)
        yield whole


def overheads():
    "Microseconds of the CPU per call, on a layer so small that the GPU waits"
    x, l = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16), nn.Linear(256, 256, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    result, few = {'bf16': overhead(lambda: l(x))}, x[:4].contiguous()
    for name, inputs, w in (('static', [(256, Quantizer())], W8), ('per token', [(256, Quantizer(**TOKEN))], W8), ('mixed', kinds(256)['mixed'], W8),
                            ('W4A8', [(256, Quantizer(**TOKEN))], W4)):
        q = SegLinear.of(l, Plan(inputs, [256], w), x)
        use_kernels(q)
        result[name] = overhead(lambda: q(x))
        if name in ('per token', 'W4A8'): result[f'{name}, 4 rows'] = overhead(lambda: q(few))
        if name != 'mixed': continue
        compiled = torch.compile(q, fullgraph=True)
        with torch.no_grad(): result['mixed, compiled'] = overhead(lambda: compiled(x))
    return result


def geomean(values): return math.exp(statistics.mean(map(math.log, values)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', help='results file')
    parser.add_argument('--only', nargs='*', default=['check', 'use', 'small', 'speed', 'overhead'])
    parser.add_argument('--seconds', type=float, default=240, help='for the check')
    parser.add_argument('--models', nargs='*', default=['FLUX.1-dev'])
    parser.add_argument('--zoo', nargs='*', default=['tiny-sd35', 'tiny-flux', 'tiny-sdxl'], help='pipelines to draw with')
    parser.add_argument('--presets', nargs='*', default=PRESETS)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(doctor() if {'check', 'use'} & {*args.only} else ops._gpu(), flush=True)  # the doctor compiles a lot
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
        for name, rows in (('weight_only', weight_only), ('crossing', crossing)):
            if name not in args.only: continue
            result[name] = []
            for row in rows(): result[name].append(row); keep()
        if 'speed' in args.only:
            result['speed'] = [row for model in args.models for row in speed(model)]
            for model in args.models:
                rows = [r for r in result['speed'] if r['model'] == model]
                for name in ('static', 'per token', 'W4A8'): print(f'{model} {name}: {geomean([r["us"]["bf16"]/r["us"][name] for r in rows if r["M"] > 16]):.2f} × bf16')
                planned = sum(r['count']*r['us'][r['planned']] for r in rows)
                print(f'{model}: all linears {sum(r["count"]*r["us"]["bf16"] for r in rows)/planned:.2f} × bf16, as planned', flush=True)
        keep()
    if 'check' in args.only: result['check'] = check(args.seconds)
    keep()
    if 'use' in args.only: check_use()
    if 'zoo' in args.only:
        result['zoo'] = []
        for row in zoo(args.zoo, presets=args.presets): result['zoo'].append(row); keep()
    keep()
    sys.exit(bool(result.get('check', {}).get('wrong') or any(z['wrong'] for z in result.get('zoo', ()))))


if __name__ == '__main__': main()
