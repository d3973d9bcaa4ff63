"""Run notebooks in a fresh kernel each and store outputs that are small and the same on every run.

    python tools/nbrun.py                     # all of them
    python tools/nbrun.py nbs/00_formats.ipynb
    python tools/nbrun.py --flags cuda ...    # run the cells marked `#| cuda` too
    python tools/nbrun.py --check             # only say which stored outputs would change

Cells that are skipped (`#| eval: false`, a flag that was not asked for) keep the output they have,
so that a result made once on a GPU stays.
"""
import argparse
import base64
import io
import json
import os
import re
import time
from pathlib import Path

# A bar prints once, without times; hashing is fixed.
os.environ.update({'TQDM_MININTERVAL': '3600', 'TQDM_NCOLS': '72', 'PYTHONHASHSEED': '0',
                   'TQDM_BAR_FORMAT': '{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}',
                   'HF_HUB_OFFLINE': '1', 'PYDEVD_DISABLE_FILE_VALIDATION': '1'})
os.environ.setdefault('OMP_NUM_THREADS', '1')  # sums in one order, as in the tests
import nbformat
from execnb.nbio import dict2nb, nb2str
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives

from nbtext import write

WIDGET = 'application/vnd.jupyter.widget-view+json'
SKIP = 'skip-execution'


def skipped(cell, flags: set) -> bool:
    if cell.cell_type != 'code':
        return False
    directives = extract_directives(dict2nb({'cells': [dict(cell)]}).cells[0], remove=False)
    never = directives.get('eval:', [''])[0].lower() == 'false' or 'nbdev_export(' in cell.source
    return never or bool(flags & directives.keys()) or SKIP in cell.metadata.get('tags', [])


def after_returns(text: str) -> str:
    "What a terminal still shows after carriage returns"
    return '\n'.join(line.rstrip('\r').rsplit('\r', 1)[-1] for line in text.split('\n'))


def finished_bar(state: dict, model_id: str) -> dict:
    "Static text and HTML for a tqdm widget, without times"
    parts = [state.get(k.removeprefix('IPY_MODEL_'), {}) for k in state.get(model_id, {}).get('children', [])]
    bars = [p for p in parts if 'max' in p]
    if not bars:
        return {}
    value, end = int(bars[0].get('value', 0)), int(bars[0]['max'])
    title = re.sub(r'\s*\d+%.*', '', parts[0].get('value', '')).strip()
    return {'text/plain': f'{title} {value}/{end}'.strip(),
            'text/html': f'<div>{title} <progress value="{value}" max="{end}"></progress> {value}/{end}</div>'}


def small_png(data: str) -> str:
    """The same picture in fewer bytes, without the version that Matplotlib writes into it.

    Where 128 colors are as good as all of them (a line plot), it gets a palette; a photograph keeps
    its exact pixels.
    """
    from PIL import Image, ImageChops, ImageStat
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    if 'A' in image.getbands() and image.getchannel('A').getextrema() == (255, 255):
        image = image.convert('RGB')
    if image.mode == 'RGB':
        small = image.quantize(128, dither=Image.Dither.NONE)
        change = ImageStat.Stat(ImageChops.difference(small.convert('RGB'), image)).rms
        image = small if max(change) < 2 else image  # of 255
    out = io.BytesIO()
    image.save(out, 'png', optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def tidy(cell, state: dict):
    kept = []
    for out in cell.get('outputs', []):
        if out.output_type == 'stream':
            if kept and kept[-1].output_type == 'stream' and kept[-1].name == out.name:
                kept[-1].text += out.text
                continue
        elif WIDGET in out.get('data', {}):
            out.data.update(finished_bar(state, out.data.pop(WIDGET)['model_id']))
        if 'image/png' in out.get('data', {}):
            out.data['image/png'] = small_png(out.data['image/png'])
        kept.append(out)
    for out in kept:
        if out.output_type == 'stream':
            out.text = after_returns(out.text)
    cell.outputs = [o for o in kept if o.output_type != 'stream' or o.text.strip()]


def run(path: Path, flags: set, timeout: int):
    "The notebook with fresh outputs"
    cfg, nb = get_config(), nbformat.read(path, 4)
    own_tags = {cell.id: cell.metadata.get('tags') for cell in nb.cells if skipped(cell, flags)}
    for cell in nb.cells:
        if cell.id in own_tags:
            cell.metadata['tags'] = [*(own_tags[cell.id] or []), SKIP]
    client = NotebookClient(nb, timeout=timeout, kernel_name='python3', store_widget_state=True,
                            skip_cells_with_tag=SKIP, resources={'metadata': {'path': str(path.parent)}},
                            extra_arguments=['--IPKernelApp.log_level=40'])
    client.execute()
    nb.metadata.pop('widgets', None)
    for cell in nb.cells:
        if cell.id in own_tags:
            cell.metadata['tags'] = own_tags[cell.id]
            if own_tags[cell.id] is None: del cell.metadata['tags']
        elif cell.cell_type == 'code':
            tidy(cell, client.widget_state)
    clean_nb(nb, allowed_metadata_keys=cfg.allowed_metadata_keys.split(),
             allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split())
    return dict2nb(json.loads(nbformat.writes(nb)))


def changed(path: Path, nb) -> list[str]:
    "The ids of the cells whose stored outputs are not those of this run"
    stored = {c['id']: c.get('outputs') for c in json.loads(path.read_text(encoding='utf-8'))['cells']}
    fresh = {c['id']: c.get('outputs') for c in json.loads(nb2str(nb))['cells']}
    return [i for i in fresh if fresh[i] != stored[i]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*')
    parser.add_argument('--flags', default='', help='test flags of settings.ini to run too, e.g. "slow cuda"')
    parser.add_argument('--timeout', type=int, default=900, help='seconds a cell may take')
    parser.add_argument('--check', action='store_true', help='write nothing; status 1 if an output would change')
    args = parser.parse_args()
    known, wanted = set(get_config().tst_flags.split()), set(args.flags.split())
    if wanted - known:
        parser.error(f'no such flag: {" ".join(sorted(wanted - known))} (settings.ini knows {" ".join(sorted(known))})')
    stale = False
    for path in sorted(map(Path, args.paths or nbglob(as_path=True))):
        start = time.time()
        nb = run(path, known - wanted, args.timeout)
        ids = changed(path, nb) if args.check else []
        stale |= bool(ids)
        if not args.check:
            write(path, nb2str(nb))
        note = f', the outputs of {" ".join(ids)} would change' if ids else ''
        print(f'{path}: {time.time() - start:.1f} s{note}', flush=True)
    raise SystemExit(stale)


if __name__ == '__main__':
    main()
