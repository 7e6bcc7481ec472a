"Notebooks that judge: on runs of seconds, on what is committed, rehearsed as published, killed and gone on with."
import html
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from g2rpo.cli.main import main
from g2rpo.errors import InputError, RunStopped
from g2rpo.files import read_json
from g2rpo.study.launch import Study
from g2rpo.study.primary import claim_verdict
from g2rpo.study.records import Claim
from g2rpo.study.reproduction import experiment_names, run_notebook
from g2rpo.study.setting import ExperimentConfig
from g2rpo.study.stats import VERDICTS

ROOT = Path(__file__).resolve().parents[2]
NBS, RESULTS = ROOT/'nbs', ROOT/'paper_figures'/'results'
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'TQDM_DISABLE': '1'}

def execute(path, out, parameters):
    "What an executed notebook prints and shows, as text."
    quiet = dict(kernel_name='python3', progress_bar=False)
    notebook = papermill.execute_notebook(path, out/path.name, parameters, cwd=NBS, **quiet)
    outputs = [o for c in notebook['cells'] for o in c.get('outputs', ())]
    shown = [o.get('text', '') + ''.join(o.get('data', {}).get(f'text/{kind}', '') for kind in ('html', 'markdown'))
             for o in outputs]
    return html.unescape(''.join(shown))

@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "Where experiments of seconds share their runs."
    folder = tmp_path_factory.mktemp('smoke')
    return dict(preset='smoke', folder=str(folder/'runs'), results=str(folder/'results'))

SMALL = [pytest.param(name, marks=pytest.mark.slow) for name in experiment_names()]

@pytest.mark.parametrize('name', SMALL)
def test_experiment_in_small(name, smoke, tmp_path):
    "Real runs: the base is scored again, every row and verdict has its interval, and a second pass writes nothing."
    few = dict(compare='flow_grpo,g2rpo_no_mgai', cost='g2rpo,flow_grpo', newer_methods='flow_grpo,awm').get(name)
    parameters = smoke | (dict(rows=few) if few else {})
    text = execute(NBS/f'{name}.ipynb', tmp_path, parameters)
    assert "preset='smoke'" in text and 'method.granularities=' in text and 'nfe' in text
    file, = Path(smoke['results']).glob(f'{name}_smoke*.json')
    assert '<details>' in text and 'seeds: **' in text      # what was run, folded, and the answer
    row, before = json.loads(file.read_text()), file.stat().st_mtime_ns
    assert row['settings']['preset'] == 'smoke' and row['base'] and row['seconds'] > 0 and row['machines']
    assert set(row['claims'].values()) <= set(VERDICTS)
    gains = [gain for place in row['rows'].values() for of_row in place.values() for gain in of_row['gains'].values()]
    assert len(gains) >= 6 and all(g['low'] <= g['mean'] <= g['high'] for g in (*gains, *row['verdicts']))
    assert all(len(seeds) == 2 for seeds in row['seeds'].values())
    execute(NBS/f'{name}.ipynb', tmp_path, parameters | dict(launcher='none'))
    assert file.stat().st_mtime_ns == before

@pytest.mark.slow
def test_rows_without_a_claim_between_them(smoke, tmp_path):
    "They are run and shown, and nothing is judged."
    text = execute(NBS/'cost.ipynb', tmp_path, smoke | dict(rows='g2rpo,awm', results=str(tmp_path/'results')))
    row, = map(read_json, (tmp_path/'results').glob('cost_smoke*.json'))
    assert row['claims'] == {} and row['verdicts'] == [] and 'At equal' in text and 'awm' in text

def test_repro_says_whether_the_claims_held(smoke, tmp_path, capsys):
    "The runs are there already; two seeds of seconds prove nothing, so the exit code is 3."
    where = ['-p', 'folder', smoke['folder'], '-p', 'results', smoke['results'], '--out', str(tmp_path/'out')]
    code = main(['repro', 'step_robustness', '--preset', 'smoke', *where])
    printed = capsys.readouterr().out
    assert (tmp_path/'out'/'step_robustness.ipynb').exists() and 'G²RPO > MixGRPO' in printed
    assert code == (0 if 'G²RPO > MixGRPO                  holds' in printed else 3)

@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in experiment_names() if (RESULTS/f'{n}_tiny.json').exists()])
def test_what_is_committed_follows_from_the_committed_runs(name, tmp_path):
    "To the last byte."
    for file in RESULTS.glob('runs_tiny*.jsonl'):
        shutil.copy(file, tmp_path)
    execute(NBS/f'{name}.ipynb', tmp_path, dict(launcher='none', results=str(tmp_path)))
    assert (tmp_path/f'{name}_tiny.json').read_text() == (RESULTS/f'{name}_tiny.json').read_text()

WRONG = [('-p seed 2', 'did you mean seeds?'), ('-p seeds two', 'must be a int'), ('--preset papre', 'papre'),
         ('--launcher slrum', 'is not one of none, inline'), ('--preset paper --launcher inline', 'needs GPUs'),
         ('-p workers -1', 'workers'), ('--preset official_script -p reward ocr', 'released no scripts')]

@pytest.mark.parametrize('flags, message', WRONG, ids=[flags for flags, _ in WRONG])
def test_a_wrong_parameter_is_refused(flags, message, capsys, tmp_path):
    assert main(['repro', 'main_table', *flags.split(), '--out', str(tmp_path/'out')]) == 2
    assert message in capsys.readouterr().err

def test_papermill_itself_refuses_a_misspelt_parameter(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match='did you mean seeds'):
        execute(NBS/'main_table.ipynb', tmp_path, dict(seed=2))

@pytest.mark.slow
@pytest.mark.parametrize('name, reward, rows', [('main_table', 'hps+clip', 4), ('dense_reward', 'pickscore', 6)])
def test_the_published_setting_is_rehearsed(name, reward, rows, tmp_path, capsys, monkeypatch):
    "Flux.1-dev and SD3.5-M without a GPU or a checkpoint: plan, cost, what is missing, two iterations of each row."
    monkeypatch.setenv('G2RPO_ASSETS', str(tmp_path/'assets'))
    flags = f'--preset paper -p reward {reward} --dry-run --out {tmp_path}/out'
    assert main(['repro', name, *flags.split()]) == 1
    printed = capsys.readouterr().out
    assert "preset='paper'" in printed and 'device-hours' in printed
    assert printed.count('ok    rehearsal') == rows and printed.count('ok    batch') == rows
    failed = [line for line in printed.splitlines() if line.startswith('FAIL')]
    missing = 'is not', 'are not', 'g2rpo calibrate', 'needs open_clip_torch', 'FAIL  disk', 'needs rapidocr'
    assert all(any(word in line for word in missing) for line in failed)
    assert 'FAIL  model' in printed and 'FAIL  prompts' in printed
    assert 'pickscore is not in' in printed and 'imagereward is not in' in printed    # by whom rows are judged
    assert 'G2RPO_UNIFIED_REWARD is not set' in printed and 'export G2RPO_UNIFIED_REWARD=' in printed
    assert 'workers=16' in printed and 'each run by 16 processes' in printed and 'over 16 processes' in printed
    assert 'ok    memory    each of 16 processes' in printed and ' disk ' in printed
    assert 'Downloads: about' in printed and f'g2rpo repro {name} --preset paper --launcher slurm' in printed

def started(folder, smoke):
    "An experiment by papermill, in a process group of its own."
    parameters = smoke | dict(folder=str(folder/'runs'), results=str(folder/'results'))
    words = [word for key, value in parameters.items() for word in ('-p', key, value)]
    notebook = NBS/'ablation_steps.ipynb', folder/'out.ipynb'
    command = [sys.executable, '-m', 'papermill', *notebook, '-k', 'python3', '--cwd', NBS]
    return subprocess.Popen([*map(str, command), *words], env=ENV, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

@pytest.mark.slow
def test_a_study_that_was_killed_ends_as_one_that_was_not(smoke, tmp_path):
    "The kernel dies at moments drawn at random, and its workers with it."
    draw, killed, whole = random.Random(0), tmp_path/'killed', tmp_path/'whole'
    killed.mkdir()
    whole.mkdir()
    for _ in range(3):
        one = started(killed, smoke)
        time.sleep(draw.uniform(8, 25))
        if one.poll() is None:
            kill(one.pid)
        one.wait()
    assert started(killed, smoke).wait(timeout=500) == 0
    assert started(whole, smoke).wait(timeout=500) == 0
    first, other = (json.loads((f/'results'/'ablation_steps_smoke.json').read_text()) for f in (killed, whole))
    assert without_time(first) == without_time(other)

POOL = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from g2rpo.study.workers import end_with_parent
with ProcessPoolExecutor(2, get_context('spawn'), end_with_parent) as pool:
    for _ in range(5): pool.submit(time.sleep, 600)
    print('go', flush=True)
    time.sleep(600)
"""

@pytest.mark.parametrize('after', [0, 1, 15])
def test_workers_end_with_their_kernel(after):
    "Also those that are still starting, and with jobs left in the queue."
    one = subprocess.Popen([sys.executable, '-c', POOL], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert one.stdout.readline() == b'go\n'
    time.sleep(after)
    workers = children(one.pid)
    assert len(workers) >= 2
    one.kill()
    gone(workers)
    one.wait()

def kill(pid):
    "SIGKILL to papermill and the kernel; the workers, which hear nothing, end by themselves."
    kernels = children(pid)
    workers = [worker for kernel in kernels for worker in children(kernel)]
    for each in (pid, *kernels):
        os.kill(each, signal.SIGKILL)
    gone(workers)

def children(pid):
    listed = subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in listed.split()]

def gone(workers):
    until = time.time() + 60
    while any(map(alive, workers)):
        assert time.time() < until, 'a worker goes on without its kernel'
        time.sleep(.2)

def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False

def without_time(value):
    "What was measured, without how long it took."
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if k != 'seconds'}
    return [without_time(v) for v in value] if isinstance(value, list) else value

def test_a_claim_reads_the_same_on_the_ladder_as_in_its_experiment():
    "Also one that is not primary; one whose runs are not there says nothing."
    study = Study(ROOT/'runs'/'study', 'none', tracked=RESULTS/'runs_tiny.jsonl')
    found = claim_verdict(study, ExperimentConfig(), Claim('DenseGRPO > Flow-GRPO', 'dense_grpo', 'flow_grpo'))
    kept, = (v for v in read_json(RESULTS/'dense_reward_tiny.json')['verdicts']
             if all(v[key] == found[key] for key in ('claim', 'at', 'scorer')))
    assert kept['verdict'] == found['verdict']
    for key in ('mean', 'low', 'high'):
        assert kept[key] == pytest.approx(found[key], abs=1e-4)
    assert claim_verdict(study, ExperimentConfig(), Claim('mine', 'e_grpo_script', 'flow_grpo')) is None

@pytest.mark.parametrize('kind, refused', [('MissingRuns', InputError), ('NothingToLearn', RunStopped)])
def test_what_a_notebook_refuses_is_refused_in_its_words(tmp_path, kind, refused):
    module = dict(MissingRuns='study.launch', NothingToLearn='errors')[kind]
    cell = nbformat.v4.new_code_cell(f'from g2rpo.{module} import {kind}\nraise {kind}("so it is")')
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path/'refuses.ipynb')
    with pytest.raises(refused, match='^so it is$'):
        run_notebook(tmp_path/'refuses.ipynb', tmp_path/'out', {})
