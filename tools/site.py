"""The documentation site, from the notebooks as they are stored: no cell is run, no network, no Quarto.

    python tools/site.py                  # writes docs/_site
    python tools/site.py --out /some/dir

nbdev's processors take out what is hidden; exported cells get an API entry (tools/apidoc.py) above their
folded source; Sphinx (docs/conf.py) does the rest, and a reference that leads nowhere stops it.
"""
import argparse
import ast
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import yaml
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults, add_fold, add_links, add_show_docs, clean_show_doc
from nbdev.processors import exec_show_docs, insert_warning, mv_exports, rm_export

from apidoc import Entries, Symbols

ROOT, START = Path(__file__).resolve().parent.parent, Path.cwd()
os.chdir(ROOT)  # nbdev takes the project that it is called in, whatever path it is given
CFG = get_config()
PACKAGE, NBS, DOCS = CFG.lib_path.name, CFG.nbs_path, ROOT/'docs'
SITE = f'{CFG.doc_host.rstrip("/")}/{CFG.doc_baseurl.strip("/")}'
BLOB = f'{CFG.git_url}/blob/{CFG.branch}'
COLAB = f'https://colab.research.google.com/github/{CFG.user}/{CFG.repo}/blob/{CFG.branch}'

CALLOUT = re.compile(r'^(:{3,})[ \t]*\{\.callout-(\w+)([^}\n]*)\}[ \t]*\n(.*?)^\1[ \t]*$', re.M | re.S)
RELATIVE_LINK = re.compile(r'(\]\()(?![a-z]+:|[#/])([^)#\s]+)(#[^)\s]*)?')
OPTION_LINE = re.compile(r'^[ \t]*#\|.*\n?', re.M)
ANSI = re.compile(r'\x1b\[[0-9;]*m')


class StaticProcessors(FilterDefaults):
    "nbdev's own processors, less those that run code or drop the exported cells"
    left_out = (add_show_docs, exec_show_docs, clean_show_doc, insert_warning, rm_export, mv_exports,
                add_fold, add_links)

    def base_procs(self):
        return [p for p in super().base_procs() if p not in self.left_out]


@dataclass
class Cell:
    text: str  # markdown or code
    is_code: bool = False
    exported: bool = False
    outputs: list = field(default_factory=list)
    options: dict = field(default_factory=dict)


@dataclass
class Page:
    notebook: Path  # inside nbs/
    name: str  # nbdev's: 00_formats.ipynb is formats, so links made by nbdev hold here too
    title: str
    lead: str
    module: str  # that it exports, or ''
    cells: list[Cell]

    @property
    def address(self) -> str: return f'{self.name}.html'


def text(source) -> str:
    return ''.join(source) if isinstance(source, list) else source


def page_name(notebook: Path) -> str:
    return notebook.with_name(re.sub(r'^\d+[a-z0-9]*_', '', notebook.name.lower())).with_suffix('').as_posix()


def read_page(notebook: Path) -> Page:
    nb = read_nb(NBS/notebook)
    exports = (re.search(r'^#\|\s*default_exp\s+([\w.]+)', text(c.source), re.M) for c in nb.cells)
    module = next((f'{PACKAGE}.{m[1]}' for m in exports if m), '')
    StaticProcessors()(nb)
    front = getattr(nb, 'frontmatter_', {})
    cells = [cell for cell in map(read_cell, nb.cells) if cell]
    title, lead = front.get('title', notebook.stem), front.get('description', '')
    return Page(notebook, page_name(notebook), title, lead, module, cells)


def read_cell(nb_cell) -> Cell | None:
    "What a reader sees of a cell, or None"
    source = text(nb_cell.source)
    if nb_cell.cell_type == 'markdown':
        return Cell(source)
    options = {name.rstrip(':'): ' '.join(args) for name, args in (nb_cell.get('directives_') or {}).items()}
    source = OPTION_LINE.sub('', source).strip('\n')
    unseen = options.keys() & {'hide', 'default_exp'} or options.get('include') == 'false'
    # The entry stands where the symbol is exported: show_doc has nothing to add
    if nb_cell.cell_type != 'code' or unseen or source.startswith('show_doc('):
        return None
    outputs = [] if options.get('output') == 'false' else nb_cell.get('outputs', [])
    if options.get('warning') == 'false':
        outputs = [o for o in outputs if o.get('name') != 'stderr']
    exported = bool(options.keys() & {'export', 'exports', 'exporti'})
    cell = Cell(source, True, exported, outputs, options)
    return cell if outputs or source and options.get('echo') != 'false' else None


def read_sidebar() -> dict[str, list[Path]]:
    "Notebooks by section, '' for those above all sections, from nbs/sidebar.yml, which Quarto uses too"
    sections = {'': []}
    listed = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    for item in listed:
        if isinstance(item, str):
            sections[''].append(Path(item))
        else:
            sections[item['section']] = [Path(p) for p in item['contents']]
    here = {p.relative_to(NBS) for p in nbglob(NBS, as_path=True)}
    there = {p for notebooks in sections.values() for p in notebooks}
    problems = [f'{p} is missing from {NBS.name}/sidebar.yml' for p in sorted(here - there)]
    problems += [f'{NBS.name}/sidebar.yml lists {p}, which does not exist' for p in sorted(there - here)]
    if problems:
        sys.exit('\n'.join(problems))
    return sections


def follow(markdown: str, page: Page, target) -> str:
    "Relative links: to notebooks by `target`, to other files of the repository on GitHub"
    def replace(m):
        path = Path(os.path.normpath(NBS.relative_to(ROOT)/page.notebook.parent/m[2]))
        anchor = m[3] or ''
        if not (ROOT/path).exists():
            sys.exit(f'{page.notebook} links to {m[2]}, which does not exist')
        if path.suffix == '.ipynb' and path.is_relative_to(NBS.name):
            return f'{m[1]}{target(page_name(path.relative_to(NBS.name)))}{anchor}'
        return m[0] if path.is_relative_to(NBS.name) else f'{m[1]}{BLOB}/{path.as_posix()}{anchor}'
    return RELATIVE_LINK.sub(replace, markdown)


def callouts(markdown: str) -> str:
    "Quarto's callouts as MyST admonitions"
    def replace(m):
        fence, kind, attributes, body = m.groups()
        kind = kind if kind in ('note', 'tip', 'warning', 'caution', 'important') else 'note'
        title = re.search(r'title="([^"]*)"', attributes)
        head = f'{{admonition}} {title[1]}\n:class: {kind}\n' if title else f'{{{kind}}}'
        return f'{fence}{head}\n{body}{fence}'
    return CALLOUT.sub(replace, markdown)


def only_imports(source: str) -> bool:
    try:
        return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)
    except SyntaxError:  # a shell command or another language
        return False


class SphinxPage:
    "A page as the notebook that Sphinx reads"

    def __init__(self, page: Page, symbols: Symbols, start: str = ''):
        self.page, self.heading, self.cells = page, page.title, []
        self.start = start  # on the home page, the first page to read
        self.markdown(self.header())
        for cell in page.cells:
            if not cell.is_code:
                self.heading = (re.findall(r'^#+ +(.+?) *$', cell.text, re.M) or [self.heading])[-1]
                linked = symbols.link(callouts(cell.text), page.module)
                self.markdown(follow(linked, page, lambda name: f'/{name}.ipynb'))
                continue
            if cell.exported and (entry := str(Entries(page.module, cell.text, symbols))):
                self.markdown(entry)
            self.code(cell)

    def add(self, kind: str, source: str, **more):
        cell = {'cell_type': kind, 'id': f'c{len(self.cells)}', 'source': source, 'metadata': {}}
        self.cells.append(cell | more)

    def markdown(self, source: str):
        self.add('markdown', source)

    def code(self, cell: Cell):
        outputs = [o for o in cell.outputs if o['output_type'] in ('stream', 'error') or o.get('data')]
        # MyST-NB drops a cell without source, and its outputs with it
        self.add('code', cell.text or 'pass', outputs=outputs, execution_count=None)
        alt = cell.options.get('fig-alt', f'Figure: {self.heading}'.replace('`', ''))
        shown = {'image': {'alt': alt}}
        summary = cell.options.get('code-summary', '').strip('"')
        if summary := summary or ('Imports' if only_imports(cell.text) else ''):
            shown |= {'code_prompt_show': summary, 'code_prompt_hide': summary}
        tags = []
        if cell.options.get('echo') == 'false' or not cell.text:
            tags = ['remove-input']
        elif cell.options.get('code-fold') == 'true' or cell.exported and 'exports' not in cell.options:
            tags = ['hide-input']
        self.cells[-1]['metadata'] = {'tags': tags, 'mystnb': shown}

    def header(self) -> str:
        page = self.page
        up, path = '../'*page.name.count('/'), f'{NBS.name}/{page.notebook.as_posix()}'
        links = [('Notebook source', f'{BLOB}/{path}', ''),
                 ('Download .ipynb', f'{up}notebooks/{page.notebook.as_posix()}', ' download'),
                 ('Open in Colab', f'{COLAB}/{path}', '')]
        pills = ' '.join(f'<a class="pill" href="{url}"{extra}>{label}</a>' for label, url, extra in links)
        if self.start:
            pills = f'<a class="pill primary" href="{self.start}.html">Start reading</a> {pills}'
        name = f'<code class="module">{page.module}</code> ' if page.module else ''
        parts = [f'# {page.title}', f'{{.lead}}\n{page.lead}' if page.lead else '',
                 f'```{{raw}} html\n<p class="pills">{name}{pills}</p>\n```',
                 f'```{{py:module}} {page.module}\n```' if page.module else '']
        return '\n\n'.join(filter(None, parts))

    def json(self) -> str:
        kernel = {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}
        language = {'name': 'python', 'pygments_lexer': 'ipython3'}
        return json.dumps({'cells': self.cells, 'nbformat': 4, 'nbformat_minor': 5,
                           'metadata': {'kernelspec': kernel, 'language_info': language}})


def toctrees(pages: dict[Path, Page], sections: dict[str, list[Path]]) -> str:
    "The sidebar; a notebook goes by its number and its title, as the number is its floor"
    def tree(caption, notebooks):
        listed = [pages[n] for n in notebooks if pages[n].name != 'index']
        lines = '\n'.join(f'{number(page.notebook)}{page.title} </{page.name}>' for page in listed)
        caption = f':caption: {caption}\n' if caption else ''
        return f'```{{toctree}}\n:hidden:\n{caption}\n{lines}\n```'

    def number(notebook):
        digits = re.match(r'\d+(?=_)', notebook.name)
        return f'{digits[0]} ' if digits else ''

    return '\n\n'.join(tree(*section) for section in sections.items())


def plain_markdown(page: Page) -> str:
    "A page for those who only read text: code and what it printed, no pictures"
    parts = [f'# {page.title}', f'> {page.lead}' if page.lead else '', f'Source: {SITE}/{page.address}']
    for cell in page.cells:
        if not cell.is_code:
            parts.append(follow(cell.text, page, lambda name: f'{SITE}/{name}.html'))
            continue
        if cell.text and cell.options.get('echo') != 'false':
            parts.append(f'```python\n{cell.text}\n```')
        printed = (text(o.get('text') or o.get('data', {}).get('text/plain', '')) for o in cell.outputs)
        printed = [ANSI.sub('', p).rstrip() for p in printed if p and not p.startswith('<Figure')]
        parts += [f'```text\n{p}\n```' for p in printed]
    return '\n\n'.join(filter(None, parts)) + '\n'


def llms_index(pages: dict[Path, Page], sections: dict[str, list[Path]]) -> str:
    "What the site holds, for language models: https://llmstxt.org"
    home = pages[Path('index.ipynb')]
    about = next((c.text for c in home.cells if not c.is_code), '').split('\n\n')[0].replace('\n', ' ')
    parts = [f'# {home.title}', f'> {home.lead}', about,
             f'All pages as one Markdown file: [llms-full.txt]({SITE}/llms-full.txt)']
    for section, notebooks in sections.items():
        listed = [pages[n] for n in notebooks]
        parts += [f'## {section or "Start here"}',
                  '\n'.join(f'- [{p.title}]({SITE}/{p.address}): {p.lead}' for p in listed)]
    return '\n\n'.join(parts) + '\n'


def mathjax() -> Path:
    "The one file that draws formulas without a network and without fonts"
    try:
        package = distribution('sphinx-mathjax-offline')
    except PackageNotFoundError:
        sys.exit("Formulas need the package sphinx-mathjax-offline: pip install -e '.[docs]'")
    return Path(package.locate_file('sphinx-mathjax-offline/static/mathjax/tex-svg.js'))


def write(path: Path, content: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding='utf-8')


def write_sources(pages: dict[Path, Page], sections: dict[str, list[Path]], symbols: Symbols,
                  src: Path, extra: Path):
    "`src` is what Sphinx reads, `extra` what it copies as it is"
    first = next(page.name for page in pages.values() if page.name != 'index')
    for page in pages.values():
        sphinx_page = SphinxPage(page, symbols, first if page.name == 'index' else '')
        if page.name == 'index':
            sphinx_page.markdown(toctrees(pages, sections))
        write(src/f'{page.name}.ipynb', sphinx_page.json())
        write(extra/'notebooks'/page.notebook, (NBS/page.notebook).read_text(encoding='utf-8'))
    for picture in (p for end in ('png', 'jpg', 'svg', 'gif') for p in NBS.rglob(f'*.{end}')):
        (src/picture.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, src/picture.relative_to(NBS))
    write(extra/'llms.txt', llms_index(pages, sections))
    write(extra/'llms-full.txt', '\n\n'.join(map(plain_markdown, pages.values())))
    (extra/'_static').mkdir()
    shutil.copy(mathjax(), extra/'_static/tex-svg.js')


def sphinx(src: Path, extra: Path, out: Path, work: Path):
    from sphinx.cmd.build import build_main
    failed = build_main(['-b', 'html', '-q', '-n', '-W', '--keep-going', '-c', str(DOCS), '-d', str(work),
                         '-D', f'html_extra_path={extra}', '-D', f'html_baseurl={SITE}/', str(src), str(out)])
    if failed:
        sys.exit('The site was not written, mend the warnings above. Line 30012 is line 12 of cell 3.')


def replace_site(new: Path, out: Path):
    """By renaming, so that there is always the old site or the new one; `new` is on the same disk.

    Never a folder that holds something else.
    """
    old = new.with_name('old')
    if out.exists():
        if any(out.iterdir()) and not (out/'objects.inv').exists():
            sys.exit(f'{out} holds something that is not a site: give another folder with --out.')
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=DOCS/'_site', help='its folder (default: docs/_site)')
    out, start = (START/parser.parse_args().out).resolve(), time.time()
    sections = read_sidebar()
    pages = {notebook: read_page(notebook) for notebooks in sections.values() for notebook in notebooks}
    symbols = Symbols(PACKAGE)
    for page in pages.values():
        for cell in page.cells:
            if cell.exported:
                symbols.add(page.module, cell.text)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix='.site-') as tmp:
        src, extra, new, work = (Path(tmp)/name for name in ('pages', 'extra', 'site', 'doctrees'))
        write_sources(pages, sections, symbols, src, extra)
        sphinx(src, extra, new, work)
        replace_site(new, out)
    size = sum(p.stat().st_size for p in out.rglob('*') if p.is_file())
    seconds = time.time() - start
    print(f'{len(pages)} pages and {len(symbols.full)} symbols in {seconds:.1f} s, {size/1e6:.1f} MB')
    print(f'open {os.path.relpath(out, START)}/index.html')


if __name__ == '__main__':
    main()
