"A run that was stopped and taken up again is the run that was not."
import json
import os
import random
import shutil
import signal
import time
import warnings
from dataclasses import replace

import pytest
import torch
from g2rpo.training import checkpoint
from g2rpo.errors import InputError, RunStopped
from g2rpo.cli.main import main
from g2rpo.training.config import open_policy
from g2rpo.training.presets import tiny
from g2rpo.core.rows import METHODS
from g2rpo.core.window import Window
from g2rpo.training.trainer import train

def left_of_right(images, prompts):
    half = images.shape[-1]//2
    return images[..., half:].mean((1, 2, 3)) - images[..., :half].mean((1, 2, 3))

def tossed(images, prompts):
    "A reward that draws from every library's random state."
    import numpy as np
    return left_of_right(images, prompts) + .01*(torch.rand(len(images)) + random.random() + np.random.rand())

WORDS = [f'a sign that says "{i:03d}" in red' for i in range(8)]
SMALL = dict(T=4, group_size=4, prompts_per_iteration=2, save_every=1)
ROWS = dict(
    g2rpo=dict(method=replace(METHODS['g2rpo'], granularities=(1, 2))), lora=dict(method=METHODS['g2rpo_no_mgai'], lora_rank=4), averaged=dict(method=METHODS['dense_grpo'], T=6),
    moving=dict(method=replace(METHODS['mix_grpo'], window=Window(2, every=2)), T=6))

def go(out, iterations, reward=tossed, **changes):
    "Rows of the metrics without their times."
    override = changes.pop('override', ())
    resume = changes.pop('resume', None)
    cfg = tiny(**SMALL | changes, iterations=iterations)
    torch.manual_seed(1)
    random.seed(1)
    __import__('numpy').random.seed(1)
    log = train(cfg, dict(r=reward), WORDS, out, policy=open_policy(cfg), resume=resume, override=override).metrics
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in log]

def state(out):
    "Every tensor of the last checkpoint, and the last row of metrics."
    from safetensors.torch import load_file
    place = checkpoint.latest_checkpoint(out/'checkpoints')
    tensors = {k: v for file in place.glob('*.safetensors') for k, v in load_file(file).items()}
    return int(place.name), tensors, [{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in (out/'metrics.jsonl').read_text().splitlines()]

def same(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys() and one[2] == other[2]
    for name in one[1]:
        assert torch.equal(one[1][name], other[1][name]), name

@pytest.mark.parametrize('row', ROWS)
def test_stopped_and_taken_up_is_not_stopped(tmp_path, row):
    "Parameters, moments, averages and metrics to the last bit; a reward that draws random numbers draws the same ones."
    straight = go(tmp_path/'a', 4, **ROWS[row])
    go(tmp_path/'b', 2, **ROWS[row])
    assert go(tmp_path/'b', 4, resume='latest', override=['iterations'], **ROWS[row]) == straight
    same(state(tmp_path/'a'), state(tmp_path/'b'))
    from safetensors.torch import load_file
    one, other = ({k: v for file in (tmp_path/run/'weights').glob('*.safetensors') for k, v in load_file(file).items()} for run in 'ab')
    assert one and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

def test_resuming_what_is_finished_changes_nothing(tmp_path):
    log = go(tmp_path/'a', 2)
    before = state(tmp_path/'a')
    assert go(tmp_path/'a', 2, resume='latest') == log
    same(before, state(tmp_path/'a'))

def test_an_earlier_checkpoint_by_name(tmp_path):
    log = go(tmp_path/'a', 3, keep=3)
    straight = state(tmp_path/'a')
    assert go(tmp_path/'a', 3, keep=3, resume='1') == log
    same(straight, state(tmp_path/'a'))
    assert (tmp_path/'a'/'checkpoints'/'000003.left').is_dir()
    with pytest.raises(InputError, match=r'checkpoints of the iterations \[1, 2, 3\]'):
        go(tmp_path/'a', 3, keep=3, resume='7')

def test_another_config_is_refused_with_its_keys(tmp_path, capsys):
    go(tmp_path/'a', 1, reward=left_of_right)
    for change, word in ((dict(seed=3), 'seed=0'), (dict(method=METHODS['e_grpo']), 'method.'), (dict(lr=1.), 'say --override lr'), (dict(T=5), 'T=4')):
        with pytest.raises(InputError, match=word):
            go(tmp_path/'a', 1, **change, resume='latest')
    with pytest.raises(InputError, match='already holds a run'):
        go(tmp_path/'a', 1)
    with pytest.raises(InputError, match='cannot change within a run'):
        go(tmp_path/'a', 1, resume='latest', override=['seed'])

def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    "The config comes from the folder; what is typed is held to it; an override is a change."
    monkeypatch.syspath_prepend(__file__.rsplit('/', 1)[0])
    flags = ['--T', '4', '--group-size', '2', '--iterations', '2', '--prompts-per-iteration', '2', '--rewards', 'test_resume:left_of_right', '--save-every', '1']
    out = str(tmp_path/'a')
    assert main(['train', *flags, '--out', out, '--resume']) == 0 and 'holds no run yet' in capsys.readouterr().out
    assert main(['train', '--out', out, '--resume', '--override', 'iterations=3']) == 0
    assert len((tmp_path/'a'/'metrics.jsonl').read_text().splitlines()) == 3 and json.loads((tmp_path/'a'/'config.json').read_text())['iterations'] == 3
    for bad, word in ((['--seed', '4'], 'leave it at'), (['--override', 'seed=4'], 'cannot change within a run'), (['--override', 'lr'], 'KEY=VALUE'), (['--resume', 'x'], 'not the iteration')):
        assert main(['train', '--out', out, '--resume', *bad]) == 2 and word in capsys.readouterr().err
    assert main(['train', '--out', out, '--override', 'iterations=9']) == 2

def killed(out, after, **changes):
    "A child that a timer kills after so many seconds, at any instruction; whether it had finished."
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, after)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                go(out, 6, resume='latest', **changes)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(9)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGALRM), code
    return code == 0

def campaign(folder, kills, **changes):
    "Runs killed at random moments until there were `kills`, each taken up until it is done and equal to the one that was not killed; the number of kills."
    torch.set_num_threads(1)
    began = time.time()
    go(folder/'straight', 6, **changes)
    whole, wanted, draw, count, run = time.time() - began, state(folder/'straight'), random.Random(0), 0, 0
    while count < kills:
        out, run = folder/f'run{run}', run + 1
        while not killed(out, draw.uniform(.2, 1.)*whole, **changes):
            count += 1
        same(wanted, state(out))
        shutil.rmtree(out)
    return count

def test_killed_at_random_moments(tmp_path):
    assert campaign(tmp_path, 4) >= 4

@pytest.mark.slow
@pytest.mark.parametrize('row', ROWS)
def test_killed_at_many_random_moments(tmp_path, row):
    print(f'{row}: {campaign(tmp_path, 8, **ROWS[row])} kills')

@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    "A small file system: the run is refused where a checkpoint can never fit, and goes on where the disk fills up for a while."
    import subprocess
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=150m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('mounting is not allowed here')
    try:
        straight = go(tmp_path/'b', 4)
        def filling(row):
            if row['iteration'] == 0:
                (disk/'ballast').write_bytes(b'x'*(shutil.disk_usage(disk).free - 2**20))
            if row['iteration'] == 2:
                (disk/'ballast').unlink()
        cfg = tiny(**SMALL, iterations=4)
        torch.manual_seed(1)
        random.seed(1)
        __import__('numpy').random.seed(1)
        with pytest.warns(UserWarning, match='No space left'):
            log = train(cfg, dict(r=tossed), WORDS, disk/'a', policy=open_policy(cfg), on_iteration=filling).metrics
        assert [{k: v for k, v in row.items() if k != 'seconds'} for row in log] == straight
        same(state(disk/'a'), state(tmp_path/'b'))
        (disk/'ballast').write_bytes(b'x'*(shutil.disk_usage(disk).free - 2**24))
        with pytest.raises(InputError, match='GiB free'):
            go(disk/'c', 1)
        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
        with pytest.raises(InputError, match='Read-only file system'):
            go(disk/'d', 1)
    finally:
        subprocess.run(['umount', disk], check=True)

def test_saving_costs_less_than_two_percent(tmp_path):
    "At the paper's interval of 50 iterations."
    cfg = tiny(iterations=2, save_every=1)
    log = train(cfg, dict(r=left_of_right), WORDS, tmp_path/'a', policy=open_policy(cfg)).metrics
    tensors, began = state(tmp_path/'a')[1], time.time()
    checkpoint.write_checkpoint(tmp_path/'again', tensors.items(), {})
    share = (time.time() - began)/(50*log[0]['seconds'])
    print(f'a save takes {time.time() - began:.2f} s, {share:.2%} of 50 iterations')
    assert share < .02

@pytest.mark.filterwarnings('ignore:iteration')
def test_a_panel_watches_what_is_not_trained(tmp_path):
    "Gains with intervals against the first look, statistics of images, drift; the same numbers after resuming; an alarm ends the run if asked."
    from g2rpo.training.panel import Panel
    def panel(stop=False, reward=left_of_right): return Panel(WORDS, dict(r=reward, other=lambda i, p: -left_of_right(i, p)), ('r',), every=2, T=4, stop=stop)
    cfg = tiny(**SMALL | dict(lr=2e-3), iterations=4)
    run = lambda out, n, p, **more: train(replace(cfg, iterations=n), dict(r=left_of_right), WORDS, out, policy=open_policy(cfg), panel=p, **more)
    log = run(tmp_path/'a', 4, panel())
    assert ['panel' in row for row in log] == [False, True, False, True] and log[3]['drift'] > log[1]['drift'] > 0
    assert set(log[1]['images']) == {'saturation', 'dark', 'edges', 'entropy', 'grid', 'diversity'} and log[3]['panel']['r'][1] == pytest.approx(-log[3]['panel']['other'][1], abs=1e-6)
    run(tmp_path/'b', 2, panel())
    again = run(tmp_path/'b', 4, panel(), resume='latest', override=['iterations'])
    assert again[3]['panel'] == log[3]['panel'] and again[3]['drift'] == log[3]['drift']
    if 'alarm' in log[3]:
        with pytest.raises(RunStopped, match='panel_stop'):
            run(tmp_path/'c', 4, panel(stop=True))

def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(InputError, match='pip install trackio'):
        go(tmp_path/'a', 1, tracker='trackio')
    with pytest.raises(InputError, match='tracker='):
        tiny(tracker='paper')

def test_a_tracker_hears_every_row(tmp_path):
    "tensorboard's event file, written by accelerate."
    go(tmp_path/'a', 2, tracker='tensorboard')
    events, = (tmp_path/'a').glob('g2rpo/*events*')
    said = events.read_bytes()
    for tag in (b'reward/r', b'ratio/0', b'grad_norm/1', b'equivalents'):
        assert said.count(tag) == 2

@pytest.mark.parametrize('call', [1, 2, 3, 5, 6])
def test_killed_inside_a_save(tmp_path, call):
    "At the n-th thing that is flushed to the disk: a file, the folder, or its place."
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        flushes = []
        def flush(path):
            flushes.append(path)
            if len(flushes) == 5 + call:
                os.kill(os.getpid(), signal.SIGKILL)    # in the second save
        checkpoint.fsync = flush
        go(tmp_path/'a', 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    straight, saved = go(tmp_path/'b', 3), checkpoint.latest_checkpoint(tmp_path/'a'/'checkpoints').name
    assert saved in ('000001', '000002')
    assert go(tmp_path/'a', 3, resume='latest') == straight
    same(state(tmp_path/'a'), state(tmp_path/'b'))
    assert not list((tmp_path/'a'/'checkpoints').glob('*.part'))

def test_every_damage_to_every_file_is_seen(tmp_path):
    "A flipped bit, a cut end, a missing file: that checkpoint is passed over with a warning, and the one before it is used."
    go(tmp_path/'a', 2)
    wanted, count = state(tmp_path/'a'), 0
    files = sorted(f.name for f in (tmp_path/'a'/'checkpoints'/'000002').iterdir())
    assert files == ['manifest.json', 'state.json', 'tensors-00000.safetensors']
    draw = random.Random(0)
    for file in files:
        for harm in ('flip', 'cut', 'empty', 'gone'):
            out = tmp_path/'b'
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(tmp_path/'a', out)
            path = out/'checkpoints'/'000002'/file
            raw = bytearray(path.read_bytes())
            if harm == 'flip':
                raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            if harm == 'gone':
                path.unlink()
            else:
                path.write_bytes(dict(flip=raw, cut=raw[:draw.randrange(1, len(raw))], empty=b'')[harm])
            with pytest.warns(UserWarning, match='passed over'):
                go(out, 2, resume='latest')
            same(wanted, state(out))
            count += 1
    assert count == 12

def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, monkeypatch):
    straight, write, tries = go(tmp_path/'b', 4), checkpoint.write_checkpoint, []
    def full(place, tensors, kept):
        tries.append(place.name)
        if len(tries) == 2:
            raise OSError(28, 'No space left on device')
        write(place, tensors, kept)
    monkeypatch.setattr(checkpoint, 'write', full)
    with pytest.warns(UserWarning, match='No space left'):
        assert go(tmp_path/'a', 4) == straight
    same(state(tmp_path/'a'), state(tmp_path/'b'))
    assert tries == ['000001', '000002', '000003', '000004'] and checkpoint.saved_iterations(tmp_path/'a'/'checkpoints') == [3, 4]

def test_a_folder_that_cannot_hold_a_run_is_refused(tmp_path, monkeypatch):
    import shutil as disk
    monkeypatch.setattr(disk, 'disk_usage', lambda path: type('Usage', (), dict(free=10))())
    with pytest.raises(InputError, match='GiB free'):
        go(tmp_path/'a', 1)
    assert not (tmp_path/'a'/'config.json').exists()
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        go(tmp_path/'file'/'a', 1)

def test_a_checkpoint_says_what_it_was_written_by(tmp_path):
    go(tmp_path/'a', 1)
    kept = json.loads((tmp_path/'a'/'checkpoints'/'000001'/'state.json').read_text())
    assert kept['packages']['torch'] == torch.__version__ and kept['processes'] == 1 and kept['code'].startswith('0.') and len(kept['config_sha256']) == 64 and kept['config']['seed'] == 0 and kept['scorers'] == {}

def test_nothing_in_a_run_is_a_pickle(tmp_path):
    go(tmp_path/'a', 1)
    assert {f.suffix for f in (tmp_path/'a').rglob('*') if f.is_file()} == {'.json', '.jsonl', '.safetensors'}

def test_what_is_not_finite_is_left_out_counted_and_named(tmp_path):
    calls = []
    def sometimes(images, prompts):
        calls.append(0)
        out = left_of_right(images, prompts)
        if len(calls) == 3:
            out[1] = float('nan')          # the first of the second iteration's, after preflight
        return out
    with pytest.warns(UserWarning, match='left out: reward r not finite: prompt'):
        log = go(tmp_path/'a', 3, reward=sometimes)
    assert 'seed 0, iteration 1, picture 0, member 1' in log[1]['skipped'][0] and 'skipped' not in log[0] and all(n > 0 for n in log[1]['grad_norm'])
    calls.clear()
    with pytest.raises(RunStopped, match='more than skips=0'), pytest.warns(UserWarning):
        go(tmp_path/'b', 3, reward=sometimes, skips=0)
    assert checkpoint.saved_iterations(tmp_path/'b'/'checkpoints') == [1]

def test_a_gradient_that_is_not_finite_is_left_out(tmp_path, monkeypatch):
    import accelerate
    clip, calls = accelerate.Accelerator.clip_grad_norm_, []
    def burst(self, *args):
        calls.append(0)
        return torch.tensor(float('inf')) if len(calls) == 2 else clip(self, *args)
    monkeypatch.setattr(accelerate.Accelerator, 'clip_grad_norm_', burst)
    with pytest.warns(UserWarning, match='gradient norm inf'):
        log = go(tmp_path/'a', 2)
    assert log[0]['grad_norm'][1] is None and log[0]['grad_norm'][0] > 0 and all(log[1]['grad_norm'])
