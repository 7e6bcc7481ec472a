"Write the documentation to _docs/, a site that needs no network, and check its links and formulas."
import ast
import html
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from docs_api import Module, names_of
from docs_check import problems
from docs_render import file_html, head_of, notebook_html, page_markdown, phrase, read_cells, slug
from g2rpo.structure import FOLDERS

ROOT = Path(__file__).resolve().parents[1]
NBS, PACKAGE, OUT = ROOT/'nbs', ROOT/'g2rpo', ROOT/'_docs'
START = ('index', 'tutorial', 'extend')
EXPERIMENTS = (      # in reading order
    'main_table', 'ablation_lambda', 'step_robustness', 'dense_reward', 'ablation_steps', 'auto_lambda', 'compare',
    'newer_methods', 'cost', 'ladder', 'credit_lab', 'figures', 'pretrain_tiny')
PICTURES = ('.png', '.jpg', '.jpeg', '.svg', '.gif')

@dataclass
class Page:
    "One page of the site."
    file: Path          # what it shows
    address: str        # where it goes, from the root of the site
    title: str
    subtitle: str = ''
    chapter: Path | None = None     # of a module: the notebook that exports it

API = Page(PACKAGE, 'api/index.html', 'API', 'Every module, in the order of the chapters that export them.')

@dataclass
class Site:
    "What all pages share."
    out: Path
    sections: list[tuple[str, list[Page]]]      # the notebooks
    modules: list[Page]
    names: dict[str, str]                       # public name → page and anchor of the API
    wanted: dict[Path, str] = field(default_factory=dict)     # files that pages link to → where they go

def heading_of(notebook: Path) -> tuple[str, str]:
    "Title and subtitle of a notebook."
    return head_of(read_cells(notebook)[0]['source'])[:2]

def reading_order() -> list[tuple[str, list[Path]]]:
    "(title, notebooks) of each section: start, what all folders use, the seven folders, experiments."
    top = sorted(NBS.glob('*.ipynb'))
    numbered = [f for f in top if f.stem[0].isdigit()]
    rank = {name: n for n, name in enumerate(EXPERIMENTS)}
    start = sorted((f for f in top if f.stem in START), key=lambda f: START.index(f.stem))
    rest = [f for f in top if f not in (*numbered, *start)]
    rest.sort(key=lambda f: rank.get(f.stem, len(rank)))
    folders = [sorted((NBS/folder).glob('*.ipynb')) for folder in FOLDERS]
    titled = [(heading_of(files[0])[0], files) for files in folders]
    return [('Start', start), ('Common ground', numbered), *titled, ('Experiments', rest)]

def exported_to(notebook: Path) -> str:
    "The module of a notebook, such as `core.schedule`; empty where there is none."
    found = (re.match(r'#\| ?default_exp (\S+)', cell['source']) for cell in read_cells(notebook))
    return next((m[1] for m in found if m), '')

def module_page(notebook: Path) -> Page | None:
    "The API of what a notebook exports."
    if not (name := exported_to(notebook)):
        return None
    file = PACKAGE/f'{name.replace(".", "/")}.py'
    doc = ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or ''
    return Page(file, f'api/{name}.html', name, doc.split('\n')[0], notebook)

def plan(out: Path) -> Site:
    "All pages and names, before any is written."
    order = reading_order()
    sections = [(title, [Page(f, notebook_address(f), *heading_of(f)) for f in files]) for title, files in order]
    modules = [page for _, files in order for f in files if (page := module_page(f))]
    names = {name: f'{page.address}#{name}' for page in modules for name in names_of(page.file)}
    return Site(out, sections, modules, names)

def notebook_address(file: Path) -> str: return file.relative_to(NBS).with_suffix('.html').as_posix()

def goes_to(target: Path) -> str:
    "The page or copy that stands for a file of the repository."
    if target.suffix == '.ipynb' and NBS in target.parents:
        return notebook_address(target)
    name = target.relative_to(ROOT).as_posix()
    return f'files/{name}' if target.suffix in PICTURES else f'files/{name}.html'

@cache
def relative(address: str, page: str) -> str: return os.path.relpath(address, os.path.dirname(page) or '.')

def rewritten(site: Site, page: Page, url: str) -> str:
    "A link of a source file as a link of its page; what leads nowhere stays as it is, and the check finds it."
    if re.match(r'[a-z][a-z+.-]*:|//', url):
        return url
    path, _, anchor = url.partition('#')
    anchor = f'#{slug(unquote(anchor))}' if anchor else ''
    target = (page.file.parent/unquote(path)).resolve()
    if not path or not target.exists() or ROOT not in target.parents:
        return path + anchor
    if (address := goes_to(target)).startswith('files/'):
        site.wanted[target] = address
    return relative(address, page.address) + anchor

def markdown_of(site: Site, page: Page):
    "Markdown as it is read on one page."
    def api(word):
        name = word.removesuffix('()')
        telling = word != name or not word.islower() or '_' in word     # `train` may be a word, `train()` is a function
        return relative(site.names[name], page.address) if telling and name in site.names else None
    return page_markdown(lambda url: rewritten(site, page, url), api)

def item(target: Page, page: Page) -> str:
    "A line of the sidebar."
    here = ' aria-current="page"' if target.address == page.address else ''
    label = {'00_overview': 'Overview', PACKAGE.stem: 'All modules'}.get(target.file.stem) or plain_title(target)
    return f'<li><a href="{relative(target.address, page.address)}"{here}>{label}</a></li>'

def plain_title(page: Page) -> str: return html.escape(page.title.replace('`', ''), quote=False)

def folded(title: str, pages: list[Page], page: Page) -> str:
    "A section of the sidebar, open where the reader is."
    opened = ' open' if any(p.address == page.address for p in pages) else ''
    return f'<details{opened}><summary>{title}</summary><ul>{"".join(item(p, page) for p in pages)}</ul></details>'

def sidebar(site: Site, page: Page) -> str:
    "Sections and chapters in reading order, then the modules."
    start = ''.join(item(p, page) for p in site.sections[0][1][1:])      # the first has the name of the site
    parts = [folded(title.split(':')[0], pages, page) for title, pages in site.sections[1:]]
    return ''.join([f'<ul>{start}</ul>', *parts, folded('API', [API, *site.modules], page)])

def turns(order: list[Page], page: Page) -> str:
    "Links to the page before and the page after."
    place = next((i for i, p in enumerate(order) if p.address == page.address), None)
    if place is None:
        return ''
    def turn(rel, words, p):
        return f'<a rel="{rel}" href="{relative(p.address, page.address)}"><small>{words}</small>{plain_title(p)}</a>'
    before = turn('prev', 'Previous', order[place - 1]) if place else '<span></span>'
    after = turn('next', 'Next', order[place + 1]) if place + 1 < len(order) else '<span></span>'
    return f'<nav class="turns">{before}{after}</nav>'

def contents(headings: list[tuple[int, str, str]]) -> str:
    "What is on this page, for wide windows."
    lines = [f'<li class="level{level}"><a href="#{anchor}">{html.escape(text, quote=False)}</a></li>'
             for level, anchor, text in headings if level in (2, 3)]
    return f'<nav class="contents"><ul>{"".join(lines)}</ul></nav>' if len(lines) > 1 else ''

FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="{css}">
</head>
<body>
<input type="checkbox" id="menu" aria-label="Show the menu">
<header><label for="menu">Menu</label><a href="{home}">g2rpo</a></header>
<nav class="sidebar"><a class="home" href="{home}"{at_home}>g2rpo</a>{sidebar}</nav>
<main>
<h1>{heading}</h1>
{subtitle}
{body}
{turns}
</main>
{contents}
</body>
</html>
"""

def write(site: Site, page: Page, body: str, md, order: list[Page]) -> None:
    "One page in its frame."
    file = site.out/page.address
    file.parent.mkdir(parents=True, exist_ok=True)
    subtitle = f'<p class="subtitle">{phrase(md, page.subtitle)}</p>' if page.subtitle else ''
    name, first = plain_title(page), page.address == 'index.html'
    file.write_text(FRAME.format(
        title=name if first else f'{name} – g2rpo', css=relative('docs.css', page.address),
        home=relative('index.html', page.address), at_home=' aria-current="page"' if first else '',
        sidebar=sidebar(site, page), heading=phrase(md, page.title),
        subtitle=subtitle, body=body, turns=turns(order, page), contents=contents(md.renderer.headings)),
        encoding='utf-8')

def write_notebook(site: Site, page: Page, order: list[Page]) -> None:
    "A notebook; its pictures go into a folder beside the page."
    def save(name, data):
        folder = site.out/page.address.removesuffix('.html')
        folder.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
        return f'{folder.name}/{name}'
    md = markdown_of(site, page)
    api = next((relative(m.address, page.address) for m in site.modules if m.chapter == page.file), '')
    write(site, page, notebook_html(page.file, md, save, api), md, order)

def write_api(site: Site) -> None:
    "A page for each module, and their list."
    order = [API, *site.modules]
    for page in site.modules:
        md, chapter = markdown_of(site, page), relative(notebook_address(page.chapter), page.address)
        write(site, page, Module(page.file, md, chapter).html(), md, order)
    md = markdown_of(site, API)
    rows = [f'| [`{p.title}`]({p.title}.html) | {p.subtitle} |' for p in site.modules]
    write(site, API, md('\n'.join(['| module | what it is about |', '|---|---|', *rows])), md, order)

def write_files(site: Site) -> None:
    "The files of the repository that pages link to, and those that these link to."
    done = set()
    while waiting := [f for f in site.wanted if f not in done]:
        file = waiting[0]
        done.add(file)
        page = Page(file, site.wanted[file], file.name)
        if file.suffix in PICTURES:
            (site.out/page.address).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, site.out/page.address)
        else:
            md = markdown_of(site, page)
            page.title, page.subtitle, body = file_html(file, md)
            write(site, page, body, md, [])

def llms(site: Site) -> str:
    "A line for each chapter, for language models (llmstxt.org)."
    index, lines = site.sections[0][1][0], []
    for title, pages in site.sections:
        lines += ['', f'## {title}', ''] + [f'- [{p.title}]({p.address}): {p.subtitle}' for p in pages]
    return '\n'.join([f'# {index.title}', '', f'> {index.subtitle}', *lines]) + '\n'

def build(out: Path) -> Site:
    "The whole site, into an empty folder."
    shutil.rmtree(out, ignore_errors=True)
    site = plan(out)
    order = [page for _, pages in site.sections for page in pages]
    for page in order:
        write_notebook(site, page, order)
    write_api(site)
    write_files(site)
    shutil.copy(Path(__file__).with_name('docs.css'), out/'docs.css')
    (out/'llms.txt').write_text(llms(site), encoding='utf-8')
    return site

def main() -> int:
    "1 if a link leads nowhere or a formula is not drawn."
    build(OUT)
    found = problems(OUT)
    print('\n'.join(found) or f'{OUT.relative_to(ROOT)}/index.html: {len([*OUT.rglob("*.html")])} pages')
    return int(bool(found))

if __name__ == '__main__':
    sys.exit(main())
