"The repository says one thing: notebooks, package, README and both configurations agree."
import configparser
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

def run(*args, **kw): return subprocess.run([str(a) for a in args], capture_output=True, text=True, **kw)

def tool(name): return Path(sys.executable).with_name(name)

@pytest.fixture
def copy(root, tmp_path):
    "A copy of what git would commit, for commands that write."
    out = tmp_path/'copy'
    shutil.copytree(root, out, ignore=shutil.ignore_patterns('.venv', '.git', 'runs', 'build', '__pycache__', '*.egg-info'))
    return out

def test_export_is_clean(root, copy):
    result = run(tool('nbdev-export'), cwd=copy)
    assert result.returncode == 0, result.stderr
    for file in sorted((root/'g2rpo').glob('*.py')):
        assert (copy/'g2rpo'/file.name).read_text() == file.read_text(), f'{file.name} differs; run: make export'

def test_notebooks_are_clean(root, copy):
    result = run(tool('nbdev-clean'), cwd=copy)
    assert result.returncode == 0, result.stderr
    for file in sorted((root/'nbs').glob('*.ipynb')):
        assert (copy/'nbs'/file.name).read_text() == file.read_text(), f'{file.name} is not clean; run: make export'

def test_clean_keeps_the_parameters_tag(copy):
    "Without it papermill runs the defaults whatever -p says, and exits 0."
    tagged = [f for f in (copy/'nbs').glob('*.ipynb') if '"parameters"' in f.read_text()]
    assert tagged
    run(tool('nbdev-clean'), cwd=copy)
    for file in tagged:
        assert any('parameters' in c['metadata'].get('tags', []) for c in json.loads(file.read_text())['cells']), file.name

def test_configurations_agree(root):
    toml = tomllib.loads((root/'pyproject.toml').read_text())
    ini = configparser.ConfigParser()
    ini.read(root/'settings.ini')
    old = ini['DEFAULT']
    project, nbdev = toml['project'], toml['tool']['nbdev']
    assert old['lib_name'] == project['name'] and old['description'] == project['description']
    assert project['requires-python'] == '>=' + old['min_python']
    for key in ('nbs_path', 'lib_path'):
        assert old[key] == nbdev[key]
    assert nbdev['allowed_cell_metadata_keys'] == old['allowed_cell_metadata_keys'].split() == ['tags']
    assert f"__version__ = \"{old['version']}\"" in (root/'g2rpo'/'__init__.py').read_text()

def test_ruff(root):
    result = run(tool('ruff'), 'check', '--select', 'F', 'g2rpo', 'tests', 'scripts', 'benchmarks', cwd=root)
    assert result.returncode == 0, result.stdout

def test_readme_is_generated(root):
    result = run(sys.executable, root/'scripts'/'readme.py', '--check')
    assert result.returncode == 0, result.stderr

def test_one_nbdev(root):
    dev = tomllib.loads((root/'pyproject.toml').read_text())['project']['optional-dependencies']['dev']
    assert sum(d.startswith('nbdev==') for d in dev) == 1

def test_wheel_installs_and_imports(root, copy, tmp_path):
    "Built, installed into a folder of its own, every module imported from there, the command run, the embedded model loaded."
    built = run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path/'dist', copy)
    assert built.returncode == 0, built.stderr
    wheel, = (tmp_path/'dist').glob('g2rpo-*.whl')
    with zipfile.ZipFile(wheel) as z:
        weights = [i for i in z.infolist() if i.filename.endswith('.safetensors')]
    assert len(weights) == 4 and sum(i.file_size for i in weights) <= 12*2**20
    site = tmp_path/'site'
    assert run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--target', site, wheel).returncode == 0
    code = ('import importlib, pkgutil, g2rpo\nprint(g2rpo.__file__)\n'
            'for m in pkgutil.iter_modules(g2rpo.__path__): importlib.import_module("g2rpo." + m.name)\n'
            'from g2rpo.policy import load_policy; load_policy("tiny", 24, 48, 16)')
    env = os.environ | {'PYTHONPATH': str(site)}
    result = run(sys.executable, '-c', code, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site))
    assert 'train' in run(site/'bin'/'g2rpo', '--help', cwd=tmp_path, env=env).stdout

def test_readme_examples_run(root, tmp_path):
    "The Python blocks of the README, one after the other, as they stand."
    blocks = [part.split('```')[0] for part in (root/'README.md').read_text().split('```python\n')[1:]]
    assert len(blocks) == 3
    result = run(sys.executable, '-c', '\n'.join(blocks) + '\nprint(image.size)', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert '(48, 24)' in result.stdout
    assert len((tmp_path/'runs'/'red'/'metrics.jsonl').read_text().splitlines()) == 2
