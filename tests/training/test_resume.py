"A run that was stopped and resumed is the run that was not."
import json
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from g2rpo import METHODS, train
from g2rpo.cli.main import main
from g2rpo.core.window import Window
from g2rpo.errors import InputError, RunStopped
from g2rpo.training import checkpoint
from g2rpo.training.panel import Panel
from helpers import PROMPTS, left_of_right, row, small
from safetensors.torch import load_file

def tossed(images, prompts):
    "A reward that draws from every library's random state."
    return left_of_right(images, prompts) + .01*(torch.rand(len(images)) + random.random() + np.random.rand())

ROWS = dict(
    g2rpo=dict(), lora=dict(method=row('g2rpo_no_mgai'), lora_rank=4), averaged=dict(method=row('dense_grpo'), T=6),
    moving=dict(method=row('mix_grpo', window=Window(2, every=2)), T=6))

def seed_libraries():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)

def without_seconds(log): return [{k: v for k, v in entry.items() if k != 'seconds'} for entry in log]

@pytest.fixture
def go(mini):
    "Trains into a folder; rows of the metrics without their times."
    def run(out, iterations, reward=tossed, resume=None, override=(), on_iteration=None, panel=None, **changes):
        cfg = small(mini, **dict(group_size=4, save_every=1) | changes | dict(iterations=iterations))
        seed_libraries()
        more = dict(resume=resume, override=override, on_iteration=on_iteration, panel=panel)
        return without_seconds(train(cfg, dict(r=reward), PROMPTS, out, **more).metrics)
    return run

def tensors_in(folder): return {k: v for file in folder.glob('*.safetensors') for k, v in load_file(file).items()}

def state(out):
    "Iteration and tensors of the last checkpoint, and all rows of the metrics."
    place = checkpoint.latest_checkpoint(out/'checkpoints')
    lines = (out/'metrics.jsonl').read_text().splitlines()
    return int(place.name), tensors_in(place), without_seconds(map(json.loads, lines))

def assert_same(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys() and one[2] == other[2]
    for name in one[1]:
        assert torch.equal(one[1][name], other[1][name]), name

@pytest.mark.parametrize('name', ROWS)
def test_stopped_and_resumed_is_not_stopped(go, tmp_path, name):
    "Parameters, moments, averages and metrics to the last bit; a reward that draws random numbers draws the same ones."
    a, b, changes = tmp_path/'a', tmp_path/'b', ROWS[name]
    straight = go(a, 4, **changes)
    go(b, 2, **changes)
    assert go(b, 4, resume='latest', override=['iterations'], **changes) == straight
    assert_same(state(a), state(b))
    one, other = tensors_in(a/'weights'), tensors_in(b/'weights')
    assert one and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

def test_resuming_what_is_finished_changes_nothing(go, tmp_path):
    log = go(tmp_path/'a', 2)
    before = state(tmp_path/'a')
    assert go(tmp_path/'a', 2, resume='latest') == log
    assert_same(before, state(tmp_path/'a'))

def test_an_earlier_checkpoint_by_name(go, tmp_path):
    log = go(tmp_path/'a', 3, keep=3)
    straight = state(tmp_path/'a')
    assert go(tmp_path/'a', 3, keep=3, resume='1') == log
    assert_same(straight, state(tmp_path/'a'))
    assert (tmp_path/'a'/'checkpoints'/'000003.left').is_dir()
    with pytest.raises(InputError, match=r'checkpoints of the iterations \[1, 2, 3\]'):
        go(tmp_path/'a', 3, keep=3, resume='7')

def test_another_config_is_refused_with_its_keys(go, tmp_path):
    go(tmp_path/'a', 1, reward=left_of_right)
    changed = ((dict(seed=3), 'seed=0'), (dict(method=METHODS['e_grpo']), 'method.'),
               (dict(lr=1.), r"say override=\['lr'\]"), (dict(T=5), 'T=4'))
    for change, message in changed:
        with pytest.raises(InputError, match=message):
            go(tmp_path/'a', 1, **change, resume='latest')
    with pytest.raises(InputError, match='already holds a run'):
        go(tmp_path/'a', 1)
    with pytest.raises(InputError, match='cannot change within a run'):
        go(tmp_path/'a', 1, resume='latest', override=['seed'])

def test_on_the_command_line(mini, tmp_path, monkeypatch, capsys):
    "The config comes from the folder; what is typed is held to it; an override is a change."
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    flags = (f'--model {mini} --precision no --T 4 --group-size 2 --iterations 2 --prompts-per-iteration 2 '
             '--save-every 1')
    out = tmp_path/'a'
    first = f'train {flags} --rewards helpers:left_of_right --out {out} --resume'
    assert main(first.split()) == 0 and 'holds no run yet' in capsys.readouterr().out
    assert main(f'train --out {out} --resume --override iterations=3'.split()) == 0
    assert len((out/'metrics.jsonl').read_text().splitlines()) == 3
    assert json.loads((out/'config.json').read_text())['iterations'] == 3
    refused = (('--seed 4', 'leave it at'), ('--override seed=4', 'cannot change within a run'),
               ('--override lr', 'KEY=VALUE'), ('--resume x', 'not the iteration'))
    for bad, message in refused:
        assert main(f'train --out {out} --resume {bad}'.split()) == 2 and message in capsys.readouterr().err
    assert main(f'train --out {out} --override iterations=9'.split()) == 2

def in_child(work):
    "Exit code of a child process that does `work`; negative where a signal ended it."
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def was_killed(go, out, after, **changes):
    "Whether a timer ended the run after so many seconds, at any instruction, before it had finished."
    def work():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, after)
        go(out, 6, resume='latest', **changes)
    code = in_child(work)
    assert code in (0, -signal.SIGALRM), code
    return code != 0

def campaign(go, folder, kills, **changes):
    "Runs killed at random moments, each resumed until it is done and equal to the one that was not; how many kills."
    torch.set_num_threads(1)
    began, draw, count, n = time.time(), random.Random(0), 0, 0
    go(folder/'straight', 6, **changes)
    whole, wanted = time.time() - began, state(folder/'straight')
    while count < kills:
        out, n = folder/f'run{n}', n + 1
        while was_killed(go, out, draw.uniform(.2, 1.)*whole, **changes):
            count += 1
        assert_same(wanted, state(out))
        shutil.rmtree(out)
    return count

def test_killed_at_random_moments(go, tmp_path): assert campaign(go, tmp_path, 4) >= 4

@pytest.mark.slow
@pytest.mark.parametrize('name', ROWS)
def test_killed_at_many_random_moments(go, tmp_path, name):
    "With the embedded model, whose checkpoints take a while to write."
    print(f'{name}: {campaign(go, tmp_path, 8, model="tiny", **ROWS[name])} kills')

@pytest.mark.slow
def test_a_disk_that_is_really_full(go, tmp_path):
    "A small file system: refused where a checkpoint can never fit; a run goes on where the disk fills up for a while."
    disk, changes = tmp_path/'disk', dict(model='tiny')
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=150m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('mounting is not allowed here')
    def fill(entry):
        if entry['iteration'] == 0:
            (disk/'ballast').write_bytes(b'x'*(shutil.disk_usage(disk).free - 2**20))
        if entry['iteration'] == 2:
            (disk/'ballast').unlink()
    try:
        straight = go(tmp_path/'b', 4, **changes)
        with pytest.warns(UserWarning, match='No space left'):
            assert go(disk/'a', 4, on_iteration=fill, **changes) == straight
        assert_same(state(disk/'a'), state(tmp_path/'b'))
        (disk/'ballast').write_bytes(b'x'*(shutil.disk_usage(disk).free - 2**24))
        with pytest.raises(InputError, match='GiB free'):
            go(disk/'c', 1, **changes)
        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
        with pytest.raises(InputError, match='Read-only file system'):
            go(disk/'d', 1, **changes)
    finally:
        subprocess.run(['umount', disk], check=True)

@pytest.mark.slow
def test_saving_costs_less_than_two_percent(tmp_path):
    "At the paper's interval of 50 iterations, on the embedded model as it is trained."
    from g2rpo import presets
    log = train(presets.tiny(iterations=2, save_every=1), left_of_right, PROMPTS, tmp_path/'a').metrics
    tensors, began = state(tmp_path/'a')[1], time.time()
    checkpoint.write_checkpoint(tmp_path/'again', tensors.items(), {})
    share = (time.time() - began)/(50*log[0]['seconds'])
    print(f'a save takes {share:.2%} of 50 iterations')
    assert share < .02

def right_of_left(images, prompts): return -left_of_right(images, prompts)

@pytest.mark.filterwarnings('ignore:iteration')
def test_a_panel_watches_what_is_not_trained(go, tmp_path):
    "Gains against the first look, image statistics, drift; the same after resuming; an alarm ends the run."
    def watched(out, n, stop=False, **more):
        scorers = dict(r=left_of_right, other=right_of_left)
        panel = Panel(PROMPTS, scorers, ('r',), every=2, T=4, stop=stop)
        return go(out, n, left_of_right, panel=panel, lr=2e-3, **more)
    log = watched(tmp_path/'a', 4)
    assert ['panel' in entry for entry in log] == [False, True, False, True] and log[3]['drift'] > log[1]['drift'] > 0
    assert set(log[1]['images']) == {'saturation', 'dark', 'edges', 'entropy', 'grid', 'diversity'}
    assert log[3]['panel']['r'][1] == pytest.approx(-log[3]['panel']['other'][1], abs=1e-6)
    watched(tmp_path/'b', 2)
    again = watched(tmp_path/'b', 4, resume='latest', override=['iterations'])
    assert again[3]['panel'] == log[3]['panel'] and again[3]['drift'] == log[3]['drift']
    if 'alarm' in log[3]:
        with pytest.raises(RunStopped, match='panel_stop'):
            watched(tmp_path/'c', 4, stop=True)

def test_what_a_reward_draws_is_the_runs_seeds(mini):
    "Whatever this process has drawn before."
    logs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        logs.append(without_seconds(train(small(mini, group_size=4), dict(r=tossed), PROMPTS).metrics))
    assert logs[0] == logs[1]

def test_watching_changes_nothing(go, tmp_path):
    "A panel draws random numbers of its own: the training is the one that nobody watches, to the last bit."
    panel = Panel(PROMPTS[:2], dict(r=tossed, other=left_of_right), ('r',), every=1, T=4)
    go(tmp_path/'a', 2)
    go(tmp_path/'b', 2, panel=panel)
    alone, watched = tensors_in(tmp_path/'a'/'weights'), tensors_in(tmp_path/'b'/'weights')
    assert alone and all(torch.equal(alone[key], watched[key]) for key in alone)

def test_a_tracker_that_is_not_installed_is_named(go, tmp_path):
    with pytest.raises(InputError, match='pip install trackio'):
        go(tmp_path/'a', 1, tracker='trackio')
    with pytest.raises(InputError, match='tracker='):
        go(tmp_path/'a', 1, tracker='paper')

def test_a_tracker_hears_every_row(go, tmp_path):
    "tensorboard's event file, written by accelerate."
    go(tmp_path/'a', 2, tracker='tensorboard')
    events, = (tmp_path/'a').glob('g2rpo/*events*')
    written = events.read_bytes()
    for tag in (b'reward/r', b'ratio/0', b'grad_norm/1', b'nfe'):
        assert written.count(tag) == 2

@pytest.mark.parametrize('call', [1, 2, 3, 5, 6])
def test_killed_inside_a_save(go, tmp_path, monkeypatch, call):
    "At the n-th thing that is flushed to the disk: a file, the folder, or its place."
    flushes = []
    def fsync(path):
        flushes.append(path)
        if len(flushes) == 5 + call:
            os.kill(os.getpid(), signal.SIGKILL)    # in the second save
    def work():
        checkpoint.fsync = fsync
        go(tmp_path/'a', 3)
    assert in_child(work) == -signal.SIGKILL
    straight, saved = go(tmp_path/'b', 3), checkpoint.latest_checkpoint(tmp_path/'a'/'checkpoints').name
    assert saved in ('000001', '000002')
    assert go(tmp_path/'a', 3, resume='latest') == straight
    assert_same(state(tmp_path/'a'), state(tmp_path/'b'))
    assert not list((tmp_path/'a'/'checkpoints').glob('*.part'))

def damaged(path, harm, draw):
    "Flip a bit, cut the end, empty or delete a file."
    raw = bytearray(path.read_bytes())
    if harm == 'flip':
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    if harm == 'gone':
        path.unlink()
    else:
        path.write_bytes(dict(flip=raw, cut=raw[:draw.randrange(1, len(raw))], empty=b'')[harm])

def test_every_damage_to_every_file_is_seen(go, tmp_path):
    "That checkpoint is passed over with a warning, and the one before it is used."
    go(tmp_path/'a', 2)
    wanted, draw, out = state(tmp_path/'a'), random.Random(0), tmp_path/'b'
    files = sorted(f.name for f in (tmp_path/'a'/'checkpoints'/'000002').iterdir())
    assert files == ['manifest.json', 'state.json', 'tensors-00000.safetensors']
    for file in files:
        for harm in ('flip', 'cut', 'empty', 'gone'):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(tmp_path/'a', out)
            damaged(out/'checkpoints'/'000002'/file, harm, draw)
            with pytest.warns(UserWarning, match='passed over'):
                go(out, 2, resume='latest')
            assert_same(wanted, state(out))

def test_a_disk_that_is_full_for_a_while_costs_nothing(go, tmp_path, monkeypatch):
    straight, write, tries = go(tmp_path/'b', 4), checkpoint.write_checkpoint, []
    def full(place, *args):
        tries.append(place.name)
        if len(tries) == 2:
            raise OSError(28, 'No space left on device')
        write(place, *args)
    monkeypatch.setattr(checkpoint, 'write_checkpoint', full)
    with pytest.warns(UserWarning, match='No space left'):
        assert go(tmp_path/'a', 4) == straight
    assert_same(state(tmp_path/'a'), state(tmp_path/'b'))
    assert tries == ['000001', '000002', '000003', '000004']
    assert checkpoint.saved_iterations(tmp_path/'a'/'checkpoints') == [3, 4]

def test_a_folder_that_cannot_hold_a_run_is_refused(go, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=10))())
    with pytest.raises(InputError, match='GiB free'):
        go(tmp_path/'a', 1)
    assert not (tmp_path/'a'/'config.json').exists()
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        go(tmp_path/'file'/'a', 1)

def test_a_checkpoint_says_what_it_was_written_by(go, tmp_path):
    go(tmp_path/'a', 1)
    kept = json.loads((tmp_path/'a'/'checkpoints'/'000001'/'state.json').read_text())
    assert kept['packages']['torch'] == torch.__version__ and kept['processes'] == 1 and kept['code'].startswith('0.')
    assert len(kept['config_sha256']) == 64 and kept['config']['seed'] == 0 and kept['scorers'] == {}

def test_nothing_in_a_run_is_a_pickle(go, tmp_path):
    go(tmp_path/'a', 1)
    assert {f.suffix for f in (tmp_path/'a').rglob('*') if f.is_file()} == {'.json', '.jsonl', '.safetensors', '.lock'}

def test_what_is_not_finite_is_left_out_counted_and_named(go, tmp_path):
    calls = []
    def sometimes(images, prompts):
        calls.append(0)
        out = left_of_right(images, prompts)
        if len(calls) == 3:
            out[1] = float('nan')          # the first of the second iteration's, after the check of inputs
        return out
    with pytest.warns(UserWarning, match='left out: reward r not finite: prompt'):
        log = go(tmp_path/'a', 3, reward=sometimes)
    assert 'seed 0, iteration 1, ' in log[1]['skipped'][0] and 'member 1' in log[1]['skipped'][0]
    assert 'skipped' not in log[0] and all(n > 0 for n in log[1]['grad_norm'])
    calls.clear()
    with pytest.raises(RunStopped, match='more than skips=0'), pytest.warns(UserWarning):
        go(tmp_path/'b', 3, reward=sometimes, skips=0)
    assert checkpoint.saved_iterations(tmp_path/'b'/'checkpoints') == [1]

def test_a_gradient_that_is_not_finite_is_left_out(go, tmp_path, monkeypatch):
    import accelerate
    clip, calls = accelerate.Accelerator.clip_grad_norm_, []
    def burst(self, *args):
        calls.append(0)
        return torch.tensor(float('inf')) if len(calls) == 2 else clip(self, *args)
    monkeypatch.setattr(accelerate.Accelerator, 'clip_grad_norm_', burst)
    with pytest.warns(UserWarning, match='gradient norm inf'):
        log = go(tmp_path/'a', 2, method=row('g2rpo', granularities=(1, 2)))
    assert log[0]['grad_norm'][1] is None and log[0]['grad_norm'][0] > 0 and all(log[1]['grad_norm'])
