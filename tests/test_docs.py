"The site of `make docs`: every chapter, every formula, every link, and the same reading order for Quarto."
import json
import re
from xml.etree import ElementTree

import docs
import docs_api
import docs_check
import docs_quarto
import docs_render
import pytest
import yaml
from g2rpo.structure import FOLDERS

pytestmark = pytest.mark.xdist_group('docs')     # the site is built once

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The whole site, built once."
    return docs.build(tmp_path_factory.mktemp('site'))

def page(site, address): return (site.out/address).read_text(encoding='utf-8')

def prose(file):
    "Markdown of a notebook, without what is code."
    cells = [c['source'] for c in docs_render.read_cells(file) if c['cell_type'] == 'markdown']
    return [re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S) for text in cells]

def test_no_problem(site): assert docs_check.problems(site.out) == []

def test_every_notebook_has_a_page(site):
    notebooks = [f for f in docs.NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts]
    assert len(notebooks) == sum(len(pages) for _, pages in site.sections)
    for file in notebooks:
        title, subtitle = docs.heading_of(file)
        text = page(site, docs.notebook_address(file))
        assert f'<title>{title}'.replace('`', '') in text.replace(' – g2rpo', '') and subtitle
        assert f']({docs.notebook_address(file)}): {subtitle}' in page(site, 'llms.txt')

def test_reading_order(site):
    "Folders in the order of imports, chapters by number; the links at the bottom follow it."
    folders = [pages[0].file.parent.name for _, pages in site.sections[2:-1]]
    assert folders == list(FOLDERS) and site.sections[-1][1][0].file.stem == 'main_table'
    for _, pages in site.sections[2:-1]:
        assert [int(p.file.stem[:2]) for p in pages] == list(range(len(pages)))
    order = [p for _, pages in site.sections for p in pages]
    for before, after in zip(order, order[1:]):
        assert f'rel="next" href="{docs.relative(after.address, before.address)}"' in page(site, before.address)
        assert f'rel="prev" href="{docs.relative(before.address, after.address)}"' in page(site, after.address)

def test_sidebar_is_the_same_order(site):
    text = page(site, 'core/01_schedule.html')
    links = re.findall(r'<li><a href="([^"]+)"', text.split('<nav class="sidebar">')[1].split('</nav>')[0])
    order = [p for _, pages in site.sections for p in pages][1:] + [docs.API, *site.modules]
    assert links == [docs.relative(p.address, 'core/01_schedule.html') for p in order]

def test_every_formula_is_drawn(site):
    "As many formulas as the notebooks hold, each of them well-formed MathML without LaTeX."
    for p in (p for _, pages in site.sections for p in pages):
        text = '\n'.join(prose(p.file))
        drawn = re.findall(r'<math .*?</math>', page(site, p.address), re.S)
        assert len(drawn) == len(re.findall(r'\$\$.+?\$\$|\$[^$]+?\$', text, re.S)), p.address
        for formula in drawn:
            written = ''.join(ElementTree.fromstring(formula).itertext())
            assert written.strip() and not re.search(r'[\\$]', written), (p.address, written)

def test_a_formula_by_hand():
    drawn = docs_render.formula(r'\frac{x_t}{2}', 'inline')
    namespace = '{http://www.w3.org/1998/Math/MathML}'
    tags = [e.tag.removeprefix(namespace) for e in ElementTree.fromstring(drawn).iter()]
    assert [t for t in tags if t != 'mrow'] == ['math', 'mfrac', 'msub', 'mi', 'mi', 'mn']
    assert '<mrow class="over">' in docs_render.formula(r'\overline{x+y}', 'inline')

def test_code_outputs_and_directives(site):
    text = page(site, 'core/01_schedule.html')
    assert 'cell exported" id="cell-05"' in text and 'href="../api/core.schedule.html"' in text
    assert 'tensor([1.0000, 0.9783' in text and 'fastcore' not in text      # imports of tests are hidden
    assert not re.search(r'#\| ?(export|hide|default_exp|echo)', re.sub('<[^>]+>', '', text))
    assert re.search(r'<img src="01_schedule/\d+_0.png"', text)

def test_api_says_what_the_source_says(site):
    text = page(site, 'api/core.schedule.html')
    for part in ('id="shift_grid"', 'steps', 'σ from 1 to 0, (T+1,) float64', 'Grid with a fixed shift', '3.0'):
        assert part in text
    assert 'href="../core/01_schedule.html#cell-05"' in text
    for module in site.modules:
        anchors = docs_check.page_of(site.out/module.address).anchors
        assert set(docs_api.names_of(module.file)) <= anchors

@pytest.mark.parametrize('written, shown', [
    ('def f(a): pass', 'f(a)'),
    ('def f(a: int = 1, *, b=2, **c) -> str: pass', 'f(a: int = 1, *, b=2, **c) -> str'),
    ('def f(self, *a: int, b): pass', 'f(*a: int, b)')])
def test_signatures(written, shown):
    assert docs_api.signature('f', docs_api.ast.parse(written).body[0]) == shown

def test_pages_need_no_network(site):
    "Nothing is loaded from elsewhere, and no script runs."
    loaded = re.compile(r'<script|<(?:img|link)[^>]+(?:src|href)="(?:https?:)?//')
    for file in site.out.rglob('*.html'):
        assert not loaded.search(file.read_text(encoding='utf-8')), file.name
    assert not re.search(r'url\(|@import|@font-face', page(site, 'docs.css'))

BROKEN = '<h2 id="here">x</h2><a href="{}">x</a>'

@pytest.mark.parametrize('link, wrong', [
    ('#here', False), ('a.html#here', False), ('https://arxiv.org', False), ('#there', True), ('b.html', True),
    ('a.html#there', True), ('../outside.html', True)])
def test_a_link_that_leads_nowhere_is_found(tmp_path, link, wrong):
    (tmp_path/'outside.html').write_text('x')
    folder = tmp_path/'site'
    folder.mkdir()
    (folder/'a.html').write_text(BROKEN.format(link))
    assert docs_check.problems(folder) == ([f'a.html: link {link} leads nowhere'] if wrong else [])

def test_latex_that_is_left_is_found(tmp_path):
    (tmp_path/'a.html').write_text(r'<p>as $x$</p><code>$HOME</code><p>\alpha</p>')
    assert [line.split(': ')[2] for line in docs_check.problems(tmp_path)] == ['as $x$', r'\alpha']

def test_a_broken_link_in_a_chapter_ends_the_build(tmp_path, monkeypatch, capsys):
    "`make docs` ends with 1 and a line that names page and link."
    nbs = tmp_path/'nbs'
    (nbs/'core').mkdir(parents=True)
    def chapter(text): return json.dumps({'cells': [{'cell_type': 'markdown', 'source': text, 'metadata': {}}]})
    links = '[here](core/00_overview.ipynb) and [there](core/99_none.ipynb)'
    (nbs/'index.ipynb').write_text(chapter(f'# A\n\n> b\n\n{links}'))
    (nbs/'core'/'00_overview.ipynb').write_text(chapter('# Core\n\n> c'))
    for name, value in dict(ROOT=tmp_path, NBS=nbs, OUT=tmp_path/'_docs', FOLDERS=('core',)).items():
        monkeypatch.setattr(docs, name, value)
    assert docs.main() == 1
    assert capsys.readouterr().out == 'index.html: link core/99_none.ipynb leads nowhere\n'

def test_quarto_reads_the_same_order(site):
    file = docs.NBS/'sidebar.yml'
    assert file.read_text() == docs_quarto.sidebar_yml(), 'nbs/sidebar.yml is out of date; run: make export'
    listed = []
    for entry in yaml.safe_load(file.read_text())['website']['sidebar']['contents']:
        listed += [entry] if isinstance(entry, str) else entry['contents']
    order = [p.file.relative_to(docs.NBS).as_posix() for _, pages in site.sections for p in pages]
    assert listed == order

def test_what_quarto_renders_is_whole(tmp_path):
    "The copy keeps what stands below a title, and its links lead to files in it."
    docs_quarto.stage(tmp_path/'quarto')
    for file in (tmp_path/'quarto').rglob('*.ipynb'):
        cells = docs_render.read_cells(file)
        original = docs_render.read_cells(docs.NBS/file.relative_to(tmp_path/'quarto'))
        assert re.fullmatch(r'# .+\n\n> .+', cells[0]['source'])
        assert len(''.join(c['source'] for c in cells)) > .9*len(''.join(c['source'] for c in original))
        for link in re.findall(r'\]\(([^)\s#:]+)[)#]', '\n'.join(prose(file))):
            assert (file.parent/link).resolve().is_file(), (file.name, link)
            assert tmp_path/'quarto' in (file.parent/link).resolve().parents
