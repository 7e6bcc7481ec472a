"One, two and four real processes draw the same, learn the same, and go on with each other's runs."
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from g2rpo import METHODS, presets
from g2rpo.core.batches import add_remaining, optimiser_steps, used_steps
from g2rpo.models.loading import load_policy
from g2rpo.training.checkpoint import latest_checkpoint
from helpers import count_lines
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group('processes')     # their runs are made once
TESTS = Path(__file__).resolve().parents[1]
ENV = os.environ | dict(
    OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', ACCELERATE_USE_CPU='true', TQDM_DISABLE='1',
    PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get('PYTHONPATH', '')]))

def launch(*command, **options):
    "A process with a session of its own, so that it can be ended with its workers."
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *map(str, command)], env=ENV, start_new_session=True, **pipes, **options)

def finished(run, seconds=400):
    "What a run printed that has to end well."
    try:
        printed = run.communicate(timeout=seconds)[0]
    finally:
        end(run)
    assert run.returncode == 0, printed
    return printed

def children(pid):
    listed = subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in listed.split()]

def end(run):
    "Kill the launcher and its workers, which are in sessions of their own."
    if run.poll() is not None:
        return
    workers = children(run.pid)
    os.killpg(run.pid, signal.SIGKILL)
    for pid in workers:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    run.wait()

@pytest.fixture(scope='module')
def folder(tmp_path_factory, mini):
    "The runs of `forked.py`: ROW-PROCESSES, and ROW-FIRST-THEN where others went on with a run."
    folder = tmp_path_factory.mktemp('processes')
    finished(launch(TESTS/'training'/'forked.py', folder, mini))
    return folder

def passes(cfg, prompts, iteration):
    "How many passes a process makes at each step of the rollout, and in each optimiser step."
    used = used_steps(cfg.method, prompts, [cfg.group_size]*cfg.T, cfg.seed, iteration)
    updates = optimiser_steps(cfg.method, used, cfg.grad_batch_size)
    counts = []
    for j in range(cfg.T):
        batches = [rows for step in updates for n, rows in step if n == j]
        counts.append(len(add_remaining(batches, len(prompts)*cfg.group_size, cfg.grad_batch_size)))
    return tuple(counts), tuple(map(len, updates))

def test_split_weights_meet_in_equally_many_passes():
    "Members of DanceGRPO draw the steps they train on; with split weights all processes take part in every pass."
    cfg = presets.tiny(method=METHODS['dance_grpo'], T=6, group_size=4, grad_batch_size=1, shard=True)
    prompts = [f'prompt {i}' for i in range(8)]
    assert len({passes(cfg, prompts[rank::4], iteration) for iteration in range(5) for rank in range(4)}) == 1

def metrics(out): return [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]

def trained(out):
    "All weights that a run has kept, as one vector."
    files = sorted((out/'weights').glob('*.safetensors'))
    return torch.cat([tensor.flatten() for file in files for _, tensor in sorted(load_file(file).items())])

def kept(out):
    "Name → tensor of the last checkpoint."
    files = latest_checkpoint(out/'checkpoints').glob('*.safetensors')
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}

def assert_same_checkpoint(one, other):
    "To the last bit."
    one, other = kept(one), kept(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

@pytest.mark.parametrize('world', [2, 4])
def test_the_same_rollout_to_the_last_bit(folder, world):
    "Passes hold one prompt here; batches of other sizes round differently, by 1e-6."
    def load(world, rank): return torch.load(folder/f'g2rpo-{world}-{rank}.pt', weights_only=True)
    one = load(1, 0)
    for rank in range(world):
        part = load(world, rank)
        for name in ('x', 'y'):
            assert torch.equal(part[name], one[name][:, rank::world])
        for granularity in one['x0']:
            assert torch.equal(part['x0'][granularity], one['x0'][granularity][:, rank::world])

def collectives(folder, name, world):
    "Gathers of weights and reductions of gradients in the last two iterations of a run, on its first process."
    counts = json.loads((folder/f'counts-{world}-0.json').read_text())[name]
    return [{key: after[key] - before[key] for key in after} for before, after in zip(counts[1:], counts[2:])]

@pytest.mark.parametrize('name, world', [('once', 2), ('once_chain', 2), ('once', 4), ('hybrid', 4)])
def test_weights_are_gathered_once_an_optimiser_step(folder, name, world):
    "Two blocks and what is outside of them, gathered and reduced in each optimiser step, in no pass more."
    steps = [len(row['grad_norm']) for row in metrics(folder/f'{name}-{world}')[1:]]
    assert set(steps) == {3 if 'chain' in name else 2}
    wanted = [dict(gather=3*n, reduce=3*n) for n in steps]
    assert collectives(folder, name, world) == wanted
    if f'{name}-{world}' == 'once-2':
        assert collectives(folder, 'split', 2)[0]['gather'] > 3*wanted[0]['gather']

def test_weights_gathered_once_are_the_same_to_the_last_bit(folder):
    "Kept or gathered anew in each pass; gradients that are added before they are reduced differ by rounding."
    assert_same_checkpoint(folder/'split-2', folder/'once-2')
    same, chain = (trained(folder/f'{name}-2') for name in ('split_chain', 'once_chain'))
    assert (same - chain).norm() < 1e-2*same.norm()

PAIRS = [('g2rpo', 2), ('g2rpo', 4), ('dance', 2), ('flow', 2), ('lost', 2), ('split', 2), ('split_chain', 2),
         ('once', 4), ('hybrid', 4)]
ALONE = dict(once='split', hybrid='split')     # rows that differ only where there are several processes

@pytest.mark.parametrize('name, world', PAIRS)
def test_the_same_training(folder, mini, name, world):
    """Gradients to rounding, rewards and costs over all processes, and weights that went the same way.

    AdamW makes full steps of the rounding of tiny gradients, so the weights are not the same to the last digit, and
    from the third iteration on a ratio at the edge of the clip range may fall on either side of it. Rounding of 1e-7
    in rewards is divided by the spread of a group, here .002 to .007."""
    one, other = metrics(folder/f'{ALONE.get(name, name)}-1'), metrics(folder/f'{name}-{world}')
    assert len(one) == len(other) == 3
    assert one[0]['grad_norm'][0] == pytest.approx(other[0]['grad_norm'][0], rel=5e-5)
    for a, b in zip(one, other):
        assert a['nfe'] == b['nfe']
        assert a['iteration'] > 1 or a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-2)
        for key in ('reward/left_of_right', 'group_std/left_of_right', 'advantage_by_step', 'ratio'):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6)
    weights = load_policy(str(mini), 24, 48, 16).pipe.transformer.state_dict()
    base = torch.cat([weights[key].flatten() for key in sorted(weights)])
    first, second = (trained(folder/run) - base for run in (f'{ALONE.get(name, name)}-1', f'{name}-{world}'))
    assert (first - second).norm() < .05*first.norm() and first.abs().max() > 1e-4

@pytest.mark.parametrize('name', ['g2rpo', 'split'])
@pytest.mark.parametrize('first, then', [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(folder, name, first, then):
    "The last iteration done again from the checkpoint of the one before, by others."
    before, after = folder/f'{name}-{first}', folder/f'{name}-{first}-{then}'
    wanted, found = metrics(before), metrics(after)
    assert len(found) == 3 and found[:2] == wanted[:2]
    assert found[2]['grad_norm'] == pytest.approx(wanted[2]['grad_norm'], rel=1e-4)
    assert found[2]['nfe'] == wanted[2]['nfe']
    assert (trained(after) - trained(before)).norm() < 1e-2*trained(after).norm()

def test_four_processes_go_on_to_the_last_bit(folder):
    "With more than two, a sum depends on the order of its parts."
    before, after = folder/'g2rpo-4', folder/'g2rpo-4-4'
    assert_same_checkpoint(before, after)
    assert [row['grad_norm'] for row in metrics(after)] == [row['grad_norm'] for row in metrics(before)]

REWARDS = '''
import os, time, torch
def left(images, prompts): return images[..., 24:].mean((1, 2, 3))
def tossed(images, prompts): return left(images, prompts) + .01*torch.rand(len(images))
def one_fails(images, prompts):
    from g2rpo.errors import RunStopped
    if os.environ['RANK'] == '1' and os.path.exists('now'): raise RunStopped('the judge is gone')
    return left(images, prompts)
def one_hangs(images, prompts):
    if os.environ['RANK'] == '1' and os.path.exists('now'): time.sleep(1000)
    return left(images, prompts)
'''
FLAGS = ('--T 4 --group-size 3 --prompts-per-iteration 2 --save-every 1 --precision no --granularities 1,2 '
         '--ddp-timeout 20 --rewards mine:left').split()

@pytest.fixture
def start(tmp_path, mini):
    "A function that starts `g2rpo train` in two processes, in a folder with the rewards above."
    (tmp_path/'mine.py').write_text(REWARDS)
    command = '-m torch.distributed.run --standalone --nproc_per_node=2 -m g2rpo.cli train'.split()
    return lambda out, *flags: launch(*command, '--model', mini, *FLAGS, '--out', out, *flags, cwd=tmp_path)

def wait_for(run, out, n, seconds=120):
    "Until the run has `n` rows of metrics."
    until = time.time() + seconds
    while time.time() < until and run.poll() is None and count_lines(out/'metrics.jsonl') < n:
        time.sleep(.05)
    assert run.poll() is None, run.communicate()[0]
    assert count_lines(out/'metrics.jsonl') >= n

def without_seconds(out): return [{k: v for k, v in row.items() if k != 'seconds'} for row in metrics(out)]

SPLIT = '--shard', 'yes', '--gather-once', 'yes'      # checkpoints are written by both, behind the training

@pytest.mark.slow
@pytest.mark.parametrize('flags', [(), SPLIT], ids=['whole', 'split'])
def test_two_processes_killed_and_gone_on_with(start, tmp_path, flags):
    """Both, one after another, at moments drawn at random: the run is the one that was not killed, to the last bit.

    Its reward draws random numbers."""
    length = ('--iterations', 60, '--rewards', 'mine:tossed', *flags)
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    finished(start(whole, *length))
    draw = random.Random(0)
    for n in (1, 5, 10, 15, 20, 25, 30, 36, 42, 48):       # iterations after which it is killed, at the earliest
        run = start(killed, *length, '--resume')
        try:
            wait_for(run, killed, n)
            time.sleep(draw.uniform(0, .5))
        finally:
            end(run)
    finished(start(killed, *length, '--resume'))
    assert_same_checkpoint(whole, killed)
    assert without_seconds(whole) == without_seconds(killed)

def test_sigterm_saves_and_says_how_to_go_on(start, tmp_path):
    out = tmp_path/'run'
    run = start(out, '--iterations', 1000)
    try:
        wait_for(run, out, 2)
        os.killpg(run.pid, signal.SIGTERM)
        printed = run.communicate(timeout=90)[0]
    finally:
        end(run)
    assert 'Stopped by SIGTERM after' in printed and '--resume' in printed
    assert f'File "{TESTS.parent/"g2rpo"}' not in printed       # no traceback of ours, whatever the launcher's
    assert (out/'checkpoints'/f'{len(metrics(out)):06d}'/'manifest.json').exists()

FAULTS = [('mine:one_fails', 'the judge is gone (process 1)'), ('mine:one_hangs', 'ddp_timeout=20'),
          ('killed', 'waited for another one')]

@pytest.mark.slow
@pytest.mark.parametrize('fault, reason', FAULTS)
def test_a_process_that_fails_hangs_or_dies_ends_all_with_the_reason(start, tmp_path, fault, reason):
    out, now, reward = tmp_path/'run', tmp_path/'now', ['--rewards', fault] if fault != 'killed' else []
    run = start(out, *reward, '--iterations', 1000)
    try:
        wait_for(run, out, 2)
        began = time.time()
        if fault == 'killed':
            os.kill(children(run.pid)[-1], signal.SIGKILL)
        else:
            now.write_text('')
        printed = run.communicate(timeout=100)[0]
    finally:
        end(run)
    assert run.returncode != 0 and time.time() - began < 90
    assert reason in printed, printed[-3000:]
    now.unlink(missing_ok=True)
    done = len(metrics(out))
    finished(start(out, '--resume', *reward, '--iterations', done + 1, '--override', f'iterations={done + 1}'))
    assert len(metrics(out)) == done + 1
