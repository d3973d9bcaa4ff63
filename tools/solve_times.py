"""How long quantize takes to solve each pipeline of the zoo, without the pass over the calibration set.

    python tools/solve_times.py --out nbs/results/solve.json
"""
import argparse
import json
import platform
import time
import warnings
from pathlib import Path

import torch

import segquant_nb.quantization as quantization
from segquant_nb.cli import _small_pictures, _zoo_prompts
from segquant_nb.zoo import FAMILIES, load, noise_model

PRESETS = 'segquant-g-w8a8', 'w8a8', 'segquant-g-w4a8', 'w4a8', 'w4a4'


def apart(work):
    "Seconds of process time for work(): in all, and in collect_stats"
    collect, inside = quantization.collect_stats, []

    def timed(*args, **more):
        start = time.process_time()
        found = collect(*args, **more)
        inside.append(time.process_time() - start)
        return found
    quantization.collect_stats = timed
    try:
        start = time.process_time()
        work()
        return time.process_time() - start, sum(inside)
    finally:
        quantization.collect_stats = collect


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    rows = []
    for name in FAMILIES:
        pipe = load(name)
        calib = quantization.calibrate_pipeline(pipe, _zoo_prompts(), progress=False, **_small_pictures(pipe))
        for preset in PRESETS:
            whole, observing = apart(lambda: quantization.quantize(noise_model(pipe), calib, preset, progress=False))
            rows.append({'model': name, 'preset': preset, 'solve_s': round(whole - observing, 1), 'observe_s': round(observing, 1)})
            print(rows[-1], flush=True)
    found = {'machine': {'processor': platform.machine(), 'python': platform.python_version(), 'torch': torch.__version__,
                         'threads': torch.get_num_threads(), 'clock': 'process time'},
             'command': 'python tools/solve_times.py --out nbs/results/solve.json', 'rows': rows}
    if args.out is not None: args.out.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
