"""How near quantized pipelines of the zoo come to their originals: every preset, the steps between them, and peers.

    python tools/fidelity.py                                            # all of it: hours on a CPU, minutes with --device cuda --jobs 16
    python tools/fidelity.py --models tiny-sd35 --only 'w8a8*' 'modelopt*' --prompts 8 --seeds 1 --out /tmp/try
    python tools/fidelity.py --table                                    # print what is stored

Each row quantizes the denoiser on a CPU, on the same recorded calls, and draws the same held-out prompts from the same seeds as the
unquantized pipeline in float32. Captions of training scenes calibrate; nothing else about a row depends on a prompt. A row is stored when it is
done, and the next run goes on from there; rows of peers that are not installed are listed with what would install them.

Peers want an environment of their own:

    python -m venv peers && peers/bin/pip install -e . torchao optimum-quanto nvidia-modelopt && peers/bin/python tools/fidelity.py
"""
import argparse
import base64
import contextlib
import copy
import functools
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from segquant_nb.auto import WAYS, Measured, Options, measure_layers, pictures_of
from segquant_nb.calibration import Staggered, generate_calibrate_set
from segquant_nb.config import PRESETS, explain, read_config
from segquant_nb.graph import denoiser
from segquant_nb.metrics import ask, bootstrap, judge, perceptual, psnr, ssim
from segquant_nb.ops import use_emulation
from segquant_nb.quantization import quantize
from segquant_nb.scenes import caption, sample_scene
from segquant_nb.zoo import generate, load

MODELS = ('tiny-sd35', 'tiny-flux', 'tiny-sdxl')
REPORTED = 3*10**6  # first scene of the held-out prompts, and first seed
CALIBRATION = dict(prompts=32, steps=8, batch=16)
MEASURING = dict(first=1000, prompts=6, steps=8, seed=10**6)  # of pictures: captions of other training scenes
SHOWN = ('baseline', 'seg+dual', 'modelopt smoothquant', 'w8a8', 'torchao dynamic', 'w4a8', 'int4', 'w4a4')


# ---- rows ----

@dataclass(frozen=True)
class Row:
    group: str  # of the table
    about: str
    make: Callable  # (model, calls) → (quantized model, bytes, remarks …); the model stays as it is
    package: str = ''  # that has to be installed
    measured: bool = False  # does `make` want what was measured, too?


def ours(config):
    def make(model, calls):
        made = quantize(model, calls, config, progress=False)
        plan = made.quantization.explanation
        return copy.deepcopy(made), plan.bytes_after + plan.other
    return make


def changed(preset, **fields): return ours({'default': PRESETS[preset]['default'] | fields})


def auto(preset=None, bits=None):
    "Chosen for the bytes of a preset, or for so many bits a weight"
    def make(model, calls, measured):
        size = None if preset is None else explain(model, preset, example=calls[0]).bytes_after
        made, size = ours(measured.choose(bits=bits, bytes=size))(model, calls)
        return made, size, counted(ways_of(measured, made.quantization.explanation.config))
    return make


def ways_of(measured, config):
    "What was chosen for each group of layers"
    def way(g):
        found = config.of(g.layers[0])
        return '16 bits' if not found.enable else next(n for n, c in measured.ways.items() if c.default == found)
    return [way(g) for g in measured.groups]


def counted(ways): return ', '.join(f'{n} × {way}' for way, n in Counter(ways).items())


def half(dtype):
    "What 16 bits themselves cost: weights, activations and arithmetic of the denoiser"
    def cast(value, dtype):
        if isinstance(value, Tensor): return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict): return {k: cast(v, dtype) for k, v in value.items()}
        return tuple(cast(v, dtype) for v in value) if isinstance(value, tuple) else value

    def make(model, calls):
        made = copy.deepcopy(model).to(dtype)
        made.register_forward_pre_hook(lambda _, args, kwargs: (cast(args, dtype), cast(kwargs, dtype)), with_kwargs=True)
        made.register_forward_hook(lambda _, args, result: cast(result, torch.float32))
        return made, 2*sum(p.numel() for p in model.parameters())
    return make


def int8_bytes(model, layers, smooth=False):
    "Of a model whose `layers` have int8 weights with a float32 scale a row, and float32 factors for smoothing; the rest in 16 bits"
    weights = [model.get_submodule(name).weight for name in layers]
    scales = sum(4*len(w) + (4*w.shape[1] if smooth else 0) for w in weights)
    return 2*sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in weights) + scales


def linears(model): return [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]


def torchao_dynamic(model, calls):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    made = copy.deepcopy(model)
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    return made, int8_bytes(model, linears(model))


def quanto(activations, only=None):
    "As its README has it: quantize, calibrate with momentum, freeze"
    def make(model, calls):
        import optimum.quanto as q
        made = copy.deepcopy(model)
        include = linears(model) if only == 'linears' else None
        q.quantize(made, weights=q.qint8, activations=getattr(q, activations), include=include)
        with q.Calibration(momentum=.9):
            for call in calls: made(**call)
        q.freeze(made)
        return made, int8_bytes(model, [n for n, m in made.named_modules() if isinstance(m, (q.QLinear, q.QConv2d))])
    return make


# What its diffusion example leaves in 16 bits
MODELOPT_LEAVES = re.compile('.*(time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding|pos_embed|time_text_embed|'
                             'context_embedder|norm_out|x_embedder).*')


def modelopt(everywhere):
    "Its INT8_SMOOTHQUANT_CFG, at the best of three strengths: of the paper, of its diffusion example and of the configuration"
    def attempt(model, calls, alpha):
        import modelopt.torch.quantization as mtq
        config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG) | {'algorithm': {'method': 'smoothquant', 'alpha': alpha}}
        leave = ['nn.LayerNorm']  # 0.47 rounds what goes into norms, by mistake: github.com/NVIDIA/Model-Optimizer/pull/2402
        if everywhere:  # the same layers as ours: all linear ones, and no others
            config['quant_cfg'] = [e for e in config['quant_cfg'] if e['quantizer_name'] == '*' or 'cfg' in e]
            leave.append('nn.Conv2d')
        config['quant_cfg'] += [{'quantizer_name': '*', 'parent_class': name, 'enable': False} for name in leave]
        made = copy.deepcopy(model)
        mtq.quantize(made, config, lambda m: [m(**call) for call in calls])
        if not everywhere: mtq.disable_quantizer(made, lambda name: bool(MODELOPT_LEAVES.match(name)))
        return made

    def make(model, calls):
        def error(alpha): return call_error(attempt(model, calls[::2], alpha), model, calls[1::2])
        alpha = min((.5, .8, 1.), key=error)
        made = attempt(model, calls, alpha)
        low = [n for n, m in made.named_modules() if hasattr(m, 'weight_quantizer') and m.weight_quantizer.is_enabled]
        return made, int8_bytes(model, low, smooth=True), f'α = {alpha:g}'
    return make


def call_error(made, model, calls):
    "Squared error of the denoiser's outputs"
    def out(m, call):
        y = m(**call)
        return y[0] if isinstance(y, tuple) else y.sample
    return sum((out(made, call) - out(model, call)).square().sum().item() for call in calls)


AUTO = 'chosen by measuring'
STATIC, CHANNELS, TOKENS = 'W8A8, static, one scale a tensor', 'W8A8, static, weights per channel', 'W8A8, dynamic per token'
SEGMENTS = ['linear2chunk', 'linear2split', 'concat2linear', 'stack2linear', 'reshape2linear']
CHANNEL, INT4 = ({k: PRESETS[p]['default'][k]} for p, k in (('w8a8', 'weight_quant'), ('w4a4', 'input_quant')))
W4A4 = INT4 | {'weight_quant': PRESETS['w4a4']['default']['weight_quant']}
QUARTZ = W4A4 | {'input_quant': W4A4['input_quant'] | {'quartz': 16}, 'calib': {'type': 'gptq'}}
ROUNDED = QUARTZ | {'input_quant': QUARTZ['input_quant'] | {'quartz_rounded': True}}
LEFT = {f'*{name}*': {'enable': False} for name in ('time_emb_proj', 'time_embedding', 'conv_shortcut', 'add_embedding', 'pos_embed',
        'time_text_embed', 'context_embedder', 'norm_out', 'x_embedder')} | {'*proj_out': {'enable': False}}

ROWS = {
    'baseline': Row(STATIC, 'nothing else', ours('baseline')),
    'seg': Row(STATIC, 'one scale a segment', ours({'default': {'seglinear': True, 'search_patterns': SEGMENTS}})),
    'dual': Row(STATIC, 'two scales after an activation', ours({'default': {'seglinear': True, 'search_patterns': ['activation2linear']}})),
    'seg+dual': Row(STATIC, 'both', ours({'default': {'seglinear': True}})),
    'smooth': Row(STATIC, 'SmoothQuant, α = .5', ours('smooth')),
    'segquant-a-w8a8': Row(STATIC, 'segments and dual, α search', ours('segquant-a-w8a8')),
    'segquant-g-w8a8': Row(STATIC, 'segments and dual, α search, GPTQ', ours('segquant-g-w8a8')),
    'modelopt smoothquant': Row(CHANNELS, 'ModelOpt as in its diffusion example', modelopt(False), 'nvidia-modelopt'),
    'w8a8': Row(CHANNELS, 'segments and dual, α search, GPTQ', ours('w8a8')),
    'w8a8, left out': Row(CHANNELS, 'the same; in 16 bits what ModelOpt leaves', ours(PRESETS['w8a8'] | LEFT)),
    'modelopt, all linears': Row(CHANNELS, 'ModelOpt on the layers that ours has', modelopt(True), 'nvidia-modelopt'),
    'smooth, channels': Row(CHANNELS, 'SmoothQuant, α = .5', changed('smooth', **CHANNEL)),
    'quanto int8': Row(CHANNELS, 'optimum-quanto, calibrated', quanto('qint8'), 'optimum-quanto'),
    'quanto int8, linears': Row(CHANNELS, 'optimum-quanto on linear layers', quanto('qint8', 'linears'), 'optimum-quanto'),
    'torchao dynamic': Row(TOKENS, 'torchao', torchao_dynamic, 'torchao'),
    'w8a8-dynamic': Row(TOKENS, 'segments and dual, α search, GPTQ', ours('w8a8-dynamic')),
    'w8a8-dynamic, rotated': Row(TOKENS, 'the same, rotated instead of smoothed', ours({'default': PRESETS['w8a8-dynamic']['default'] | {'opt': {'rotate': 64}}})),
    'svdquant-w4a8': Row('W4A8', 'SVDQuant, rank 64', ours('svdquant-w4a8')),
    'segquant-g-w4a8': Row('W4A8', 'the same with segments and dual', ours('segquant-g-w4a8')),
    'w4a8': Row('W4A8', 'the same with a better rounding', ours('w4a8')),
    'int4': Row('W4A4', 'rounded to the nearest', ours({'default': W4A4})),
    'segquant-g-w4a4': Row('W4A4', 'segments and dual, α search, GPTQ, rank 32', ours('segquant-g-w4a4')),
    'w4a4': Row('W4A4', 'the same, rotated, with a better rounding', ours('w4a4')),
    'quartz': Row('W4A4', 'QuaRTZ in groups of 16, GPTQ', ours({'default': QUARTZ})),
    'quartz, seg': Row('W4A4', 'the same with segments', ours({'default': QUARTZ | {'seglinear': True}})),
    'quartz, rounded': Row('W4A4', 'the same to the nearest value', ours({'default': ROUNDED | {'seglinear': True}})),
    'rotated': Row('W4A4', 'rotated, segments, GPTQ', ours({'default': W4A4 | {'seglinear': True, 'opt': {'rotate': 64}, 'calib': {'type': 'gptq'}}})),
    **{f'auto@{preset}': Row(AUTO, f'as many bytes as {preset}', auto(preset), measured=True) for preset in ('w4a8', 'fp8', 'w8a8-dynamic')},
    **{f'auto {bits} bits': Row(AUTO, 'a weight, with scales and branches', auto(bits=bits), measured=True) for bits in (5, 6)},
    'bf16': Row('16 bits', 'bfloat16', half(torch.bfloat16)),
    'fp16': Row('16 bits', 'float16', half(torch.float16)),
    'w4a16': Row('W4A16', 'rank 64, GPTQ', ours('w4a16')),
    'fp8': Row('fp8', 'one scale a tensor', ours('fp8')),
    'segquant-a-fp8': Row('fp8', 'segments and dual', ours('segquant-a-fp8')),
    'segquant-g-fp8': Row('fp8', 'segments and dual, GPTQ', ours('segquant-g-fp8')),
}


# ---- one row ----

@functools.lru_cache
def pipe_of(model, device): return load(model).to(device)


def call_of(pipe):
    given = dict(height=64, width=64)
    return given if 'XL' in type(pipe).__name__ else given | dict(max_sequence_length=24)


def scenes(number): return [sample_scene(REPORTED + i, held_out=True) for i in range(number)]


def draw(pipe, settings):
    "Pictures of the reported prompts, one seed after the other"
    prompts = [caption(s) for s in scenes(settings['prompts'])]
    return torch.cat([generate(pipe, prompts, seed=REPORTED + 10**5*i, batch=128).cpu() for i in range(settings['seeds'])])


def slot_of(pipe): return next(k for k, v in pipe.components.items() if v is denoiser(pipe))


def prepare(model, settings, device, path):
    "What all rows of a model share: recorded calls, pictures of the original, and what the judge says of them"
    quiet()
    pipe, c = pipe_of(model, device), CALIBRATION
    prompts = [caption(sample_scene(i)) for i in range(c['prompts'])]
    batches = [prompts[i:i + c['batch']] for i in range(0, len(prompts), c['batch'])]
    calls = list(generate_calibrate_set(pipe, Staggered(c['steps']), batches, slot_of(pipe), progress=False, **call_of(pipe)))
    pictures = draw(pipe, settings)
    right = accuracy(pictures, settings)
    torch.save((calls, pictures, right), path)
    return dict(accuracy=summary(right, settings), picture=encoded(pictures[0]))


def accuracy(pictures, settings):
    "Share of the caption that is in each picture"
    found = ask(judge(), pictures, scenes(settings['prompts'])*settings['seeds'])
    return torch.stack(list(found.values())).nanmean(0)  # one thing has no relation


def forked(jobs):
    "`map`, but in so many processes that know all this one does"
    def run(function, items):
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for k in range(jobs):
                if child := os.fork():
                    children.append(child)
                    continue
                try: torch.save([function(item) for item in items[k::jobs]], Path(folder)/str(k))
                except BaseException: traceback.print_exc(); os._exit(1)
                os._exit(0)  # nothing of the parent's is to be tidied up here
            failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
            if failed: raise RuntimeError(f'{failed} of {jobs} processes failed, see above')
            parts = [iter(torch.load(Path(folder)/str(k))) for k in range(jobs)]
        return [next(parts[i % jobs]) for i in range(len(items))]
    return run


def measure(model, settings, path, jobs=1):
    "What each layer of a model could become, and what that does to pictures of prompts that nothing else here uses"
    quiet()
    (calls, *_), pipe, m, start = shared(path), pipe_of(model, 'cpu'), settings, time.time()
    prompts = [caption(sample_scene(m['first'] + i)) for i in range(m['prompts'])]
    results = pictures_of(pipe, prompts, m['seed'], num_inference_steps=m['steps'], **call_of(pipe))
    found = measure_layers(denoiser(pipe), calls, progress=False, results=results, run=forked(jobs))
    groups = [dict(layers=g.layers, weights=g.weights, bytes=g.bytes, errors=[float(f'{e:.4g}') for e in g.errors]) for g in found.groups]
    return dict(settings=m, ways=WAYS, fixed=found.fixed, seconds=round(time.time() - start), jobs=jobs, groups=groups, machine=machine('cpu'))


def measured_from(stored):
    "As it was before it was stored"
    groups = [Options(tuple(g['layers']), g['weights'], ('16 bits', *stored['ways']), tuple(g['bytes']), tuple(g['errors'])) for g in stored['groups']]
    return Measured(tuple(groups), {name: read_config(config) for name, config in stored['ways'].items()}, stored['fixed'])


def run_row(model, name, settings, device, path, measured=None):
    "One row of the table"
    quiet()
    calls, originals, right = shared(path)
    more = [measured_from(measured)] if ROWS[name].measured else []
    start = time.process_time()
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr): made, size, *remarks = ROWS[name].make(denoiser(pipe_of(model, 'cpu')), calls, *more)
    seconds = time.process_time() - start  # of one thread, whatever else this machine does
    pipe = copy.copy(pipe_of(model, device))
    if device != 'cpu': use_emulation(made)  # it was made ready for a CPU
    setattr(pipe, slot_of(pipe), made.to(device))
    pictures = draw(pipe, settings)
    each = dict(psnr=psnr(pictures, originals), ssim=ssim(pictures, originals), perceptual=perceptual(judge(), pictures, originals),
                accuracy=accuracy(pictures, settings))
    each['change'] = each['accuracy'] - right
    row = dict(bytes=size, seconds=round(seconds, 1), remarks=remarks, device=device) | {k: summary(v, settings) for k, v in each.items()}
    row |= dict(each=dict(psnr=(100*each['psnr']).round().int().tolist(), accuracy=(1000*each['accuracy']).round().int().tolist()))
    return row | (dict(picture=encoded(pictures[0])) if name in SHOWN else {})


@functools.lru_cache(maxsize=1)
def shared(path): return torch.load(path, weights_only=False)


def summary(values, settings):
    "Mean and 95 % interval; prompts are drawn anew, each with all of its seeds"
    return [float(f'{v:.5g}') for v in bootstrap(values.view(settings['seeds'], -1).mean(0))]


def encoded(picture):
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray((picture*255).round().byte().permute(1, 2, 0).numpy()).save(file, 'WEBP', quality=95)
    return base64.b64encode(file.getvalue()).decode()


def quiet():
    import diffusers, transformers
    warnings.filterwarnings('ignore')
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the solving times are those of one thread
    torch.backends.cudnn.allow_tf32 = False


# ---- all rows ----

def version(package):
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return None


def read(path): return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}


def write(path, found):
    "One line a row, in the order of `ROWS`; all of it or nothing"
    rows = [f'  {json.dumps(name)}: {json.dumps(found["rows"][name], ensure_ascii=False)}' for name in ROWS if name in found['rows']]
    head = [f' {json.dumps(k)}: {json.dumps(v)}' for k, v in found.items() if k != 'rows']
    new = path.with_suffix('.new')
    new.write_text('{\n' + ',\n'.join(head + [' "rows": {\n' + ',\n'.join(rows) + '\n }']) + '\n}\n', encoding='utf-8')
    new.replace(path)


def machine(device):
    found = dict(processor=platform.machine(), python=platform.python_version(), torch=torch.__version__)
    if device != 'cpu': found['gpu'] = torch.cuda.get_device_name()
    return found | {p: version(p) for p in ('diffusers', 'transformers', 'nvidia-modelopt', 'optimum-quanto', 'torchao') if version(p)}


def command():
    "As it was given, but for the place"
    given = sys.argv[1:]
    if '--out' in given: del given[given.index('--out'):given.index('--out') + 2]
    return shlex.join(['python', 'tools/fidelity.py', *given])


def run(models, names, settings, device, jobs, out, again):
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for model in models:
        found = read(out/f'fidelity_{model}.json')
        if found and found['settings'] != settings:
            sys.exit(f'{out/f"fidelity_{model}.json"} was made with {found["settings"]}, not {settings}: give another --out, or remove it.')
        results[model] = found or dict(settings=settings, command=command(), machine=machine(device), rows={})
    todo = [(model, name) for name in names for model in reversed(models) if again or 'psnr' not in results[model]['rows'].get(name, {})]
    for model, name in [t for t in todo if ROWS[t[1]].package and not version(ROWS[t[1]].package)]:
        results[model]['rows'][name] = dict(group=ROWS[name].group, about=ROWS[name].about) | {'not run': f'pip install {ROWS[name].package}'}
        todo.remove((model, name))
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn')) as pool:
        paths = {model: Path(folder)/f'{model}.pt' for model, _ in todo}
        ready = {pool.submit(prepare, model, settings, device, path): model for model, path in paths.items()}
        start = time.time()
        for future in as_completed(ready):
            results[ready[future]]['original'] = future.result()
            print(f'{time.time() - start:4.0f} s  {ready[future]}: originals', flush=True)
        wanted = {model for model, name in todo if ROWS[name].measured and results[model].get('measured', {}).get('settings') != MEASURING}
        ready = {pool.submit(measure, model, MEASURING, paths[model], -(-2*jobs//3)): model for model in wanted}
        for future in as_completed(ready):
            results[ready[future]]['measured'] = future.result()
            write(out/f'fidelity_{ready[future]}.json', results[ready[future]])
            print(f'{time.time() - start:4.0f} s  {ready[future]}: measured', flush=True)
        rows = {pool.submit(run_row, model, name, settings, device, paths[model], results[model].get('measured')): (model, name) for model, name in todo}
        for future in as_completed(rows):
            model, name = rows[future]
            try: row = future.result()
            except Exception as e: row = {'not run': f'{type(e).__name__}: {e}'.split('\n')[0][:200]}
            results[model]['rows'][name] = dict(group=ROWS[name].group, about=ROWS[name].about) | row
            write(out/f'fidelity_{model}.json', results[model])
            print(f'{time.time() - start:4.0f} s  {model:10} {name:24}', line(row), flush=True)
    for model in models: write(out/f'fidelity_{model}.json', results[model])


def line(row):
    if 'not run' in row: return row['not run']
    p, low, high = row['psnr']
    change, worse, better = (100*v for v in row['change'])
    return (f'{p:5.2f} dB [{low:.2f}, {high:.2f}]  SSIM {row["ssim"][0]:.3f}  perceptual {row["perceptual"][0]:.3f}  '
            f'accuracy {100*row["accuracy"][0]:.1f} % ({change:+.1f} [{worse:+.1f}, {better:+.1f}])  {row["bytes"]/1e6:.2f} MB  {row["seconds"]:.0f} s')


def table(models, out):
    "Markdown"
    for model in models:
        found = read(out/f'fidelity_{model}.json')
        print(f'\n### {model}\n\n{found["settings"]} on {found["machine"]}\n\n| | | PSNR, dB | SSIM | perceptual | accuracy, % | change | MB | s |\n|---|---|---|---|---|---|---|---|---|')
        for name, row in found['rows'].items():
            if 'not run' in row: cells = [row['not run'], *['']*6]
            else: cells = [span(row['psnr']), span(row['ssim'], 3), span(row['perceptual'], 3), f'{100*row["accuracy"][0]:.1f}',
                           span([100*v for v in row['change']], 1), f'{row["bytes"]/1e6:.2f}', f'{row["seconds"]:.0f}']
            print('| ' + ' | '.join([name, ', '.join([ROWS[name].about, *row.get('remarks', [])]), *cells]) + ' |')


def span(values, digits=2):
    mean, low, high = (f'{v:.{digits}f}' for v in values)
    return f'{mean} [{low}, {high}]'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, choices=MODELS)
    parser.add_argument('--only', nargs='+', default=['*'], help='patterns of names of rows')
    parser.add_argument('--prompts', type=int, default=128)
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--device', default='cpu', help='that draws; quantizing is done on the CPU')
    parser.add_argument('--jobs', type=int, default=1, help='rows at a time')
    parser.add_argument('--out', type=Path, default=ROOT/'nbs'/'results')
    parser.add_argument('--again', action='store_true', help='also rows that are stored')
    parser.add_argument('--table', action='store_true', help='only print what is stored')
    a = parser.parse_args()
    names = [n for n in ROWS if any(fnmatchcase(n, p) for p in a.only)]
    if not names: parser.error(f'--only {" ".join(a.only)} matches none of {", ".join(ROWS)}')
    os.environ['OMP_NUM_THREADS'] = '1'
    if not a.table: run(a.models, names, dict(prompts=a.prompts, seeds=a.seeds, calibration=CALIBRATION), a.device, a.jobs, a.out, a.again)
    table(a.models, a.out)


if __name__ == '__main__': main()
