"The house can be read: one direction, no long line, no long function, every name once, a comment at each parameter."
import ast
import json
from pathlib import Path

import pytest
from g2rpo.structure import FOLDERS, arrows, circle, upward

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT/'nbs').rglob('*.ipynb'))
MODULES = sorted(f for f in (ROOT/'g2rpo').rglob('*.py') if not f.name.startswith('_'))
PYTHON = [*MODULES, *(f for folder in ('tests', 'scripts', 'benchmarks') for f in sorted((ROOT/folder).rglob('*.py')))]
WIDTH, FUNCTION, MODULE, CELL = 120, 45, 12_000, 15     # characters, lines, characters, lines

def shown(path): return path.relative_to(ROOT).as_posix()

def code_cells(chapter):
    "(number, source) of the code cells of a notebook."
    for n, cell in enumerate(json.loads(chapter.read_text())['cells']):
        if cell['cell_type'] == 'code':
            yield n, ''.join(cell['source'])

def definitions(file):
    "Functions and classes at the top of a module, and the methods of those classes."
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from (n for n in node.body if isinstance(n, ast.FunctionDef))

def test_one_direction(): assert upward(arrows()) == [] and circle(arrows()) == []

def test_folders_are_mirrored():
    "A chapter for each module, numbered from 00 in each folder."
    for folder in FOLDERS:
        chapters = sorted(p.stem for p in (ROOT/'nbs'/folder).glob('*.ipynb'))
        assert [int(name[:2]) for name in chapters] == list(range(len(chapters))), folder
        assert {name[3:] for name in chapters[1:]} == {p.stem for p in MODULES if p.parent.name == folder}, folder
        assert chapters[0] == '00_overview'

def written_lines(file):
    "(number, line) of a module without the list of names that nbdev writes."
    inside = False
    for n, line in enumerate(file.read_text().splitlines(), 1):
        inside = (inside or line.startswith('__all__ = [')) and not (inside and not line.startswith(' '))
        if not inside:
            yield n, line

def test_no_line_is_too_wide():
    wide = [f'{shown(f)}:{n}' for f in PYTHON for n, line in written_lines(f) if len(line) > WIDTH]
    cells = [(c, n, source) for c in CHAPTERS for n, source in code_cells(c)]
    wide += [f'{shown(c)} cell {n}' for c, n, source in cells if any(len(line) > WIDTH for line in source.splitlines())]
    assert wide == []

def test_no_module_is_too_long():
    assert [(shown(f), n) for f in MODULES if (n := len(f.read_text())) > MODULE] == []

def test_no_function_is_too_long():
    functions = [(f, d) for f in PYTHON for d in definitions(f) if isinstance(d, ast.FunctionDef)]
    found = [(shown(f), d.name, d.end_lineno - d.lineno + 1) for f, d in functions]
    assert [each for each in found if each[2] > FUNCTION] == []

def is_one_class(source):
    "Whether a cell is a class, or several with what belongs to them."
    return any(isinstance(n, ast.ClassDef) for n in ast.parse(source).body)

def test_no_cell_is_too_long():
    "A cell that exports may be longer where it is one idea: a class, or one function with a line for each parameter."
    long = []
    for chapter in CHAPTERS:
        for n, source in code_cells(chapter):
            lines = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith('#')]
            exports = source.startswith('#| export')
            if len(lines) <= CELL or 'parameters' in source[:200] and 'preset:' in source:
                continue
            if exports and (is_one_class(source) or len(ast.parse(source).body) == 1):
                continue
            if exports and sum(body_lines(d) for d in ast.parse(source).body) <= CELL*2:
                continue
            long.append((shown(chapter), n, len(lines)))
    assert long == []

def body_lines(node): return node.end_lineno - node.body[0].lineno + 1 if isinstance(node, ast.FunctionDef) else 1

def test_every_name_once():
    "No function, class or constant of one module has the name of another's."
    where = {}
    for file in MODULES:
        for node in ast.parse(file.read_text()).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            if isinstance(node, ast.Assign):
                names = [t.id for t in ast.walk(ast.Tuple(node.targets)) if isinstance(t, ast.Name)]
            for name in names:
                if name != '__all__':
                    where.setdefault(name, []).append(shown(file))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}

def commented(file, node):
    "Parameters of a function without a comment in their line."
    lines = file.read_text().splitlines()
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [a.arg for a in every if a.arg not in ('self', 'cls') and '#' not in lines[a.lineno - 1]]

def fields_of(node):
    "Fields of a dataclass."
    decorated = any('dataclass' in ast.unparse(d) for d in node.decorator_list)
    return [n for n in node.body if isinstance(n, ast.AnnAssign)] if decorated else []

@pytest.mark.parametrize('file', MODULES, ids=shown)
def test_every_parameter_says_what_it_is(file):
    "Public functions and methods have a comment at each parameter, dataclasses one at each field, and all a docstring."
    lines, bare = file.read_text().splitlines(), []
    for node in definitions(file):
        if node.name.startswith('_'):
            continue
        if not ast.get_docstring(node):
            bare.append(f'{node.name} has no docstring')
        if isinstance(node, ast.FunctionDef):
            bare += [f'{node.name}({name})' for name in commented(file, node)]
        else:
            bare += [f'{node.name}.{n.target.id}' for n in fields_of(node) if '#' not in lines[n.end_lineno - 1]]
    assert bare == []

def test_no_row_is_named_in_a_branch():
    "What depends on a row stands in the row or in a table beside it."
    import re
    branch = re.compile(r"(method\.name|row\.name|\bname)\s*(==|!=|in)\s*\(?['\"]\w*grpo")
    lines = [(f, n, line) for f in MODULES for n, line in enumerate(f.read_text().splitlines(), 1)]
    assert [f'{shown(f)}:{n}' for f, n, line in lines if branch.search(line)] == []
