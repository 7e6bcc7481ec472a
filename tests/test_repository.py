"The repository says one thing: notebooks, package, README and both configurations agree."
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

def run(*args, **kw): return subprocess.run([str(a) for a in args], capture_output=True, text=True, **kw)

def tool(name): return Path(sys.executable).with_name(name)

@pytest.fixture
def copy(root, tmp_path):
    "A copy of what git would commit, for commands that write."
    out, left_out = tmp_path/'copy', ('.venv', '.git', 'runs', 'build', '__pycache__', '*.egg-info')
    shutil.copytree(root, out, ignore=shutil.ignore_patterns(*left_out))
    return out

def files_in(folder, pattern):
    return {p.relative_to(folder) for p in folder.rglob(pattern) if '.ipynb_checkpoints' not in p.parts}

def test_export_is_clean(root, copy):
    result = run(tool('nbdev-export'), cwd=copy)
    assert result.returncode == 0, result.stderr
    assert files_in(root/'g2rpo', '*.py') == files_in(copy/'g2rpo', '*.py')
    for name in files_in(root/'g2rpo', '*.py'):
        assert (copy/'g2rpo'/name).read_text() == (root/'g2rpo'/name).read_text(), f'{name} differs; run: make export'

def test_notebooks_are_clean(root, copy):
    result = run(tool('nbdev-clean'), cwd=copy)
    assert result.returncode == 0, result.stderr
    for name in files_in(root/'nbs', '*.ipynb'):
        assert (copy/'nbs'/name).read_text() == (root/'nbs'/name).read_text(), f'{name} is not clean; run: make export'

def test_clean_keeps_the_parameters_tag(copy):
    "Without it papermill runs the defaults whatever -p says, and exits 0."
    tagged = [f for f in (copy/'nbs').glob('*.ipynb') if '"parameters"' in f.read_text()]
    assert tagged
    run(tool('nbdev-clean'), cwd=copy)
    for file in tagged:
        cells = json.loads(file.read_text())['cells']
        assert any('parameters' in c['metadata'].get('tags', []) for c in cells), file.name

def test_outputs_name_no_machine(root):
    "Committed outputs hold no warnings and no paths of the machine that made them."
    for name in files_in(root/'nbs', '*.ipynb'):
        outputs = [o for c in json.loads((root/'nbs'/name).read_text())['cells'] for o in c.get('outputs', ())]
        assert not any(o.get('name') == 'stderr' for o in outputs), name
        assert str(Path.home()) not in json.dumps(outputs) and str(root) not in json.dumps(outputs), name

def test_links_between_chapters_lead_somewhere(root):
    for name in files_in(root/'nbs', '*.ipynb'):
        cells = json.loads((root/'nbs'/name).read_text())['cells']
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        for link in re.findall(r'\]\(([^)#]+?\.(?:ipynb|md|png|json))\)', text):
            assert link.startswith('http') or ((root/'nbs'/name).parent/link).exists(), f'{name}: {link}'

def stored(file):
    "What a result file says of itself: a dictionary, or one for each line."
    if file.suffix == '.npz':
        return [json.loads(str(np.load(file)['about']))]
    text = file.read_text()
    return [json.loads(line) for line in text.splitlines()] if file.suffix == '.jsonl' else [json.loads(text)]

RESULTS = [f for f in sorted((Path(__file__).resolve().parents[1]/'paper_figures'/'results').glob('*.*'))
           if f.suffix in ('.json', '.jsonl', '.npz')]

@pytest.mark.parametrize('file', RESULTS, ids=[f.name for f in RESULTS])
def test_a_result_says_where_it_comes_from(file):
    "Seed, machine, cost, and a commit of a clean tree; runs also their protocol, base weights and the readers' hashes."
    for record in stored(file):
        codes = record['code'] if isinstance(record['code'], list) else [record['code']]
        assert codes and all(re.fullmatch(r'\d+\.\d+\.\d+ [0-9a-f]{12}', code) for code in codes), codes
        assert record.get('machine') or record['machines']
        assert record['seconds'] >= 0 and ('seed' in record or 'seeds' in record or 'seed' in record['config'])
        if file.name.startswith('runs_'):
            assert re.fullmatch('[0-9a-f]{10}', record['base']) and re.fullmatch('[0-9a-f]{12}', record['protocol'])
            assert any(line.startswith('ppocr6 PP-OCRv6') for line in record['checkpoints'])

def test_configurations_agree(root):
    toml = tomllib.loads((root/'pyproject.toml').read_text())
    ini = configparser.ConfigParser()
    ini.read(root/'settings.ini')
    old, project, nbdev = ini['DEFAULT'], toml['project'], toml['tool']['nbdev']
    assert old['lib_name'] == project['name'] and old['description'] == project['description']
    assert project['requires-python'] == '>=' + old['min_python']
    assert {old[key] == nbdev[key] for key in ('nbs_path', 'lib_path')} == {True}
    assert nbdev['allowed_cell_metadata_keys'] == old['allowed_cell_metadata_keys'].split() == ['tags']
    assert f"__version__ = \"{old['version']}\"" in (root/'g2rpo'/'__init__.py').read_text()

def test_ruff(root):
    result = run(tool('ruff'), 'check', 'g2rpo', 'nbs', 'tests', 'scripts', 'benchmarks', cwd=root)
    assert result.returncode == 0, result.stdout

def test_readme_is_generated(root):
    result = run(sys.executable, root/'scripts'/'readme.py', '--check')
    assert result.returncode == 0, result.stderr

def test_chapters_lead_to_their_neighbours(root):
    result = run(sys.executable, root/'scripts'/'links.py', '--check')
    assert result.returncode == 0, result.stderr

def test_one_nbdev(root):
    dev = tomllib.loads((root/'pyproject.toml').read_text())['project']['optional-dependencies']['dev']
    assert sum(d.startswith('nbdev==') for d in dev) == 1

IMPORT_ALL = '''
import importlib, pkgutil, g2rpo
print(g2rpo.__file__)
for m in pkgutil.walk_packages(g2rpo.__path__, "g2rpo."):
    if not m.name.endswith("__main__"): importlib.import_module(m.name)
from g2rpo import train, evaluate, load_policy, presets, METHODS, Method, Config
assert callable(train) and callable(evaluate) and presets.tiny().iterations == 30
load_policy("tiny", 24, 48, 16)
'''

def test_wheel_installs_and_imports(root, copy, tmp_path):
    "Built, installed into a folder of its own, every module imported from there, the command run, the model loaded."
    built = run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path/'dist', copy)
    assert built.returncode == 0, built.stderr
    wheel, = (tmp_path/'dist').glob('g2rpo-*.whl')
    with zipfile.ZipFile(wheel) as z:
        weights = [i for i in z.infolist() if i.filename.endswith('.safetensors')]
        assert 'g2rpo/py.typed' in z.namelist()
    assert len(weights) == 4 and sum(i.file_size for i in weights) <= 16*2**20
    site = tmp_path/'site'
    assert run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--target', site, wheel).returncode == 0
    env = os.environ | {'PYTHONPATH': str(site)}
    result = run(sys.executable, '-c', IMPORT_ALL, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site))
    assert 'train' in run(site/'bin'/'g2rpo', '--help', cwd=tmp_path, env=env).stdout
    refused = run(site/'bin'/'g2rpo', 'repro', 'main_table', cwd=tmp_path, env=env)
    assert refused.returncode == 2 and 'run g2rpo init FOLDER' in refused.stderr
    assert run(site/'bin'/'g2rpo', 'init', 'mine', cwd=tmp_path, env=env).returncode == 0
    for pattern in ('nbs/*.ipynb', 'paper_figures/results/*', 'configs/*', 'scripts/*.sbatch'):
        assert {f.name for f in (tmp_path/'mine').glob(pattern)} == {f.name for f in root.glob(pattern)}, pattern

@pytest.mark.slow
def test_readme_examples_run(root, tmp_path):
    "The Python blocks of the README, one after the other, as they stand."
    blocks = [part.split('```')[0] for part in (root/'README.md').read_text().split('```python\n')[1:]]
    assert len(blocks) == 2
    result = run(sys.executable, '-c', '\n'.join(blocks) + '\nprint(image.size)', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert '(48, 24)' in result.stdout
    assert len((tmp_path/'runs'/'red'/'metrics.jsonl').read_text().splitlines()) == 2

def test_papermill_explains_every_parameter(root):
    "`papermill --help-notebook` has a type, a default and a sentence for each."
    from papermill import inspect_notebook
    tagged = [f for f in (root/'nbs').glob('*.ipynb') if '"parameters"' in f.read_text()]
    assert len(tagged) >= 11
    for notebook in tagged:
        found = inspect_notebook(notebook)
        assert found and all(p['help'] and p['inferred_type_name'] and p['default'] for p in found.values()), notebook
