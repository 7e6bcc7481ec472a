"Pages of the API for scripts/docs.py, read from the source: nothing is imported, so nothing heavy is loaded."
import ast
import html
import io
import re
import tokenize
from pathlib import Path

from docs_render import colour, phrase

WIDTH = 88                          # characters of a signature in one line
Row = tuple[str, str, str, str]     # name, type, default, meaning

def public(node: ast.AST) -> bool:
    "Whether a function or a class is for others."
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')

def constants(node: ast.AST) -> list[str]:
    "Names that a statement of a module binds, without those for itself."
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and not n.id.startswith('_')]

def names_of(file: Path) -> list[str]:
    "Anchors of a module's page: its public names, and the methods of its classes."
    found = []
    for node in ast.parse(file.read_text(encoding='utf-8')).body:
        found += [node.name] if public(node) else constants(node)
        if public(node) and isinstance(node, ast.ClassDef):
            found += [f'{node.name}.{m.name}' for m in node.body if public(m)]
    return found

def comments(source: str) -> dict[int, str]:
    "Line → comment that stands in it."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}

def note(notes: dict[int, str], node: ast.AST, last: ast.AST | None = None) -> str:
    "The comment beside a parameter or a field."
    lines = range(node.lineno, (last or node).end_lineno + 1)
    return next((notes[line] for line in lines if line in notes), '')

def code(node: ast.AST | None) -> str: return ast.unparse(node) if node else ''

def arguments(args: ast.arguments) -> list[tuple[str, ast.arg | None, ast.AST | None]]:
    "(stars, argument, default) of a function in the order in which they are written; a `*` of its own has no argument."
    plain = [*args.posonlyargs, *args.args]
    found = [('', *pair) for pair in zip(plain, [None]*(len(plain) - len(args.defaults)) + args.defaults)]
    if args.vararg or args.kwonlyargs:
        found.append(('*', args.vararg, None))
    found += [('', *pair) for pair in zip(args.kwonlyargs, args.kw_defaults)]
    found += [('**', args.kwarg, None)] if args.kwarg else []
    return [each for each in found if not (each[1] and each[1].arg in ('self', 'cls'))]

def parameters(node: ast.FunctionDef, notes: dict[int, str]) -> list[Row]:
    "A row for each parameter, and one for what is returned."
    given = [each for each in arguments(node.args) if each[1]]
    rows = [(stars + a.arg, code(a.annotation), code(default), note(notes, a, default)) for stars, a, default in given]
    taken = {a.lineno for _, a, _ in given}
    after = [line for line in range(node.lineno, node.body[0].lineno) if line in notes and line not in taken]
    if after or code(node.returns) not in ('', 'None'):
        rows.append(('returns', code(node.returns), '', notes[after[-1]] if after else ''))
    return rows

def written(stars: str, a: ast.arg | None, default: ast.AST | None) -> str:
    "A parameter as it stands in a signature."
    if a is None:
        return stars
    typed = f': {code(a.annotation)}' if a.annotation else ''
    equals = (' = ' if typed else '=') + code(default) if default else ''
    return stars + a.arg + typed + equals

def signature(name: str, node: ast.FunctionDef) -> str:
    "`name(parameters) -> type`, a line for each parameter where it would be long."
    each = [written(*parts) for parts in arguments(node.args)]
    end = f' -> {code(node.returns)}' if node.returns else ''
    short = f'{name}({", ".join(each)}){end}'
    return short if len(short) <= WIDTH else '\n'.join([f'{name}(', *(f'    {p},' for p in each), f'){end}'])

def rows_html(rows: list[Row], what: str, md) -> str:
    "A table of parameters or fields; columns without a value are left out."
    if not rows:
        return ''
    heads = (what, 'type', 'default', 'meaning')
    used = [i for i in range(4) if any(row[i] for row in rows)]
    def cell(row, i):
        if i == 3:
            return phrase(md, row[i])
        if row[0] == 'returns' and i == 0:
            return '<em>returns</em>'
        return f'<code>{html.escape(row[i])}</code>' if row[i] else ''
    body = ''.join('<tr>' + ''.join(f'<td>{cell(row, i)}</td>' for i in used) + '</tr>' for row in rows)
    head = ''.join(f'<th>{heads[i]}</th>' for i in used)
    return f'<div class="scroll"><table class="api"><tr>{head}</tr>{body}</table></div>'

class Module:
    "One module's source with its comments and the cells that it was exported from."
    def __init__(self, file: Path, md, chapter: str):
        self.source = file.read_text(encoding='utf-8')
        self.lines, self.notes = self.source.splitlines(), comments(self.source)
        self.tree, self.md, self.chapter = ast.parse(self.source), md, chapter

    def cell_link(self, line: int) -> str:
        "A link to the cell of the chapter that a line comes from."
        marks = [m for text in self.lines[:line] if (m := re.match(r'# %% .*#(cell-\w+)$', text))]
        if not marks:
            return ''
        return f'<a class="label" href="{self.chapter}#{marks[-1][1]}">chapter</a>'

    def titled(self, anchor: str, node: ast.AST, level: int, text: str) -> str:
        "A heading of the page's table of contents, and the signature below it."
        self.md.renderer.headings.append((level, anchor, anchor))
        heading = f'<h{level} id="{anchor}"><code>{anchor}</code> <a class="anchor" href="#{anchor}">#</a></h{level}>'
        shown = [f'@{code(d)}' for d in node.decorator_list] + [text]
        return f'{heading}<div class="cell">{self.cell_link(node.lineno)}{colour(chr(10).join(shown), "python")}</div>'

    def documented(self, node) -> str:
        "A docstring as Markdown."
        return self.md(ast.get_docstring(node) or '')

    def function(self, node: ast.FunctionDef, anchor: str, level: int = 2) -> str:
        "Signature, docstring and parameters."
        head = self.titled(anchor, node, level, signature(f'def {node.name}', node))
        return head + self.documented(node) + rows_html(parameters(node, self.notes), 'parameter', self.md)

    def klass(self, node: ast.ClassDef) -> str:
        "A class: what it is made with, its fields and its public methods."
        made = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == '__init__'), None)
        bases = f'({", ".join(map(code, node.bases))})' if node.bases else ''
        text = signature(f'class {node.name}', made) if made else f'class {node.name}{bases}'
        fields = [(n.target.id, code(n.annotation), code(n.value), note(self.notes, n))
                  for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith('_')]
        parts = [self.titled(node.name, node, 2, text), self.documented(node)]
        parts += [rows_html(parameters(made, self.notes), 'parameter', self.md)] if made else []
        parts += [rows_html(fields, 'field', self.md)]
        parts += [self.function(m, f'{node.name}.{m.name}', 3) for m in node.body
                  if public(m) and isinstance(m, ast.FunctionDef)]
        return '\n'.join(parts)

    def constant(self, node: ast.Assign, names: list[str]) -> str:
        "An assignment as it stands, up to twelve lines of it."
        shown = self.lines[node.lineno - 1:node.end_lineno]
        shown = shown[:12] + ['    ...'] if len(shown) > 13 else shown
        self.md.renderer.headings += [(2, name, name) for name in names]
        anchors = ''.join(f'<span id="{name}"></span>' for name in names)
        link = self.cell_link(node.lineno)
        return f'{anchors}<div class="cell constant">{link}{colour(chr(10).join(shown), "python")}</div>'

    def html(self) -> str:
        "All public names in the order of the source."
        parts = []
        for node in self.tree.body:
            if public(node):
                parts.append(self.klass(node) if isinstance(node, ast.ClassDef) else self.function(node, node.name))
            elif names := constants(node):
                parts.append(self.constant(node, names))
        return '\n'.join(parts)
