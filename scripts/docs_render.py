"Markdown, notebooks and source files as HTML for scripts/docs.py: formulas as MathML, code with highlighting."
import base64
import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import mistune
from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import find_lexer_class_by_name, get_lexer_for_filename
from pygments.util import ClassNotFound

BARE = HtmlFormatter(nowrap=True)

def slug(text: str) -> str:
    "The anchor of a heading, as GitHub makes it; Jupyter's form of it gives the same."
    return re.sub(r'[\s-]+', '-', re.sub(r'[^\w\s-]', '', text.lower())).strip('-')

def colour(code: str, language: str) -> str:
    "Code with a class for each token; a language that is not known is left plain."
    try:
        lexer = find_lexer_class_by_name(language or 'text')()
    except ClassNotFound:
        lexer = find_lexer_class_by_name('text')()
    return f'<pre class="code">{highlight(code, lexer, BARE)}</pre>'

def plain(markup: str) -> str:
    "Text of a piece of HTML."
    return html.unescape(re.sub(r'<[^>]+>', '', markup))

def formula(latex: str, display: str) -> str:
    "LaTeX as MathML; a line over a term is its border, as no browser stretches the character that stands for it."
    line = r'<mover>((?:(?!<mover>).)*?)<mo accent="true">&#x02015;</mo></mover>'
    return re.sub(line, r'<mrow class="over">\1</mrow>', convert(latex.strip(), display=display))

class Renderer(mistune.HTMLRenderer):
    "Markdown of one page: links go where `goes` says, names of the package to their API."
    def __init__(self, goes: Callable[[str], str], api: Callable[[str], str | None]):
        super().__init__(escape=False)
        self.goes, self.api, self.headings = goes, api, []

    def heading(self, text, level, **attrs):
        base = slug(plain(text))
        taken = [anchor for _, anchor, _ in self.headings]
        anchor = next(a for n in range(len(taken) + 1) if (a := f'{base}-{n}' if n else base) not in taken)
        self.headings.append((level, anchor, plain(text)))
        return f'<h{level} id="{anchor}">{text} <a class="anchor" href="#{anchor}">#</a></h{level}>\n'

    def link(self, text, url, title=None): return super().link(text, self.goes(url), title)

    def image(self, text, url, title=None): return super().image(text, self.goes(url), title)

    def block_code(self, code, info=None): return colour(code, (info or '').split(' ')[0])

    def codespan(self, text):
        code, page = super().codespan(text), self.api(text)
        return f'<a class="name" href="{page}">{code}</a>' if page else code

    def table(self, text): return f'<div class="scroll"><table>{text}</table></div>\n'

    def block_math(self, text): return f'<div class="scroll formula">{formula(text, "block")}</div>\n'

    def inline_math(self, text): return formula(text, 'inline')

def page_markdown(goes, api) -> mistune.Markdown:
    "Markdown to HTML for one page; what it has met of headings is in `.renderer.headings`."
    return mistune.create_markdown(renderer=Renderer(goes, api), plugins=['table', 'math', 'strikethrough'])

def phrase(md: mistune.Markdown, text: str) -> str:
    "A line of which only code and formulas are marked up, such as a comment in the source."
    pieces = re.split(r'(`[^`]+`|\$[^$\s][^$]*\$)', text)
    formed = [md(p).strip().removeprefix('<p>').removesuffix('</p>') if i % 2 else html.escape(p, quote=False)
              for i, p in enumerate(pieces)]
    return ''.join(formed)

def head_of(source: str) -> tuple[str, str, str]:
    "Title, subtitle and the rest of a page in Markdown."
    found = re.match(r'\s*(?:<!--.*?-->\s*)?# (.+)\n*(?:> (.+)\n*)?', source)
    return (found[1].strip(), (found[2] or '').strip(), source[found.end():]) if found else ('', '', source)

def read_cells(file: Path) -> list[dict]:
    "The cells of a notebook, their text in one piece."
    cells = json.loads(file.read_text(encoding='utf-8'))['cells']
    return [cell | {'source': ''.join(cell['source'])} for cell in cells]

def notebook_html(file: Path, md: mistune.Markdown, save: Callable[[str, bytes], str], api_page: str) -> str:
    "All cells below the title; `save` keeps a picture and says its address."
    cells, parts = read_cells(file), []
    for n, cell in enumerate(cells):
        if cell['cell_type'] == 'markdown':
            parts.append(md(head_of(cell['source'])[2] if n == 0 else cell['source']))
        elif not re.match(r'#\| ?(hide|default_exp)\b', cell['source']):
            outputs = [output_html(o, md, save, f'{n}_{i}.png') for i, o in enumerate(cell['outputs'])]
            parts.append(code_html(cell, api_page) + ''.join(outputs))
    return '\n'.join(parts)

def code_html(cell: dict, api_page: str) -> str:
    "A code cell without its directives; one that is part of the module, or holds parameters, says so."
    directives = re.findall(r'^#\| ?(.*)\n?', cell['source'], re.M)
    code = re.sub(r'^#\|.*\n?', '', cell['source'], flags=re.M).strip('\n')
    if not code or 'echo: false' in directives:
        return ''
    exported, label = any(d.startswith('export') for d in directives), ''
    if exported:
        label = f'<a class="label" href="{api_page}" title="part of the module">module</a>'
    elif 'parameters' in cell['metadata'].get('tags', ()):
        label = '<span class="label">parameters</span>'
    kind = 'cell exported' if exported else 'cell'
    return f'<div class="{kind}" id="{cell["id"]}">{label}{colour(code, "python")}</div>'

def output_html(output: dict, md: mistune.Markdown, save, name: str) -> str:
    "What a cell showed, in its richest form: picture, HTML, Markdown, text."
    data = {kind: ''.join(value) for kind, value in output.get('data', {}).items()}
    if 'image/png' in data:
        address = save(name, base64.b64decode(data['image/png']))
        return f'<div class="output scroll"><img src="{address}" alt="Output of the cell above"></div>'
    if 'text/html' in data:
        return f'<div class="output scroll">{data["text/html"]}</div>'
    if 'text/markdown' in data:
        return f'<div class="output">{md(data["text/markdown"])}</div>'
    text = ''.join(output.get('text', data.get('text/plain', '')))
    text = re.sub(r'\x1b\[[0-9;]*m', '', text).rstrip('\n')
    return f'<pre class="output">{html.escape(text, quote=False)}</pre>' if text else ''

def file_html(file: Path, md: mistune.Markdown) -> tuple[str, str, str]:
    "Title, subtitle and body of a file of the repository: Markdown, a listing of a folder, or source."
    if file.is_dir():
        names = [f'<li><code>{p.name}</code></li>' for p in sorted(file.iterdir()) if p.name[0] not in '._']
        return f'{file.name}/', '', f'<ul>{"".join(names)}</ul>'
    text = file.read_text(encoding='utf-8')
    if file.suffix == '.md':
        title, subtitle, rest = head_of(text)
        return title or file.name, subtitle, md(rest)
    try:
        language = get_lexer_for_filename(file.name).aliases[0]
    except ClassNotFound:
        language = 'yaml' if file.suffix == '.cff' else 'text'
    return file.name, '', colour(text, language)
