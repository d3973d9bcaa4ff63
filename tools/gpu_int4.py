"""Check the int4 product of Hopper on fresh random data, then time it on the shapes of diffusion models.

    python tools/gpu_int4.py --out nbs/results/int4.json                     # check, time, print a line a shape
    python tools/gpu_int4.py --only tune --out nbs/results/int4_tiles.json   # time every tile on every shape
    python tools/gpu_int4.py --only check

Each number is a median over replays of CUDA graphs, on inputs that take turns: see gpu_gemm.py.
"""
import argparse
import json
import math
import os
import random
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_gemm import DEVICE, SHAPES, codes, geomean, machine, microseconds, ratio, scales

from segquant_nb import cuda, int4
from segquant_nb.codes import PackedColumns
from segquant_nb.formats import pack_int4
from segquant_nb.gemm import w8a8_reference
from segquant_nb.hopper_gemm import w8a8_sm90
from segquant_nb.int4 import int4_tiles, pack_w4, pick_int4_tile, w4a8_sm90


def codes4(rows, columns):
    return torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device=DEVICE)


HALVES = torch.bfloat16, torch.float16


# ---- correctness ----

def cut(K, count):
    "Random sizes that fill K"
    at = sorted(random.sample(range(1, K), count - 1))
    return tuple(b - a for a, b in zip([0, *at], [*at, K]))


def check(M, N, sizes, dtype, tile, group=None, tokens=True, bias=True, extreme=False, rank=0):
    columns = PackedColumns(sizes)
    x, w = columns.pack(codes(M, sum(sizes))), columns.pack(codes4(N, sum(sizes)))
    if extreme: x[:] = -128; w[:] = torch.where(torch.arange(N, device=DEVICE) % 3 > 0, -8, 7)[:, None]
    granules = len(int4._granules(columns, group))
    scale_x, bias = scales(len(sizes), M if tokens else 1), torch.randn(N, device=DEVICE)*50 if bias else None
    scale_w = scales(granules, N) if group or tokens and granules > 1 else scales(N)
    room = torch.full((M + 64, N), math.nan, dtype=dtype, device=DEVICE)  # NaN around the output and in it
    out, packed = room[32:M + 32], pack_w4(w)
    if out.data_ptr() % 16: out = room[:M]
    more = dict(group=group, out=out, tile=tile)
    if rank: more['low_rank'] = [(torch.randn(rows, rank, device=DEVICE)*3).to(HALVES[rank % 16 == 0]) for rows in (M, N)]
    run = lambda: w4a8_sm90(x, packed, scale_x, scale_w, bias, columns, dtype, **more)
    run()
    torch.cuda.synchronize()
    y = out.clone()
    out.fill_(math.nan)
    run()
    same, outside = torch.equal(out, y), int((~room.isnan()).sum()) == M*N
    if rank:
        t, up = (factor.double() for factor in more['low_rank'])
        plain = w8a8_reference(x, w, scale_x, scale_w, bias, columns, dtype=torch.float32, group=group).double()
        wanted, slack = plain + t @ up.T, (rank + 8)*2**-23*(plain.abs() + 100 + t.abs() @ up.abs().T)
        bad = ~((y.double() - wanted).abs() <= slack + wanted.abs()*torch.finfo(dtype).eps/2*1.01)
    else: bad = y != w8a8_reference(x, w, scale_x, scale_w, bias, columns, dtype=dtype, group=group)
    ok = same and outside and not bad.any()
    print(f'{"ok " if ok else "BAD"} {M}×{N}×{"+".join(map(str, sizes)) if len(sizes) < 6 else f"{len(sizes)} segments"} {str(dtype)[6:]} {tile}'
          f'{f" group {group}" if group else ""}{" extreme" if extreme else ""}{f" rank {rank}" if rank else ""}: {int(bad.sum())} of {y.numel()} differ'
          f'{"" if same else ", NOT DETERMINISTIC"}{"" if outside else ", WROTE OUTSIDE"}', flush=True)
    if not ok: print(f'    first bad element {divmod(int(bad.flatten().int().argmax()), N)}: {y[bad][:4].tolist()}')
    return ok


def cases():
    "What is checked: every tile on ragged shapes, every type and option; then large shapes"
    dtypes, i = [torch.bfloat16, torch.float16, torch.float32], 0
    for scales in range(4):
        for tile in int4_tiles(scales):
            for M, N, K in random.sample(((256, 512, 384), (77, 648, 336), (1031, 1288, 640)), 2):
                i += 1
                sizes, dtype, rank = cut(K, random.choice((2, 3, 5))) if scales % 2 else (K,), dtypes[i % 3], (0, 0, 16, 0, 40, 0, 136)[i % 7]
                if tile not in int4_tiles(scales, True): dtype, rank = random.choice(dtypes[:2]), 0
                yield dict(M=M, N=N, sizes=sizes, dtype=dtype, tile=tile, tokens=i % 5 > 0, bias=i % 4 > 0, rank=rank,
                           group=random.choice((32, 64, 96, 128, 160, 256)) if scales > 1 else None)
    for M, N, sizes, options in (
            (4608, 3072, (3072,), {}), (4096, 12288, (3072,), dict(dtype=torch.float16)), (512, 3072, (12288,), {}), (1, 3072, (3072,), {}),
            (333, 2432, (2432,), dict(dtype=torch.float32)), (4608, 3072, (3072, 12288), {}), (4096, 1536, (64,)*24, {}), (3, 1280, (4096,), dict(group=256, extreme=True)),
            (70, 64, (131008,), dict(extreme=True)), (4096, 3072, (3072,), dict(group=64)), (4096, 3072, (3072,), dict(group=128)), (512, 3072, (3072,), dict(group=128)), (4608, 3072, (3072,), dict(rank=32)), (333, 2432, (2432,), dict(rank=128, dtype=torch.float32))):
        yield dict(M=M, N=N, sizes=sizes, tile=None, dtype=torch.bfloat16) | options


def compile_all(chosen):
    "Many at a time"
    def one(case):
        M, N, columns = case['M'], case['N'], PackedColumns(case['sizes'])
        granules = int4._granules(columns, case.get('group'))
        crowded = case['dtype'] is torch.float32 or bool(case.get('rank'))
        tile = case['tile'] or pick_int4_tile(M, N, int4._scales(granules), cuda.gpu_processors(DEVICE), crowded)
        cuda._cubin_file(int4._SOURCE, cuda.gpu_arch(DEVICE), int4._defines(tile, case['dtype'], granules, None if not case.get('rank') else torch.empty(0, dtype=HALVES[case['rank'] % 16 == 0])))
    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(one, chosen))


def check_all():
    chosen = list(cases())
    compile_all(chosen)
    results = [check(**c) for c in chosen]
    print(f'{sum(results)} of {len(results)} checks passed', flush=True)
    return all(results)


# ---- speed ----

class Case:
    "Inputs of one shape that take turns, more of them than the L2 cache holds"

    def __init__(self, M, N, K, l2):
        sets = max(2, min(32, math.ceil(2.5*l2/(M*K + N*K//2 + 2*M*N))))
        self.M, self.N, self.K = M, N, K
        self.x, self.w = [codes(M, K) for _ in range(sets)], [codes4(N, K) for _ in range(sets)]
        self.packed, self.nibbles = [pack_w4(w) for w in self.w], [pack_int4(w) for w in self.w]
        self.out = [torch.empty(M, N, dtype=torch.bfloat16, device=DEVICE) for _ in range(sets)]
        self.scale_x, self.scale_w, self.bias = scales(1, M), scales(N), torch.randn(N, device=DEVICE)
        self.sets, self.launches = sets, max(sets, min(48, int(200e9/(M*N*K))))

    def each(self, f):
        return [lambda i=i: f(i % self.sets) for i in range(self.launches)]

    def ours(self, group=None, **options):
        scale_w = scales(self.K//group, self.N) if group else self.scale_w
        return self.each(lambda i: w4a8_sm90(self.x[i], self.packed[i], self.scale_x, scale_w, self.bias, group=group, out=self.out[i], **options))

    def rivals(self):
        x16, w16 = [t.bfloat16() for t in self.x], [t.bfloat16() for t in self.w]
        bias = self.bias.bfloat16()
        int8 = lambda i, w: w8a8_sm90(self.x[i], w, self.scale_x, self.scale_w, self.bias, out=self.out[i])
        return {'w8a8': self.each(lambda i: int8(i, self.w[i])),
                'unpack + w8a8': self.each(lambda i: int8(i, cuda.unpack_int4_cuda(self.nibbles[i]))),
                'bf16 linear': self.each(lambda i: F.linear(x16[i], w16[i], bias))}


def time_all(models, l2):
    rows, seen = [], {}
    print(f'{"M":>5}{"N":>6}{"K":>6} |{"µs":>7}{"TOPS":>6} |{"w8a8":>6}{"unpacked":>9}{"bf16":>6} |{"128":>6}{"64":>6} (our time is 1)  tile', flush=True)
    for model in models:
        of_model = []
        for M, N, K, count in SHAPES[model]:
            if (M, N, K) not in seen:
                case = Case(M, N, K, l2)
                contenders = {'ours': case.ours(), 'groups of 128': case.ours(128), 'groups of 64': case.ours(64), **case.rivals()}
                seen[M, N, K] = microseconds(contenders, rounds=3, milliseconds=5)
                del case, contenders
                torch.cuda.empty_cache()
            t = seen[M, N, K]
            of_model.append(dict(model=model, M=M, N=N, K=K, count=count, microseconds={k: v and round(v, 2) for k, v in t.items()},
                                 tops=round(2e-6*M*N*K/t['ours'], 1)))
            r = {name: ratio(value, t['ours']) for name, value in t.items()}
            print(f'{M:5}{N:6}{K:6} |{t["ours"]:7.1f}{of_model[-1]["tops"]:6.0f} |{r["w8a8"]:6.2f}{r["unpack + w8a8"]:9.2f}{r["bf16 linear"]:6.2f} |'
                  f'{r["groups of 128"]:6.2f}{r["groups of 64"]:6.2f}  {pick_int4_tile(M, N)}', flush=True)
        rows += of_model
        for name, chosen in (('M ≥ 4096', [r for r in of_model if r['M'] >= 4096]), ('M < 4096', [r for r in of_model if r['M'] < 4096])):
            if not chosen: continue
            means = {n: geomean([ratio(r['microseconds'][n], r['microseconds']['ours']) for r in chosen]) for n in chosen[0]['microseconds']}
            print(f'{model}, {name}: geometric means: ' + ', '.join(f'{k} {v:.2f}' for k, v in means.items() if k != 'ours'), flush=True)
    return rows


def tune(models, l2):
    rows = []
    for model in models:
        for M, N, K, _ in SHAPES[model]:
            case = Case(M, N, K, l2)
            tiles = [t for t in int4_tiles() if t.tokens < 2*M and (M < 4096 or t.tokens*t.channels >= 8192)]
            times = microseconds({str(t): case.ours(tile=t) for t in tiles}, rounds=2, milliseconds=4)
            rows.append(dict(M=M, N=N, K=K, microseconds={k: round(v, 2) for k, v in times.items()}))
            print(f'{M}×{N}×{K} {pick_int4_tile(M, N)}: ' + '  '.join(f'{k} {v:.1f}' for k, v in sorted(times.items(), key=lambda item: item[1])), flush=True)
            del case
            torch.cuda.empty_cache()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', default=('check', 'time'), choices=('check', 'time', 'tune'))
    parser.add_argument('--models', nargs='+', default=list(SHAPES), choices=SHAPES)
    parser.add_argument('--out', help='where to write the results')
    args = parser.parse_args()
    if problem := cuda.cuda_problem(DEVICE): parser.exit(1, problem + '\n')
    about = machine() | dict(command=shlex.join(['python', 'tools/gpu_int4.py', *(f'nbs/results/{Path(a).name}' if a.endswith('.json') else a for a in sys.argv[1:])]))
    print(', '.join(f'{k} {v}' for k, v in about.items() if k != 'command'), flush=True)
    if 'check' in args.only and not check_all(): raise SystemExit(1)
    rows = []

    def run(work):
        "A model at a time, so that what is measured is kept"
        for model in args.models:
            rows.extend(work([model], about['l2']))
            if not args.out: continue
            lines = ',\n'.join(' ' + json.dumps(row) for row in rows)
            Path(args.out).write_text(f'{{"machine": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n', encoding='utf-8')

    if 'time' in args.only:
        compile_all([dict(M=M, N=N, sizes=(K,), tile=None, dtype=torch.bfloat16, group=group)
                     for model in args.models for M, N, K, _ in SHAPES[model] for group in (None, 128, 64)])
        run(time_all)
    if 'tune' in args.only:
        compile_all([dict(M=1, N=64, sizes=(3072,), tile=tile, dtype=torch.bfloat16) for tile in int4_tiles()])
        run(tune)


if __name__ == '__main__':
    main()
