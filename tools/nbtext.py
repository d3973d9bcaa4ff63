"""Write a notebook as plain text, and back, for those who would rather edit text.

    python tools/nbtext.py nbs/00_formats.ipynb > formats.txt     # notebook → text
    python tools/nbtext.py formats.txt nbs/00_formats.ipynb       # text → notebook

In the text a line `# %% [markdown]` starts a markdown cell and `# %%` a code cell. On the way back,
cells whose source did not change keep their id and their outputs; run `tools/nbrun.py` for the rest.
"""
import hashlib
import json
import os
import re
import sys
from pathlib import Path

MARK = re.compile(r'^# %%(?: \[(markdown|raw)\])?[ ]*\n', re.M)
KERNEL = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}


def source(cell) -> str:
    return ''.join(cell['source'])


def to_text(nb: dict) -> str:
    for c in nb['cells']:
        if MARK.search(source(c) + '\n'):
            sys.exit(f'cell {c["id"]} has a line that would start a new cell in the text: change that line')
    marks = {'markdown': '# %% [markdown]', 'code': '# %%', 'raw': '# %% [raw]'}
    return '\n\n'.join(f"{marks[c['cell_type']]}\n{source(c)}" for c in nb['cells']) + '\n'


def new_cell(kind: str, src: str, taken: set) -> dict:
    "A cell whose id follows from its source, so that the same text gives the same file"
    salt = 0
    while (cid := hashlib.sha1(f'{salt}{kind}{src}'.encode()).hexdigest()[:8]) in taken:
        salt += 1
    cell = {'cell_type': kind, 'id': cid, 'metadata': {}, 'source': src.splitlines(True)}
    return cell | ({'execution_count': None, 'outputs': []} if kind == 'code' else {})


def from_text(text: str, old: dict | None = None) -> dict:
    known = {}
    for c in (old or {}).get('cells', []):
        known.setdefault((c['cell_type'], source(c)), []).append(c)
    parts = MARK.split(text)
    if parts[0].strip():
        sys.exit('the text has to start with a line "# %%" or "# %% [markdown]"')
    cells, taken = [], {c['id'] for c in (old or {}).get('cells', [])}
    for kind, src in zip(parts[1::2], parts[2::2]):
        kind, src = kind or 'code', src.strip('\n')
        same = known.get((kind, src))
        cells.append(same.pop(0) if same else new_cell(kind, src, taken))
        taken.add(cells[-1]['id'])
    return {'cells': cells, 'metadata': (old or {}).get('metadata', KERNEL), 'nbformat': 4, 'nbformat_minor': 5}


def write(path: Path, content: str):
    "All of it or nothing"
    new = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        new.write_text(content, encoding='utf-8')
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def main():
    if len(sys.argv) == 2:
        return print(to_text(json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))), end='')
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    src, dst = map(Path, sys.argv[1:])
    old = json.loads(dst.read_text(encoding='utf-8')) if dst.exists() else None
    nb = from_text(src.read_text(encoding='utf-8'), old)
    write(dst, json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    main()
