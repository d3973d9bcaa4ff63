"""API entries, as Sphinx directives in MyST markdown, read off the source of a cell.

Nothing is imported: signatures, defaults, docstrings and the comments that explain parameters (nbdev
calls them docments) all stand in the source.
"""
import ast
import io
import json
import re
import tokenize

FENCE = re.compile(r'^(`{3,}|~{3,}).*?^\1`*[ \t]*$', re.M | re.S)
CODE_SPAN = re.compile(r'(?<![`\w}\[\\])`([^`\n]+)`(?!`|\]\()')
HEADING_OR_INDENTED = re.compile(r'#|    ')
VALUE_COLUMNS = 60  # a longer value says nothing in an API entry


class Symbols:
    "The public names of the package, by which prose and annotations are linked"

    def __init__(self, package: str):
        self.package, self.full, self.short = package, set(), {}

    def add(self, module: str, source: str):
        for name in public_names(source):
            self.full.add(f'{module}.{name}')
            self.short.setdefault(name, f'{module}.{name}')

    def find(self, name: str, module: str = '', owner: str = '') -> str | None:
        "The full name of what a page of `module`, or an entry of the class `owner`, calls `name`"
        name = name.removesuffix('()').removeprefix(f'{self.package}.')
        tries = (f'{module}.{owner}.{name}', f'{module}.{name}', f'{self.package}.{name}',
                 self.short.get(name))
        return next((t for t in tries if t in self.full), None)

    def link(self, markdown: str, module: str = '', owner: str = '') -> str:
        "Markdown in which `code` that names a symbol refers to it; code blocks and headings stay as they are"
        def reference(m):
            full = self.find(m[1], module, owner)
            return f'{{py:obj}}`{m[1]} <{full}>`' if full else m[0]

        def prose(text):
            return ''.join(line if HEADING_OR_INDENTED.match(line) else CODE_SPAN.sub(reference, line)
                           for line in text.splitlines(True))

        parts, end = [], 0
        for fence in FENCE.finditer(markdown):
            parts += [prose(markdown[end:fence.start()]), fence[0]]
            end = fence.end()
        return ''.join(parts) + prose(markdown[end:])


class Qualify(ast.NodeTransformer):
    "Full names for our own classes in annotations, so that Sphinx finds them from any module"

    def __init__(self, symbols: Symbols, module: str):
        self.symbols, self.module = symbols, module

    def visit_Name(self, node):
        return ast.Name(self.symbols.find(node.id, self.module) or node.id)

    def visit_Constant(self, node):  # a forward reference
        return self.visit(ast.parse(node.value, mode='eval').body) if isinstance(node.value, str) else node

    def visit_Subscript(self, node):
        return node if ast.unparse(node.value).endswith('Literal') else self.generic_visit(node)


def is_public(name: str) -> bool:
    return not name.startswith('_') or name == '__call__'


def is_function(node) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def decorators(node) -> set[str]:
    "Names only: `@dataclass(frozen=True)` is `dataclass`, `@bits.setter` is `setter`"
    return {re.sub(r'\(.*', '', ast.unparse(d), flags=re.S).split('.')[-1] for d in node.decorator_list}


def constants(body) -> list[tuple[str, ast.Assign]]:
    "The public names that are assigned a value; in an Enum these are its members"
    return [(target.id, node) for node in body if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name) and is_public(target.id)]


def methods(node: ast.ClassDef) -> list:
    "Public methods and properties; of a property the getter, of an overloaded method the real one"
    return [m for m in node.body if is_function(m) and is_public(m.name)
            and not decorators(m) & {'setter', 'deleter', 'overload'}]


def public_names(source: str) -> list[str]:
    body = ast.parse(source).body
    names = [name for name, _ in constants(body)]
    for node in body:
        if is_function(node) and is_public(node.name):
            names.append(node.name)
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            names += [node.name, *(f'{node.name}.{name}' for name, _ in constants(node.body)),
                      *(f'{node.name}.{m.name}' for m in methods(node))]
    return names


def parameters(args: ast.arguments):
    "(stars, argument, default) for each argument but self and cls"
    plain = args.posonlyargs + args.args
    defaults = [None]*(len(plain) - len(args.defaults)) + args.defaults
    found = [('', a, d) for a, d in zip(plain, defaults)]
    found += [('*', args.vararg, None)] if args.vararg else []
    found += [('', a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults)]
    found += [('**', args.kwarg, None)] if args.kwarg else []
    return [p for p in found if p[1].arg not in ('self', 'cls')]


def without_self(args: ast.arguments) -> ast.arguments:
    for group in (args.posonlyargs, args.args):
        if group and group[0].arg in ('self', 'cls'):
            del group[0]
            break
    return args


def has_fields(node: ast.ClassDef) -> bool:
    return 'dataclass' in decorators(node) or any(ast.unparse(b).endswith('NamedTuple') for b in node.bases)


def field_arguments(node: ast.ClassDef) -> ast.arguments:
    "The fields of a dataclass or NamedTuple, as the arguments of its constructor"
    args, defaults = [], []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or 'ClassVar' in ast.unparse(item.annotation):
            continue
        default = item.value
        if isinstance(default, ast.Call) and ast.unparse(default.func).endswith('field'):
            given = {k.arg: k.value for k in default.keywords}
            if 'init' in given and not given['init'].value:
                continue
            factory = given.get('default_factory')
            default = ast.Call(factory, [], []) if factory else given.get('default')
            if default is not None:
                ast.copy_location(default, item.value)
                default.end_lineno = item.value.end_lineno
        args.append(ast.copy_location(ast.arg(item.target.id, item.annotation), item))
        defaults += [default] if default is not None else []
    return ast.arguments(posonlyargs=[], args=args, defaults=defaults, kwonlyargs=[], kw_defaults=[])


def directive(kind: str, argument: str, options: dict, *body: str) -> str:
    content = '\n\n'.join(filter(None, body))
    longest = max(map(len, re.findall(r'^`{3,}', content, re.M)), default=2)
    fence = '`'*(longest + 1)
    # MyST reads options as YAML, and JSON strings are YAML
    given = (f':{key}: {json.dumps(value)}' if value else f':{key}:' for key, value in options.items())
    lines = [f'{fence}{{{kind}}} {argument}', *given]
    return '\n'.join([*lines, '', content, fence])


class Entries:
    "Writes the entries of one cell"

    def __init__(self, module: str, source: str, symbols: Symbols):
        self.module, self.symbols, self.body = module, symbols, ast.parse(source).body
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments = {t.start[0]: t.string.lstrip('# ').strip()
                         for t in tokens if t.type == tokenize.COMMENT}

    def __str__(self):
        entries = [self.constant('py:data', name, node) for name, node in constants(self.body)]
        for node in self.body:
            if is_function(node) and is_public(node.name):
                entries.append(self.function('py:function', node))
            elif isinstance(node, ast.ClassDef) and is_public(node.name):
                entries.append(self.klass(node))
        return '\n\n'.join(entries)

    def qualified(self, annotation) -> str:
        return ast.unparse(Qualify(self.symbols, self.module).visit(annotation))

    def text(self, node, owner: str = '') -> str:
        return self.symbols.link(ast.get_docstring(node) or '', self.module, owner)

    def constant(self, kind: str, name: str, node: ast.Assign) -> str:
        value = ast.unparse(node.value)
        options = {'no-contents-entry': ''} | ({'value': value} if len(value) <= VALUE_COLUMNS else {})
        remark = self.comments.get(node.end_lineno, '')
        return directive(kind, name, options, self.symbols.link(remark, self.module))

    def signature(self, name: str, args: ast.arguments, returns=None) -> str:
        for _, argument, _ in parameters(args):
            if argument.annotation:
                argument.annotation = ast.Name(self.qualified(argument.annotation))
        arrow = f' -> {self.qualified(returns)}' if returns else ''
        return f'{name}({ast.unparse(without_self(args))}){arrow}'

    def fields(self, args: ast.arguments, owner: str, taken: set = frozenset()) -> list[str]:
        "`:param x:` and `:type x:`, if anything is said about any of them"
        last = {max(a.end_lineno, d.end_lineno if d else 0): a.arg for _, a, d in parameters(args)}
        remarks = {name: self.comments[line] for line, name in last.items()
                   if line in self.comments and line not in taken}
        lines = []
        for stars, a, default in parameters(args) if remarks else ():
            remark = self.symbols.link(remarks.get(a.arg, ''), self.module, owner)
            note = f'[default `{ast.unparse(default)}`]{{.default}}' if default else ''
            name = stars.replace('*', r'\*') + a.arg
            lines.append(f':param {name}: {" · ".join(filter(None, (remark, note)))}')
            if a.annotation:
                lines.append(f':type {a.arg}: {self.qualified(a.annotation)}')
        return lines

    def return_line(self, node) -> int | None:
        "The line whose comment explains what is returned: the one that ends the header"
        first = node.body[0].lineno
        given = [max(a.end_lineno, d.end_lineno if d else 0) for _, a, d in parameters(node.args)]
        start = node.returns.end_lineno if node.returns else max(given, default=node.lineno - 1) + 1
        return next((line for line in range(start, first) if line in self.comments), None)

    def function(self, kind: str, node, owner: str = '') -> str:
        options = {'async': ''} if isinstance(node, ast.AsyncFunctionDef) else {}
        line = self.return_line(node)
        fields = self.fields(node.args, owner, {line})
        if line:
            fields.append(f':returns: {self.symbols.link(self.comments[line], self.module, owner)}')
        header = self.signature(node.name, node.args, node.returns)
        return directive(kind, header, options, self.text(node, owner), '\n'.join(fields))

    def member(self, node, owner: str) -> str:
        marks = decorators(node)
        if marks & {'property', 'cached_property'}:
            options = {'no-contents-entry': ''}
            options |= {'type': self.qualified(node.returns)} if node.returns else {}
            return directive('py:property', node.name, options, self.text(node, owner))
        kind = next((k for k in ('classmethod', 'staticmethod') if k in marks), None)
        return self.function(f'py:{kind or "method"}', node, owner)

    def klass(self, node: ast.ClassDef) -> str:
        bases = [ast.unparse(b) for b in node.bases]
        kind = 'py:exception' if any(b.endswith(('Error', 'Exception')) for b in bases) else 'py:class'
        init = next((m for m in node.body if is_function(m) and m.name == '__init__'), None)
        args = init.args if init else field_arguments(node) if has_fields(node) else None
        fields = self.fields(args, node.name) if args else []
        header = self.signature(node.name, args) if args else node.name
        bases = self.symbols.link(', '.join(f'`{b}`' for b in bases), self.module)
        members = [self.constant('py:attribute', name, item) for name, item in constants(node.body)]
        return directive(kind, header, {},
                         f'[Base: {bases}]{{.bases}}' if bases else '',
                         self.text(node, node.name),
                         '\n'.join(fields),
                         directive('container', 'members', {}, *members) if members else '',
                         *(self.member(m, node.name) for m in methods(node)))
