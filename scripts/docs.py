"""The documentation as a site that needs no network: every notebook with its committed outputs, and the API.

`docs.py` writes _docs/ and checks its links and formulas; `--sidebar` writes nbs/sidebar.yml, the same order for Quarto;
`--mend` makes the links of a site that Quarto has built lead to what lies outside nbs/."""
import ast
import html
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from docs_api import Module, names_of
from docs_check import mend, problems
from docs_render import file_html, head_of, notebook_html, page_markdown, phrase, read_cells, slug
from g2rpo.structure import FOLDERS

ROOT = Path(__file__).resolve().parents[1]
NBS, PACKAGE, OUT = ROOT/'nbs', ROOT/'g2rpo', ROOT/'_docs'
EXPERIMENTS = ('main_table', 'ablation_lambda', 'step_robustness', 'dense_reward', 'ablation_steps', 'auto_lambda',
               'compare', 'cost', 'ladder', 'credit_lab', 'figures', 'pretrain_tiny')     # in reading order
PICTURES = ('.png', '.jpg', '.jpeg', '.svg', '.gif')

@dataclass
class Page:
    "One page of the site."
    file: Path          # what it shows
    address: str        # where it goes, from the root of the site
    title: str
    subtitle: str = ''

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
    rest = sorted((f for f in top if f not in numbered and f.stem != 'index'), key=lambda f: rank.get(f.stem, len(rank)))
    folders = [sorted((NBS/folder).glob('*.ipynb')) for folder in FOLDERS]
    titled = [(heading_of(files[0])[0], files) for files in folders]
    return [('Start', [NBS/'index.ipynb']), ('Common ground', numbered), *titled, ('Experiments', rest)]

def module_files() -> list[Path]:
    "Modules in the order of their folders."
    files = [f for f in sorted(PACKAGE.rglob('*.py')) if not f.name.startswith('_')]
    rank = {name: n for n, name in enumerate(('g2rpo', *FOLDERS))}
    return sorted(files, key=lambda f: rank[f.parent.name])

def module_page(file: Path) -> Page:
    "The page of a module."
    name = '.'.join(file.relative_to(PACKAGE).with_suffix('').parts)
    doc = ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or ''
    return Page(file, f'api/{name}.html', name, doc.split('\n')[0])

def plan(out: Path) -> Site:
    "All pages and names, before any is written."
    sections = [(title, [Page(f, notebook_address(f), *heading_of(f)) for f in files]) for title, files in reading_order()]
    modules = [module_page(f) for f in module_files()]
    names = {name: f'{page.address}#{name}' for page in modules for name in names_of(page.file)}
    return Site(out, sections, modules, names)

def notebook_address(file: Path) -> str: return file.relative_to(NBS).with_suffix('.html').as_posix()

def goes_to(target: Path) -> str:
    "The page or copy that stands for a file of the repository."
    if target.suffix == '.ipynb' and NBS in target.parents:
        return notebook_address(target)
    name = target.relative_to(ROOT).as_posix()
    return f'files/{name}' if target.suffix in PICTURES else f'files/{name}.html'

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
    def api(name):
        return relative(site.names[name], page.address) if name in site.names else None
    return page_markdown(lambda url: rewritten(site, page, url), api)

def item(target: Page, page: Page) -> str:
    "A line of the sidebar."
    here = ' aria-current="page"' if target.address == page.address else ''
    return f'<li><a href="{relative(target.address, page.address)}"{here}>{plain_title(target)}</a></li>'

def plain_title(page: Page) -> str: return html.escape(page.title.replace('`', ''), quote=False)

def folded(title: str, pages: list[Page], page: Page) -> str:
    "A section of the sidebar, open where the reader is."
    opened = ' open' if any(p.address == page.address for p in pages) else ''
    return f'<details{opened}><summary>{title}</summary><ul>{"".join(item(p, page) for p in pages)}</ul></details>'

def sidebar(site: Site, page: Page) -> str:
    "Sections and chapters in reading order, then the modules."
    parts = [f'<ul>{"".join(item(p, page) for p in site.sections[0][1])}</ul>']
    parts += [folded(title, pages, page) for title, pages in site.sections[1:]]
    return ''.join([*parts, folded('API', site.modules, page)])

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
<nav class="sidebar"><a class="home" href="{home}">g2rpo</a>{sidebar}</nav>
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
    name = plain_title(page)
    file.write_text(FRAME.format(
        title=name if name == 'g2rpo' else f'{name} – g2rpo', css=relative('docs.css', page.address),
        home=relative('index.html', page.address), sidebar=sidebar(site, page), heading=phrase(md, page.title),
        subtitle=subtitle, body=body, turns=turns(order, page), contents=contents(md.renderer.headings)),
        encoding='utf-8')

def write_notebook(site: Site, page: Page, order: list[Page]) -> None:
    "A notebook; its pictures go into a folder beside the page."
    def save(name, data):
        folder = site.out/page.address.removesuffix('.html')
        folder.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
        return f'{folder.name}/{name}'
    md, module = markdown_of(site, page), exported_to(page.file)
    api = next((relative(m.address, page.address) for m in site.modules if m.title == module), '')
    write(site, page, notebook_html(page.file, md, save, api), md, order)

def exported_to(notebook: Path) -> str:
    "The module of a notebook, such as `core.schedule`; empty where there is none."
    found = (re.match(r'#\| ?default_exp (\S+)', cell['source']) for cell in read_cells(notebook))
    return next((m[1] for m in found if m), '')

def write_module(site: Site, page: Page, chapters: dict[str, Page]) -> None:
    "A page of the API."
    md, chapter = markdown_of(site, page), chapters.get(page.title)
    link = relative(chapter.address, page.address) if chapter else None
    body = Module(page.file, md, link).html()
    write(site, page, body, md, site.modules)

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
    chapters = {exported_to(page.file): page for page in order}
    for page in order:
        write_notebook(site, page, order)
    for page in site.modules:
        write_module(site, page, chapters)
    write_files(site)
    shutil.copy(Path(__file__).with_name('docs.css'), out/'docs.css')
    (out/'llms.txt').write_text(llms(site), encoding='utf-8')
    return site

def sidebar_yml() -> str:
    "The reading order as Quarto takes it."
    lines = ['# Written by scripts/docs.py --sidebar.', 'website:', '  sidebar:', '    contents:']
    for title, files in reading_order():
        names = [f.relative_to(NBS).as_posix() for f in files]
        if title == 'Start':
            lines += [f'      - {name}' for name in names]
        else:
            lines += [f'      - section: {title}', '        contents:', *(f'          - {name}' for name in names)]
    return '\n'.join(lines) + '\n'

def main(flags: list[str]) -> int:
    "1 if a link leads nowhere or a formula is not drawn."
    if flags == ['--sidebar']:
        (NBS/'sidebar.yml').write_text(sidebar_yml(), encoding='utf-8')
        return 0
    if flags == ['--mend']:
        mend(OUT, ROOT)
        return 0
    build(OUT)
    found = problems(OUT)
    print('\n'.join(found) or f'{OUT.relative_to(ROOT)}/index.html: {len([*OUT.rglob("*.html")])} pages')
    return int(bool(found))

if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
