"""The documentation site: built, served on this machine, and driven in headless Chromium."""
import functools
import http.server
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

ROOT = Path(__file__).parent.parent
CFG = get_config(path=ROOT)
PUBLISHED = f'{CFG.doc_host}{CFG.doc_baseurl}/'
NOTEBOOKS = sorted(p.relative_to(CFG.nbs_path) for p in nbglob(CFG.nbs_path, as_path=True))
WIDE, PHONE = {'width': 1280, 'height': 900}, {'width': 390, 'height': 844}
CHROMIUM_FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
                  '--disable-background-networking', '--disable-component-update']


def need(found, what: str):
    "Without it these tests are skipped; in CI they must not be"
    if not found:
        (pytest.fail if os.environ.get('CI') else pytest.skip)(f'the tests of the site need {what}')
    return found


def run_site(root: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, root/'tools/site.py', '--out', out]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope='module')
def tools():
    for module in ('sphinx', 'myst_nb', 'furo', 'sphinx_copybutton'):
        need(find_spec(module), f"the package {module}: pip install -c constraints.txt -e '.[docs]'")


@pytest.fixture(scope='module')
def site(tools, tmp_path_factory) -> Path:
    "Built here, or the one that SITE names: .ci/run has just built it"
    if given := os.environ.get('SITE'): return Path(given).resolve()
    out = tmp_path_factory.mktemp('site')/'html'
    done = run_site(ROOT, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope='module')
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='module')
def browser():
    need(find_spec('playwright'), "the package playwright: pip install -c constraints.txt -e '.[docs]'")
    names = ('chromium', 'chromium-browser', 'google-chrome')
    chromium = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, names)), None)
    need(chromium, 'Chromium: apt-get install chromium, or name it in the variable CHROMIUM')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    "A function that opens a page of the site in a new window"
    contexts = []

    def open_page(path: str, viewport=WIDE, scheme='light'):
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.goto(address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()


LOOK = '''() => ({
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    formulas: document.querySelectorAll('.math').length,
    drawn: document.querySelectorAll('mjx-container > svg').length,
})'''
# Furo's column scrolls by itself on a phone, so it has to be asked too
OVERFLOW = '''() => [document.documentElement, ...document.querySelectorAll('.content')]
    .filter(e => e.scrollWidth > e.clientWidth).map(e => `${e.scrollWidth} > ${e.clientWidth}`)'''


def opened(context, url: str):
    "A new page, on its way, and what will be heard of it"
    page, trouble, requests = context.new_page(), [], []
    page.on('console', lambda m: trouble.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: trouble.append(str(e)))
    page.on('request', lambda r: requests.append(r.url))
    page.on('response', lambda r: trouble.append(f'{r.status} {r.url}') if r.status >= 400 else None)
    page.goto(url, wait_until='commit')
    return page, trouble, requests


@pytest.fixture(scope='module')
def seen(site, address, browser) -> dict[str, dict]:
    "What a visitor of each page meets: trouble, requests, links, anchors, formulas, width on a phone"
    seen, context = {}, browser.new_context(viewport=WIDE)
    paths = sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html'))
    for start in range(0, len(paths), 8):  # together they wait only once for half a second without requests
        several = {path: opened(context, address + path) for path in paths[start:start + 8]}
        for path, (page, trouble, requests) in several.items():
            page.wait_for_load_state('networkidle')
            if page.locator('.math').count():
                page.evaluate('() => window.MathJax?.startup?.promise')
            seen[path] = page.evaluate(LOOK) | {'trouble': trouble, 'requests': requests}
            page.set_viewport_size(PHONE)
            seen[path]['too_wide'] = page.evaluate(OVERFLOW)
            page.close()
    context.close()
    return seen


def test_no_trouble(seen):
    assert {path: s['trouble'] for path, s in seen.items() if s['trouble']} == {}


def test_nothing_from_outside(seen, address):
    outside = {path: [u for u in s['requests'] if not u.startswith((address, 'data:', 'blob:'))]
               for path, s in seen.items()}
    assert {path: urls for path, urls in outside.items() if urls} == {}


def test_no_dead_link(seen, site, address):
    dead, checked = [], 0
    for path, s in seen.items():
        for link in s['links']:
            url, anchor = urldefrag(link.replace(PUBLISHED, address))
            if not url.startswith(address):
                continue
            checked += 1
            target = unquote(url.removeprefix(address).partition('?')[0]) or 'index.html'
            if not (site/target).is_file():
                dead.append(f'{path}: {link}')
            elif anchor and target in seen and unquote(anchor) not in seen[target]['ids']:
                dead.append(f'{path}: {link}')
    assert checked > 100 and dead == []


def test_ids_are_unique(seen):
    "Two elements with one id: a link leads to the wrong one"
    twice = {path: sorted({i for i in s['ids'] if s['ids'].count(i) > 1 and not i.startswith('MJX')})
             for path, s in seen.items()}
    assert {path: ids for path, ids in twice.items() if ids} == {}


def test_no_sideways_scroll_on_a_phone(seen):
    assert {path: s['too_wide'] for path, s in seen.items() if s['too_wide']} == {}


def test_formulas_are_drawn(seen):
    with_formulas = {path: (s['formulas'], s['drawn']) for path, s in seen.items() if s['formulas']}
    assert with_formulas and all(drawn >= count for count, drawn in with_formulas.values()), with_formulas


def test_nbdev_finds_every_public_symbol(seen):
    "The addresses in _modidx.py, which nbdev writes into READMEs and other people's notebooks"
    index = importlib.import_module(f'{CFG.lib_path.name}._modidx').d['syms']
    public = [target for symbols in index.values() for name, (target, _) in symbols.items()
              if not any(part.startswith('_') for part in name.split('.'))]
    missing = [t for t in public if urldefrag(t)[1] not in seen[urldefrag(t)[0]]['ids']]
    assert public and missing == []


def test_search_finds_a_symbol(open_page):
    page = open_page('search.html?q=pack_int4')
    page.wait_for_selector('#search-results li a')
    found = [a.get_attribute('href') for a in page.locator('#search-results li a').all()]
    assert any(link.startswith('formats.html#') and 'pack_int4' in link for link in found), found


def test_prose_and_signatures_link_to_symbols(open_page):
    page = open_page('reading.html')
    page.locator('a[href="formats.html#segquant_nb.formats.Quantizer"]').first.click()
    page.wait_for_url('**/formats.html#segquant_nb.formats.Quantizer')
    in_signature = page.locator('dt[id="segquant_nb.formats.encode"] a.reference.internal')
    assert in_signature.first.get_attribute('href') == '#segquant_nb.formats.DType'
    source = page.locator('dt[id="segquant_nb.formats.Quantizer.fit"] a.external').get_attribute('href')
    assert source.startswith(f'{CFG.git_url}/blob/{CFG.branch}/segquant_nb/formats.py#L')


def test_dark_mode(open_page):
    color = 'getComputedStyle(document.body).backgroundColor'
    light, dark = (open_page('index.html', scheme=s).evaluate(color) for s in ('light', 'dark'))
    assert light == 'rgb(255, 255, 255)' and dark != light
    page = open_page('index.html')
    page.locator('.content-icon-container .theme-toggle').click()  # from auto to the other one
    assert page.evaluate(color) == dark


def test_folded_code_opens(open_page):
    page = open_page('formats.html')
    fold = page.locator('details.hide').nth(1)
    assert not fold.locator('pre').is_visible()
    fold.locator('summary').click()
    assert 'def color_card(' in fold.locator('pre').inner_text()


def test_downloads_are_the_notebooks(site, open_page):
    for notebook in NOTEBOOKS:
        assert (site/'notebooks'/notebook).read_bytes() == (CFG.nbs_path/notebook).read_bytes()
    page = open_page('formats.html')
    with page.expect_download() as download:
        page.get_by_text('Download .ipynb').click()
    assert Path(download.value.path()).read_bytes() == (CFG.nbs_path/'00_formats.ipynb').read_bytes()


def test_llms_txt_lists_every_page(site, seen):
    listed = (site/'llms.txt').read_text(encoding='utf-8')
    made_by_sphinx = {'genindex.html', 'py-modindex.html', 'search.html'}
    assert [p for p in seen.keys() - made_by_sphinx if f']({PUBLISHED}{p})' not in listed] == []
    full = (site/'llms-full.txt').read_text(encoding='utf-8')
    assert 'def pack_int4(' in full and '# How to read the notebooks' in full


# A project of two notebooks, for what the real ones may or may not contain

def cell(source: str, *outputs) -> dict:
    kind = 'code' if source.startswith('#|') or outputs else 'markdown'
    more = {'outputs': list(outputs), 'execution_count': None} if kind == 'code' else {}
    return {'cell_type': kind, 'id': f'c{abs(hash(source))}', 'metadata': {}, 'source': source, **more}


def printed(text: str) -> dict:
    return {'output_type': 'stream', 'name': 'stdout', 'text': text}


def displayed(mime: str, data: str) -> dict:
    return {'output_type': 'display_data', 'metadata': {}, 'data': {mime: data, 'text/plain': 'plain'}}


@pytest.fixture
def tiny(tools, tmp_path):
    "A function that builds a site from the given cells"
    for name in ('settings.ini', 'tools', 'docs/conf.py', 'docs/_static'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy)(ROOT/name, tmp_path/name)
    (tmp_path/'nbs').mkdir()

    def build(*cells, listed=('index.ipynb', '00_toy.ipynb')):
        source = '\n'.join(c['source'] for c in cells if c['source'].startswith('#| export'))
        (tmp_path/'segquant_nb').mkdir(exist_ok=True)
        (tmp_path/'segquant_nb/toy.py').write_text(source, encoding='utf-8')
        metadata = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
        for name, content in (('index', [cell('# Home\n\n> of the toy'), cell('See `Toy.play`.')]),
                              ('00_toy', [cell('# Toy'), cell('#| default_exp toy'), *cells])):
            nb = {'cells': content, 'metadata': metadata, 'nbformat': 4, 'nbformat_minor': 5}
            (tmp_path/f'nbs/{name}.ipynb').write_text(json.dumps(nb), encoding='utf-8')
        sidebar = {'website': {'sidebar': {'contents': list(listed)}}}  # JSON is YAML
        (tmp_path/'nbs/sidebar.yml').write_text(json.dumps(sidebar), encoding='utf-8')
        return run_site(tmp_path, tmp_path/'out')

    build.out = tmp_path/'out'
    return build


TOY = cell('''#| export
from dataclasses import dataclass, field

@dataclass
class Toy:
    "Something to `play` with"
    size: int  # in cm
    names: list[str] = field(default_factory=list)  # it answers to them

    @property
    def big(self) -> bool: return self.size > 9

    @classmethod
    def make(cls, *sizes: int, name: str = 'a|b') -> 'list[Toy]':  # one for each size
        "Several at once"

    def play(
        self,
        other: 'Toy | None' = None,  # see `Toy`
    ):  # how it went
        "Play, with another one"

    def _secret(self): "Nobody sees this entry"
''')


def test_every_kind_of_cell(tiny):
    done = tiny(
        TOY,
        cell('#| echo: false\nprint("UNSEEN CODE")', printed('SEEN OUTPUT')),
        cell('#| output: false\nprint("SEEN CODE")', printed('UNSEEN OUTPUT')),
        cell('#| hide\nHIDDEN = 1', printed('HIDDEN OUTPUT')),
        cell('#| include: false\nEXCLUDED = 1', printed('EXCLUDED OUTPUT')),
        cell('#| echo: false\n%matplotlib inline'),
        cell('#| code-fold: true\nfolded = 1'),
        cell('#| echo: false\ntable', displayed('text/html', '<table><tr><td>IN A TABLE</td></tr></table>')),
        cell('#| echo: false\n#| fig-alt: a red square\ndraw', displayed('image/svg+xml', '<svg/>')),
        cell('#| eval: false\nnever_run()'),
        cell('## A heading with `Toy`\n\n:::{.callout-tip title="A hint"}\nUse `Toy`.\n:::\n\n$a^2$'),
        cell('[home](index.ipynb) and [its settings](../settings.ini)'))
    assert done.returncode == 0, done.stderr
    html = (tiny.out/'toy.html').read_text(encoding='utf-8')
    for text in ('SEEN OUTPUT', 'SEEN CODE', 'IN A TABLE', 'never_run', 'alt="a red square"',
                 'tip admonition', 'A hint', 'href="index.html"', 'blob/main/settings.ini', 'id="toy.play"',
                 'id="toy.big"',
                 'in cm', 'it answers to them', 'one for each size', 'how it went', 'list()', 'classmethod'):
        assert text in html, text
    for text in ('UNSEEN', 'HIDDEN', 'EXCLUDED', 'matplotlib inline', 'id="toy._secret"'):
        assert text not in html, text
    assert html.count('details class="admonition hide') == 2  # the exported cell and the folded one
    assert 'toy.html#segquant_nb.toy.Toy.play' in (tiny.out/'index.html').read_text(encoding='utf-8')


@pytest.mark.parametrize('reference, complaint', [
    ('{py:obj}`segquant_nb.toy.Gone`', 'reference target not found: segquant_nb.toy.Gone'),
    ('[a heading](index.ipynb#gone)', "'gone'"),
    ('[a file](../GONE.md)', 'GONE.md, which does not exist'),
    ('[a notebook](99_gone.ipynb)', '99_gone.ipynb, which does not exist')])
def test_a_dead_reference_stops_the_build(tiny, reference, complaint):
    done = tiny(TOY, cell(f'Look at {reference}.'))
    assert done.returncode and complaint in done.stderr, done.stderr
    assert not tiny.out.exists()


def test_a_notebook_that_the_sidebar_forgot(tiny):
    done = tiny(TOY, listed=['index.ipynb'])
    assert done.returncode and '00_toy.ipynb is missing from nbs/sidebar.yml' in done.stderr


def test_a_folder_that_is_no_site_is_left_alone(tiny):
    tiny.out.mkdir()
    (tiny.out/'thesis.txt').write_text('all of it')
    done = tiny(TOY)
    assert done.returncode and 'not a site' in done.stderr
    assert (tiny.out/'thesis.txt').exists()
