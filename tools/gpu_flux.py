"""Time one denoising step of a model of FLUX.1-dev's size at 1024², in bfloat16 and quantized, eager and compiled.

    python tools/gpu_flux.py --out nbs/results/flux_step.json
    python tools/gpu_flux.py --measure compiled --out nbs/results/flux_compiled.json

The model is diffusers' own, with the configuration of FLUX.1-dev and random weights that are made on the GPU: 12 billion parameters. All linear
layers of its blocks are quantized, one after the other, on the GPU; the few around them stay. A step takes 4096 image tokens and 512 text tokens. Times
are medians of whole calls between CUDA events, one kind after the other and the other way round, since a card that is warm is slower; where they go is what
the profiler says of one more step. "Quick parts" are those of 48_between, for bfloat16 as well; they are checked and timed alone first. Needs diffusers.
"""
import argparse
import copy
import json
import math
import platform
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segquant_nb.between import beside_gelu, gated_sum, norm_rows, rms_heads, rms_heads_reference, rotate_heads
from segquant_nb.formats import Quantizer, scale_from_range
from segquant_nb.ops import use_kernels, use_quick_parts
from segquant_nb.producers import norm_reference
from segquant_nb.seglinear import Plan, SegLinear

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
FLUX = dict(in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
            pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56))
TOY = FLUX | dict(num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(8, 12, 12), joint_attention_dim=64)
KINDS = {'norms and rotation': 'layer_norm|rms_heads|rotate_heads', 'attention': 'flash|fmha|sdpa|attention', 'quantization': '^codes', 'linear': 'gemm|gemv|cutlass|nvjet|cublas|splitK|s8_|e4m3_|_linear'}


def make(config):
    "The model, in bfloat16, with random weights as PyTorch would draw them"
    from diffusers import FluxTransformer2DModel
    with torch.device('meta'): model = FluxTransformer2DModel(**config).eval().requires_grad_(False).bfloat16()
    model.to_empty(device=DEVICE)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            columns = getattr(module, 'in_features', None)
            p.fill_(1.) if columns is None else p.uniform_(-columns**-.5, columns**-.5)
    return model


def inputs(config, side, text):
    "What a pipeline gives it for a picture"
    g = torch.Generator(DEVICE).manual_seed(1)
    def noise(*shape): return torch.randn(*shape, generator=g, device=DEVICE).bfloat16()
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij')
    ids = torch.stack([torch.zeros(side, side), rows, columns], -1).view(-1, 3).to(DEVICE)
    return dict(hidden_states=noise(1, side*side, config['in_channels']), encoder_hidden_states=noise(1, text, config['joint_attention_dim']),
                pooled_projections=noise(1, config['pooled_projection_dim']), timestep=torch.full((1,), .5, device=DEVICE).bfloat16(),
                guidance=torch.full((1,), 3.5, device=DEVICE).bfloat16(), img_ids=ids, txt_ids=torch.zeros(text, 3, device=DEVICE), return_dict=False)


def linears(model):
    "Those of the blocks, by name"
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and 'transformer_blocks.' in n}


def ranges(model, given):
    "The largest input of each layer in one step"
    most, hooks = {}, []
    for name, layer in linears(model).items():
        hooks.append(layer.register_forward_pre_hook(lambda m, args, name=name: most.__setitem__(name, args[0].abs().amax().float())))
    model(**given)
    for h in hooks: h.remove()
    return most


def quantized(model, recipe, most):
    "A copy that shares what is not quantized"
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    new = copy.deepcopy(model, memo)
    for name, layer in linears(model).items():
        q = Quantizer('int8', axis=-1, dynamic=True)
        if recipe == 'static': q = Quantizer('int8', scale=scale_from_range(-most[name], most[name], 'int8')[0])
        weight = Quantizer('int4' if recipe == 'W4A8' else 'int8', axis=1)
        new.set_submodule(name, SegLinear.of(layer, Plan([(layer.in_features, q)], [layer.out_features], weight)))
    return new, use_kernels(new)


def once(f):
    "Milliseconds of the GPU, and of the CPU until it has started everything"
    clock = time.perf_counter()
    if DEVICE.type == 'cpu': return [f(), 1000*(time.perf_counter() - clock)][1], 0.
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    clock = time.perf_counter()
    start.record(); f(); end.record()
    clock = time.perf_counter() - clock
    end.synchronize()
    return start.elapsed_time(end), 1000*clock


def graphed(f):
    "The same kernels without a CPU in between"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): f()
    return graph.replay


def alone(models, given, sets=6, replays=9):
    "Microseconds of whole linear layers, by shape: layers of the model take turns, each with an input of its own"
    groups, hooks = {}, []
    for name, layer in linears(models['bf16']).items():
        def note(m, args, name=name): groups.setdefault((args[0].numel()//m.in_features, m.out_features, m.in_features), []).append(name)
        hooks.append(layer.register_forward_pre_hook(note))
    models['bf16'](**given)
    for h in hooks: h.remove()
    for (M, N, K), names in sorted(groups.items(), reverse=True):
        row = dict(M=M, N=N, K=K, count=len(names), us={})
        xs = [torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16) for _ in names[:sets]]
        for kind, model in models.items():
            layers = [model.get_submodule(n) for n in names[:sets]]
            def turns(layers=layers):
                for x, layer in zip(xs, layers): layer(x)
            turns(), turns()
            replay, times = graphed(turns), []
            for _ in range(replays):
                time.sleep(.003)
                times.append(once(replay)[0])
            row['us'][kind] = round(1000*statistics.median(times)/len(layers), 2)
        yield row


def between(tokens=4608, heads=24, columns=128, sets=6, replays=9):
    "Are the kernels of 48_between right, and what do they take? Microseconds, by what they are for, beside PyTorch's and a copy"
    from diffusers.models.embeddings import apply_rotary_emb
    import torch.nn.functional as F
    width, kind = heads*columns, dict(device=DEVICE, dtype=torch.bfloat16)
    angles = torch.rand(tokens, columns, device=DEVICE)*6
    cosines, sines, weight = angles.cos(), angles.sin(), torch.rand(columns, **kind) + .5
    scale, shift = torch.randn(2, 1, width, **kind)*.3
    xs = [torch.randn(1, tokens, heads, columns, **kind) for _ in range(sets)]
    def rows(x): return x.view(1, tokens, width)
    def modulated(x): return F.layer_norm(rows(x), (width,), eps=1e-6)*(1 + scale[:, None]) + shift[:, None]
    wide = [torch.randn(1, tokens, 4*width, **kind) for _ in range(sets)]
    mates = {id(x): (rows(xs[i - 1]), wide[i]) for i, x in enumerate(xs)}
    def beside(x): return torch.cat([rows(x), F.gelu(mates[id(x)][1], approximate='tanh')], -1)
    parts = {'rotation of queries': (lambda x: rotate_heads(x, cosines, sines), lambda x: apply_rotary_emb(x, (cosines, sines), sequence_dim=1), None),
             'norm of queries': (lambda x: rms_heads(x, weight), lambda x: F.rms_norm(x, (columns,), weight, 1e-6), lambda x: rms_heads_reference(x, weight)),
             'LayerNorm': (lambda x: norm_rows(rows(x)), lambda x: F.layer_norm(rows(x), (width,), eps=1e-6), lambda x: norm_reference(rows(x)).view_as(rows(x))),
             'LayerNorm and modulation': (lambda x: norm_rows(rows(x), scale=scale, shift=shift), modulated, lambda x: norm_reference(rows(x), shift, scale).view_as(rows(x))),
             'residual + gate * y': (lambda x: gated_sum(rows(x), mates[id(x)][0], scale), lambda x: mates[id(x)][0] + scale[:, None]*rows(x), None),
             'attention beside GELU': (lambda x: beside_gelu(rows(x), mates[id(x)][1]), beside, None)}
    for name, (here, theirs, reference) in parts.items():
        y, right = here(xs[0]), (reference or theirs)(xs[0])
        row = dict(name=name, shape=list(xs[0].shape), equal=torch.equal(y, right) if 'GELU' not in name else None, differs_from_torch=round((y != theirs(xs[0])).float().mean().item(), 6), us={})
        moved = {'residual + gate * y': 3, 'attention beside GELU': 10}.get(name, 2)*xs[0].nbytes  # bytes, and a copy of as many
        room = [torch.empty(moved//2, dtype=torch.uint8, device=DEVICE).random_() for _ in range(3)]
        def copy_of(x): room[2].copy_(room[0]), room.insert(0, room.pop(1))
        for kind, f in (('here', here), ('torch', theirs), ('copy', copy_of)):
            def turns():
                for x in xs: f(x)
            turns(), turns()
            if DEVICE.type == 'cpu': continue
            replay, times = graphed(turns), []
            for _ in range(replays):
                time.sleep(.003)
                times.append(once(replay)[0])
            row['us'][kind] = round(1000*statistics.median(times)/sets, 2)
        yield row


def geomean(values): return math.exp(statistics.mean(map(math.log, values)))


def profile(f):
    "Milliseconds by what they were for, and the longest kernels"
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as p: f(); torch.cuda.synchronize()
    kinds, names = dict.fromkeys((*KINDS, 'other'), 0.), {}
    for e in p.events():
        if e.device_type.name != 'CUDA': continue
        kind = next((k for k, words in KINDS.items() if re.search(words, e.name)), 'other')
        kinds[kind] += e.device_time/1000
        names[e.name[:90]] = names.get(e.name[:90], 0) + e.device_time/1000
    longest = sorted(names.items(), key=lambda item: -item[1])[:12]
    return {k: round(v, 2) for k, v in kinds.items()}, [(n, round(v, 2)) for n, v in longest]


def far(a, b):
    "Relative error, root of mean squares"
    return ((a.float() - b.float()).square().mean()/b.float().square().mean()).sqrt().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', help='results file')
    parser.add_argument('--recipes', nargs='*', default=['dynamic', 'static'])
    parser.add_argument('--calls', type=int, default=9)
    parser.add_argument('--measure', nargs='*', default=['between', 'eager', 'linears', 'waiting', 'graph', 'profile'], help='these are all but compiled, which takes a minute')
    parser.add_argument('--toy', action='store_true', help='a small model, to try this script')
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    config, (side, text) = (TOY, (8, 16)) if args.toy else (FLUX, (64, 512))
    clock = time.perf_counter()
    def said(*what): print(f'[{time.perf_counter() - clock:.1f} s]', *what, flush=True)
    import diffusers
    model, given = make(config), inputs(config, side, text)
    result = dict(machine=dict(gpu=torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'none', torch=torch.__version__, diffusers=diffusers.__version__,
                               python=platform.python_version()), command='python tools/gpu_flux.py ' + shlex.join(sys.argv[1:]),
                  parameters=sum(p.numel() for p in model.parameters()), layers=len(linears(model)), eager={})
    said(f'{result["parameters"]/1e9:.2f} billion parameters, {result["layers"]} linear layers in blocks')
    if 'between' in args.measure: result['between'] = list(between(**(dict(tokens=64, heads=2, columns=32) if args.toy else {})))
    for row in result.get('between', []): said(row)
    right, most = model(**given)[0], ranges(model, given)
    models = {'bf16': model}
    for recipe in args.recipes:
        models[recipe], table = quantized(model, recipe, most)
        y = models[recipe](**given)[0]
        said(recipe, f'relative error {far(y, right):.3f}, the same twice: {torch.equal(y, models[recipe](**given)[0])}')
        print(table, flush=True)
        result['eager'][recipe] = dict(error=round(far(y, right), 4))
    for name, m in list(models.items()) if args.measure != ['compiled'] else ():
        quick = models[f'{name}, quick parts'] = copy.deepcopy(m, {id(t): t for t in (*m.parameters(), *m.buffers())})
        found, y = use_quick_parts(quick), quick(**given)[0]
        result['eager'][f'{name}, quick parts'] = dict(error=round(far(y, right), 4))
        said(f'{name}, quick parts: {found}, relative error {far(y, right):.3f}, the same twice: {torch.equal(y, quick(**given)[0])}')
    result['eager']['bf16'] = {}

    def measure(calls, kind):
        times = {name: [] for name in calls}
        for f in calls.values(): once(f), once(f)
        for i in range(args.calls):
            for name, f in list(calls.items())[::1 if i % 2 else -1]:
                times[name].append(once(f))
                time.sleep(.02)
        for name, pairs in times.items():
            gpu, cpu = (statistics.median(t) for t in zip(*pairs))
            result[kind].setdefault(name, {}).update(ms=round(gpu, 2), cpu_ms=round(cpu, 2), us_per_layer=round(1000*cpu/result['layers'], 1))
        base = result[kind]['bf16']['ms']
        for name in times: said(kind, name, f'{result[kind][name]["ms"]} ms, CPU {result[kind][name]["cpu_ms"]} ms, {base/max(result[kind][name]["ms"], 1e-9):.2f} × bf16')

    def keep():
        if args.out: Path(args.out).write_text(json.dumps(result, indent=1) + '\n')

    plain, gpu = {name: m for name, m in models.items() if 'quick' not in name}, DEVICE.type == 'cuda'
    def calls(models, given=given): return {name: lambda m=m: m(**given) for name, m in models.items()}
    if 'eager' in args.measure: measure(calls(models), 'eager')
    keep()
    if 'linears' in args.measure and gpu:
        result['linears'] = list(alone(plain, given))
        for row in result['linears']: print(row, flush=True)
        for name in args.recipes:
            ratios = {row['M'] > 16: [] for row in result['linears']}
            for row in result['linears']: ratios[row['M'] > 16].append(row['us']['bf16']/row['us'][name])
            said('whole linear layers,', name, {f'{"many" if many else "few"} rows': round(geomean(r), 2) for many, r in ratios.items()})
        keep()
    if 'waiting' in args.measure:  # so little to do that the GPU waits for the CPU
        result['waiting'] = {}
        measure(calls(models, inputs(config, 8, 64)), 'waiting')
        keep()
    if 'graph' in args.measure and gpu:
        result['graph'] = {}
        measure({name: graphed(f) for name, f in calls(models).items()}, 'graph')
        keep()
    if 'profile' in args.measure and gpu:
        for name, f in calls(models).items():
            result['eager'][name]['parts'], longest = profile(f)
            said(name, result['eager'][name]['parts'])
            for n, v in longest: print(f'    {v:7.2f} ms  {n}')
        keep()
    if 'compiled' in args.measure:  # quick parts are what they were there
        result['compiled'], result['compiled, graph'] = {}, {}
        for m in plain.values(): m.compile_repeated_blocks(fullgraph=True)
        measure(calls(plain), 'compiled')
        keep()
        if gpu: measure({name: graphed(f) for name, f in calls(plain).items()}, 'compiled, graph')
        keep()


if __name__ == '__main__': main()
