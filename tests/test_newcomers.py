"Three people who have only the README, each in an environment of their own."
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

def run(*words, cwd):
    "A command in an environment that knows nothing of the one that runs the tests."
    env = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'
    return done.stdout

@pytest.fixture(scope='module')
def clone(root, tmp_path_factory):
    "What somebody gets who clones the repository."
    folder = tmp_path_factory.mktemp('clone')/'g2rpo'
    run('git', 'clone', '--quiet', root, folder, cwd=folder.parent)
    return folder

@pytest.fixture(scope='module')
def wheel_site(clone, tmp_path_factory):
    "An empty environment with the wheel and its extras, and a folder to work in."
    folder = tmp_path_factory.mktemp('wheel')
    run(sys.executable, '-m', 'venv', folder/'env', cwd=folder)
    pip = folder/'env'/'bin'/'pip'
    run(pip, 'wheel', '--quiet', '--no-deps', '--wheel-dir', folder/'dist', clone, cwd=folder)
    wheel, = (folder/'dist').glob('*.whl')
    run(pip, 'install', '--quiet', '-c', clone/'constraints.txt', f'{wheel}[ocr,nb]', cwd=folder)
    return folder

def blocks(root, language):
    "Code of the README."
    return [part.split('```')[0] for part in (root/'README.md').read_text().split(f'```{language}\n')[1:]]

def test_clone_and_demo(clone):
    "The first command of the README, with fewer iterations."
    assert 'make demo' in blocks(clone, 'sh')[0]
    said = run('make', 'demo', 'ARGS=--iterations 1 --eval-prompts 4', cwd=clone)
    assert 'are in runs/demo-seed0' in said
    assert {f.name for f in clone.glob('runs/demo-seed0/*.png')} == {'before_after.png', 'curve.png'}
    assert run('git', 'status', '--short', cwd=clone) == ''

def test_papermill_in_a_clone(clone):
    "An experiment with its defaults, and one at the size that shows that all works."
    run('make', '.venv/demo.done', cwd=clone)
    binary = clone/'.venv'/'bin'
    run(binary/'pip', 'install', '--quiet', '-c', 'constraints.txt', '-e', '.[ocr,nb]', cwd=clone)
    run(binary/'papermill', 'nbs/credit_lab.ipynb', 'runs/credit_lab.ipynb', cwd=clone)
    run(binary/'papermill', 'nbs/main_table.ipynb', 'runs/main_table.ipynb', '-p', 'preset', 'smoke', cwd=clone)
    assert json.loads((clone/'runs'/'results'/'main_table_smoke.json').read_text())['claims']
    assert run('git', 'status', '--short', cwd=clone) == ''

def test_wheel_and_own_code(clone, wheel_site):
    "The Python of the README, then its commands on the run that it made."
    python, work = wheel_site/'env'/'bin'/'python', wheel_site/'work'
    work.mkdir()
    run(python, '-c', '\n'.join(blocks(clone, 'python')), cwd=work)
    command = python.with_name('g2rpo')
    (work/'prompts.txt').write_text('\n'.join(f'a sign that says "{n}"' for n in range(4)))
    run(command, 'train', '--iterations', 1, '--out', 'runs/a', cwd=work)
    run(command, 'evaluate', 'runs/a', '--prompts', 'prompts.txt', cwd=work)
    for words in (('report', 'runs/a'), ('sample', 'runs/a'), ('export', 'runs/a', 'mine')):
        run(command, *words, cwd=work)
    assert {f.name for f in (work/'runs'/'a').iterdir()} >= {'report.html', 'evaluation.json', 'samples', 'weights'}

def test_wheel_and_experiment(clone, wheel_site):
    "An experiment without a clone; what is missing is said with the command that brings it."
    command, mine = wheel_site/'env'/'bin'/'g2rpo', wheel_site/'mine'
    assert 'repro main_table' in run(command, 'init', 'mine', cwd=wheel_site)
    def repro():
        return subprocess.run([command, 'repro', 'ablation_lambda', '--preset', 'smoke'], cwd=mine,
                              capture_output=True, text=True)
    refused = repro()
    missing = refused.stderr.strip().splitlines()[-1].partition('run: pip ')[2]
    assert refused.returncode == 2 and missing.endswith('rapidocr-onnxruntime')
    run(command.with_name('pip'), *missing.split(), '-c', clone/'constraints.txt', cwd=wheel_site)
    done = repro()
    assert done.returncode in (0, 3), done.stderr
    assert (mine/'runs'/'results'/'ablation_lambda_smoke.json').exists()
    run(command, 'demo', '--iterations', 1, '--eval-prompts', 4, cwd=wheel_site)
