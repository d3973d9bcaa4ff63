"""Sphinx, over the pages that tools/site.py writes. Everything a page loads is on the site itself."""
import ast
from configparser import ConfigParser
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import desc_signature

ROOT = Path(__file__).resolve().parent.parent
parser = ConfigParser(delimiters=['='])
parser.read(ROOT/'settings.ini', encoding='utf-8')
settings = parser['DEFAULT']

project = html_title = settings['title']
author, copyright = settings['author'], settings['copyright']
release = version = settings['version']
language = 'en'

extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.mathjax', 'sphinx.ext.linkcode']
suppress_warnings = ['mystnb.unknown_mime_type']  # the next best form of the output is shown

# The notebooks bring their outputs along
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_code_prompt_show = 'Show the code'
nb_code_prompt_hide = 'Hide the code'
myst_enable_extensions = ['amsmath', 'attrs_block', 'attrs_inline', 'colon_fence', 'deflist', 'dollarmath',
                          'fieldlist']
myst_heading_anchors = 4
mathjax_path = 'tex-svg.js'

# Our own names have to lead somewhere, those of other packages need not
nitpick_ignore_regex = [('py:.*', rf'(?!{settings["lib_path"]}\b).*')]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 66
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = 'hide'
modindex_common_prefix = [settings['lib_path'] + '.']

html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['nb.css']
html_logo = html_favicon = '_static/logo.svg'
html_show_sourcelink = html_copy_source = False
copybutton_selector = ':not(.output) > div.highlight > pre'
pygments_style, pygments_dark_style = 'friendly', 'github-dark'
html_theme_options = {
    'footer_icons': [],
    'light_css_variables': {'color-brand-primary': '#c2410c', 'color-brand-content': '#b4390a',
                            'color-sidebar-link-text--top-level': '#44403c', 'figure-brightness': '1'},
    'dark_css_variables': {'color-brand-primary': '#fdba74', 'color-brand-content': '#fdba74',
                           'color-sidebar-link-text--top-level': '#d6d3d1', 'figure-brightness': '.88'},
}


@cache
def lines_of(path: Path) -> dict[str, str]:
    "Line anchors on GitHub for everything that a module defines"
    anchors = {}

    def visit(node, prefix):
        for item in node.body:
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                anchors[prefix + item.name] = f'#L{item.lineno}-L{item.end_lineno}'
                if isinstance(item, ast.ClassDef):
                    visit(item, f'{prefix}{item.name}.')

    visit(ast.parse(path.read_text(encoding='utf-8')), '')
    return anchors


def linkcode_resolve(domain, info):
    "Where [source] leads; nowhere for what has no definition of its own, such as the members of an Enum"
    path = Path(info['module'].replace('.', '/') + '.py')
    anchor = lines_of(ROOT/path).get(info['fullname'])
    return f'{settings["git_url"]}/blob/{settings["branch"]}/{path.as_posix()}{anchor}' if anchor else None


def add_nbdev_anchors(app, doctree):
    "formats.html#quantizer.fit is how nbdev's index and its README links call Quantizer.fit"
    taken = {name for node in doctree.findall(nodes.Element) for name in node['ids']}
    for signature in doctree.findall(desc_signature):
        anchor = signature['fullname'].lower()
        if anchor not in taken:  # two names may differ in case only
            taken.add(anchor)
            signature['ids'].append(anchor)


def setup(app):
    app.connect('doctree-read', add_nbdev_anchors)
    return {'parallel_read_safe': True}
