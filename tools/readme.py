"""README.md from nbs/index.ipynb, in GitHub's markdown, without running anything.

    python tools/readme.py            # write README.md and README_files/
    python tools/readme.py --check    # only say whether they are up to date
"""
import base64
import os
import re
import sys
from pathlib import Path

from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults, add_show_docs, exec_show_docs

cfg = get_config()
ROOT, FIGURES = cfg.config_path, 'README_files'
SITE = cfg.doc_host.rstrip('/') + '/' + cfg.doc_baseurl.strip('/')
CALLOUT = re.compile(r'^:{3,}\s*\{\.callout-(\w+)([^}]*)\}[ \t]*$(.*?)^:{3,}[ \t]*$', re.M | re.S)
NOTEBOOK_LINK = re.compile(r'\]\((?!https?:|#)([^)\s]+\.ipynb)')


class StaticProcessors(FilterDefaults):
    "nbdev's own processors, less the two that need to run code"
    def base_procs(self):
        return [p for p in super().base_procs() if p not in (exec_show_docs, add_show_docs)]


def text(source) -> str:
    return ''.join(source) if isinstance(source, list) else source


def markdown(source: str) -> str:
    "Callouts as GitHub's alerts, which have no titles; links between notebooks from the root"
    def alert(m):
        title = re.search(r'title="([^"]*)"', m[2])
        body = (f'**{title[1]}**\n\n' if title else '') + m[3].strip()
        return f'> [!{m[1].upper()}]\n' + '\n'.join(f'> {line}'.rstrip() for line in body.split('\n'))
    return NOTEBOOK_LINK.sub(rf']({cfg.nbs_path.name}/\1', CALLOUT.sub(alert, source))


def outputs(cell, figures: dict, alt: str):
    for n, out in enumerate(cell.get('outputs', [])):
        data = out.get('data', {})
        if 'image/png' in data:
            name = f'{FIGURES}/{cell.id}-{n}.png'
            figures[name] = base64.b64decode(text(data['image/png']))
            yield f'![{alt}]({name})'
        elif 'text/markdown' in data:
            yield text(data['text/markdown'])
        elif 'text/html' in data:
            html = re.sub(r'<style.*?</style>\s*', '', text(data['text/html']), flags=re.S)
            yield re.sub(r'\n\s*\n', '\n', html)
        elif 'text/plain' in data or 'text' in out:
            yield '```\n' + text(data.get('text/plain', out.get('text'))).rstrip() + '\n```'


def build() -> tuple[str, dict]:
    "The text of README.md, and its figures by file name"
    nb = read_nb(cfg.nbs_path/cfg.readme_nb)
    StaticProcessors()(nb)
    front, figures = nb.frontmatter_, {}
    parts = [f'<!-- made by tools/readme.py from {cfg.nbs_path.name}/{cfg.readme_nb}: edit that -->',
             f'# {front["title"]}', front.get('description', '')]
    for cell in nb.cells:
        source = text(cell.source).strip()
        if cell.cell_type == 'markdown' and not source.startswith('<!-- WARNING'):
            parts.append(markdown(source))
        if cell.cell_type != 'code':
            continue
        options = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*\S)', source, re.M))
        code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
        if options.get('include') == 'false':
            continue
        if code and options.get('echo') != 'false':
            parts.append(f'```python\n{code}\n```')
        if options.get('output') != 'false':
            parts.extend(outputs(cell, figures, options.get('fig-alt', 'figure').strip('"')))
    return '\n\n'.join(p for p in parts if p) + '\n', figures


def main():
    os.chdir(ROOT)
    readme, figures = build()
    want = {Path('README.md'): readme.encode(), **{Path(k): v for k, v in figures.items()}}
    have = set(Path(FIGURES).glob('*'))
    stale = [p for p, b in want.items() if not p.exists() or p.read_bytes() != b] + sorted(have - set(want))
    if '--check' in sys.argv:
        sys.exit(f'out of date, run tools/readme.py: {", ".join(map(str, stale))}' if stale else 0)
    for path in have - set(want):
        path.unlink()
    for path, content in want.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


if __name__ == '__main__':
    main()
