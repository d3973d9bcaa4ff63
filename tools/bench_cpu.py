"""Time a quantized linear layer on this CPU, over the layers of SD3.5-medium, and a DiT of about 100 million parameters.

    OMP_NUM_THREADS=1 python tools/bench_cpu.py --out nbs/results/cpu.json
    python tools/bench_cpu.py --threads 2 --clock wall --out …          # on a machine that has nothing else to do

All contenders take turns in one process; each number is the median over the rounds. With one thread, the time of the process
counts, so that other work on the machine disturbs little; the time that the system needs to hand over memory is in it.
torchao is timed beside if it can be imported. With --only, the other half of an existing results file stays.
"""
import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from segquant_nb.cpu import cpu_linear, has_vnni
from segquant_nb.dualscale import DualScale
from segquant_nb.formats import Quantizer
from segquant_nb.quartz import Quartz
from segquant_nb.seglinear import Plan, SegLinear

LAYERS = [(1536, 1536), (6144, 1536), (1536, 6144)]  # (N, K) of SD3.5-medium
ROWS = [256, 1024, 4096]
TOKEN = dict(axis=-1, dynamic=True)
W8, W4 = Quantizer('int8', axis=1), Quantizer('int4', axis=1)


def recipes(K):
    "Name: inputs, weight, rank"
    half = K//2//32*32
    return {'static': ([(K, Quantizer('int8'))], W8, 0), 'per token': ([(K, Quantizer('int8', **TOKEN))], W8, 0),
            'segments': ([(half, Quantizer('int8')), (K - half, Quantizer('int8'))], W8, 0),
            'dual': ([(K, DualScale('int8'))], W8, 0), 'dual per token': ([(K, DualScale('int8', **TOKEN))], W8, 0),
            'quartz': ([(K, Quartz(**TOKEN))], W4, 0),
            'int4': ([(K, Quantizer('int8', **TOKEN))], W4, 0),
            'int4 in groups of 128': ([(K, Quantizer('int8', **TOKEN))], Quantizer('int4', axis=1, group=128), 0),
            'int4 in groups of 64': ([(K, Quantizer('int8', **TOKEN))], Quantizer('int4', axis=1, group=64), 0),
            'per token, rank 32': ([(K, Quantizer('int8', **TOKEN))], W8, 32)}


COMPILED = ('static', 'per token', 'segments', 'dual', 'dual per token', 'int4')


def timed(contenders, rounds, clock, most=math.inf):
    "Median milliseconds of each function, called in turns"
    now = time.process_time if clock == 'process' else time.perf_counter
    times, begun = {name: [] for name in contenders}, time.perf_counter()
    for f in contenders.values(): f()
    for i in range(rounds):
        for name, f in contenders.items():
            start = now()
            f()
            times[name].append(1000*(now() - start))
        if i >= 2 and time.perf_counter() - begun > most: break
    return {name: round(statistics.median(t), 3) for name, t in times.items()}


def compiled(module):
    "Compiled for whatever number of rows it sees"
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, dynamic=True)


def torchao_linear(layer):
    "The same layer, quantized by torchao: 8 bits, weights per channel, activations per token"
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    wrapped = nn.Sequential(layer)
    quantize_(wrapped, Int8DynamicActivationInt8WeightConfig())
    return wrapped


def linear(N, K, sizes, args):
    "A row of results for each number of rows"
    torch.manual_seed(0)
    layer = nn.Linear(K, N).requires_grad_(False)
    half = nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(max(sizes), K)
    layers = {}
    for name, (inputs, weight, rank) in recipes(K).items():
        low_rank = (torch.randn(rank, K)/K, torch.randn(N, rank)/rank) if rank else None
        layers[name] = SegLinear.of(layer, Plan(inputs, [N], weight), x[:256], low_rank=low_rank)
        close(layers[name], x[:64])
        layers[name].kernel = cpu_linear
    emulated = SegLinear.of(layer, Plan(recipes(K)['static'][0], [N], W8), x[:256])
    fused = {f'{name} compiled': compiled(layers[name]) for name in COMPILED}
    torch._dynamo.config.recompile_limit = 64
    if args.torchao:
        fused['torchao'] = torchao_linear(nn.Linear(K, N).requires_grad_(False))
        fused['torchao compiled'] = torch.compile(torchao_linear(nn.Linear(K, N).requires_grad_(False)), dynamic=True)
    for M in sizes:
        part = x[:M]
        short = part.bfloat16()
        contenders = {'fp32': lambda: layer(part), 'bf16': lambda: half(short)}
        contenders |= {name: (lambda q=q: q(part)) for name, q in (layers | fused).items()}
        contenders['static, bf16 inputs'] = lambda: layers['static'](short)
        contenders['emulated'] = lambda: emulated(part)
        yield dict(M=M, N=N, K=K, ms=timed(contenders, args.rounds, args.clock, args.most))


def close(layer, x):
    "Nothing wrong is timed"
    want, got = layer.integer(x), cpu_linear(layer, x)
    assert (got - want).abs().max() < 1e-5*want.abs().max(), layer


class Block(nn.Module):
    "A transformer block with AdaLN, as DiTs have it"

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width, elementwise_affine=False)
        self.modulation, self.qkv, self.out = nn.Linear(width, 6*width), nn.Linear(width, 3*width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4*width), nn.Linear(4*width, width)

    def forward(self, x, c):
        a, b, g, d, e, h = self.modulation(F.silu(c)).unsqueeze(-2).chunk(6, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)*(1 + a) + b).chunk(3, -1))
        x = x + g*self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + h*self.down(F.gelu(self.up(self.norm(x)*(1 + d) + e), approximate='tanh'))


class DiT(nn.Module):
    def __init__(self, width=768, depth=10, heads=12):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x, c):
        for block in self.blocks: x = block(x, c)
        return x


def swapped(model, make):
    for name, child in list(model.named_modules()):
        if isinstance(child, nn.Linear): model.set_submodule(name, make(child))
    return model


def dit(args):
    "Milliseconds of one pass, 1024 tokens"
    torch.manual_seed(0)
    def fresh():
        torch.manual_seed(0)
        return DiT().requires_grad_(False).eval()
    def ours(layer):
        q = SegLinear.of(layer, Plan([(layer.in_features, Quantizer('int8', **TOKEN))], [layer.out_features], W8))
        q.kernel = cpu_linear
        return q
    model, x, c = fresh(), torch.randn(1, 1024, 768), torch.randn(1, 768)
    models = {'fp32': model, 'bf16': fresh().bfloat16(), 'int8': swapped(fresh(), ours), 'int8 in a bf16 model': swapped(fresh().bfloat16(), ours)}
    if args.torchao:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        models['torchao'] = fresh()
        quantize_(models['torchao'], Int8DynamicActivationInt8WeightConfig())
    contenders = {}
    for name, m in models.items():
        given = (x.bfloat16(), c.bfloat16()) if 'bf16' in name else (x, c)
        contenders[name] = lambda m=m, given=given: m(*given)
        fast = torch.compile(m, fullgraph=True)
        contenders[f'{name} compiled'] = lambda fast=fast, given=given: fast(*given)
    off = ((models['int8'](x, c) - model(x, c)).norm()/model(x, c).norm()).item()
    return dict(parameters=sum(p.numel() for p in model.parameters()), tokens=1024, error=round(off, 4),
                ms=timed(contenders, args.rounds, args.clock, 4*args.most))


def machine():
    "What matters, and no names"
    flags = {'avx512_vnni', 'avx_vnni', 'avx512_bf16', 'amx_int8'}
    cpuinfo = Path('/proc/cpuinfo')
    have = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return dict(processor=f'{platform.machine()} with {", ".join(sorted(flags & have)) or "none of " + ", ".join(sorted(flags))}',
                torch=torch.__version__, python=platform.python_version(), vnni=has_vnni())


def geomean(rows, name, base='fp32'):
    return math.exp(statistics.mean(math.log(r['ms'][base]/r['ms'][name]) for r in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', help='results file')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--clock', choices=('process', 'wall'), default='process')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--most', type=float, default=25, help='seconds after which a shape has no further round')
    parser.add_argument('--only', choices=('linears', 'dit'))
    args = parser.parse_args()
    if args.clock == 'process' and args.threads > 1: parser.error('the time of the process adds up its threads: --clock wall')
    warnings.filterwarnings('ignore')
    torch.set_num_threads(args.threads)
    try:
        import torchao
        args.torchao = torchao.__version__
    except ImportError: args.torchao = None
    known = json.loads(Path(args.out).read_text()) if args.only and args.out and Path(args.out).exists() else {}
    result = known | dict(machine=machine() | dict(threads=args.threads, clock=args.clock, torchao=args.torchao),
                  command='python tools/bench_cpu.py ' + shlex.join(sys.argv[1:]))
    with torch.inference_mode():
        if args.only != 'dit':
            result['linears'] = [row for N, K in LAYERS for row in linear(N, K, ROWS, args) if not print(row, flush=True)]
            for name in result['linears'][0]['ms']: print(f'{name:24} {geomean(result["linears"], name):.2f} × fp32')
        if args.only != 'linears':
            torch._dynamo.reset()
            result['dit'] = dit(args)
            print(result['dit'])
    if args.out: Path(args.out).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__': main()
