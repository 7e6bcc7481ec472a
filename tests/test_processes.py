"One, two and four real processes draw the same, learn the same, and take up each other's runs."
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

LEFT = 'def left(images, prompts): return images[..., 24:].mean((1, 2, 3))\n'
SCRIPT = LEFT + '''
import sys, torch, warnings
from dataclasses import replace
from accelerate import PartialState
from g2rpo.training.config import open_policy
from g2rpo.training.presets import tiny
from g2rpo.core.rows import METHODS
from g2rpo.core.rollout import rollout
from g2rpo.training.trainer import train
warnings.filterwarnings('ignore')
state, out = PartialState(cpu=True), sys.argv[1]
words = [f'a sign that says "{i}" in red' for i in (123, 456, 789, 321)]
ROWS = dict(
    g2rpo=dict(method=replace(METHODS['g2rpo'], granularities=(1, 2)), T=4, group_size=3, batch_size=3, grad_batch_size=1),
    dance=dict(method=METHODS['dance_grpo'], T=6, group_size=4, grad_batch_size=3),
    flow=dict(method=METHODS['flow_grpo'], T=4, group_size=4, grad_batch_size=3),
    split=dict(method=replace(METHODS['g2rpo'], granularities=(1, 2)), T=4, group_size=3, shard=True, checkpointing=True),
    split_chain=dict(method=METHODS['dance_grpo'], T=6, group_size=4, grad_batch_size=1, shard=True))
name, rank, world = sys.argv[2], state.process_index, state.num_processes
cfg = tiny(iterations=3, prompts_per_iteration=4, precision='no', save_every=1, **ROWS[name])
policy = open_policy(cfg)
roll = rollout(policy, cfg.method, words[rank::world], cfg.T, cfg.group, 5, 2, cfg.batch, cfg.grad_batch)
torch.save(dict(x=roll.x, y=roll.y, x0=roll.x0), f'{out}/{name}-{world}-{rank}.pt')
train(cfg, policy, dict(left=left), words, f'{out}/{name}-{world}')
'''
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'ACCELERATE_USE_CPU': 'true', 'TQDM_DISABLE': '1'}

def launch(world, *args, **options):
    command = [sys.executable] if world == 1 else [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}']
    return subprocess.Popen([*command, *map(str, args)], env=ENV, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)

def finished(run, seconds=300):
    try:
        said = run.communicate(timeout=seconds)[0]
    finally:
        end(run)
    assert run.returncode == 0, said
    return said

def end(run):
    "Kill the launcher and its workers, which are in sessions of their own."
    if run.poll() is not None:
        return
    workers = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True).stdout.split()
    os.killpg(run.pid, signal.SIGKILL)
    for pid in workers:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass
    run.wait()

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    (folder/'script.py').write_text(SCRIPT)
    for world, names in ((1, ('g2rpo', 'dance', 'flow', 'split', 'split_chain')), (2, ('g2rpo', 'dance', 'flow', 'split', 'split_chain')), (4, ('g2rpo',))):
        for name in names:
            finished(launch(world, folder/'script.py', folder, name))
    return folder

def test_split_weights_meet_in_equally_many_passes():
    "Members of DanceGRPO draw which steps they train on; with split weights every pass is one that all processes take part in."
    from g2rpo.training.presets import tiny
    from g2rpo.core.rows import METHODS
    from g2rpo.core.batches import add_remaining, optimiser_steps, used_steps
    cfg = tiny(method=METHODS['dance_grpo'], T=6, group_size=4, grad_batch_size=1, shard=True)
    words, counts = [f'prompt {i}' for i in range(8)], set()
    for iteration in range(5):
        for rank in range(4):
            mine = words[rank::4]
            updates = optimiser_steps(cfg.method, used_steps(cfg.method, 6, mine, 4, 0, iteration), cfg.grad_batch_size)
            walk = [len(add_remaining([rows for step in updates for n, rows in step if n == j], 8, cfg.grad_batch_size)) for j in range(6)]
            counts.add((tuple(walk), tuple(map(len, updates))))
    assert len(counts) == 1

def trained(out):
    from safetensors.torch import load_file
    return torch.cat([t.flatten() for file in sorted((out/'weights').glob('*.safetensors')) for _, t in sorted(load_file(file).items())])

def rows(out): return [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]

@pytest.mark.parametrize('world', [2, 4])
def test_the_same_rollout_to_the_last_bit(folder, world):
    "Passes hold one prompt here; batches of other sizes round differently, by 1e-6."
    load = lambda world, rank: torch.load(folder/f'g2rpo-{world}-{rank}.pt', weights_only=True)
    one = load(1, 0)
    for rank in range(world):
        part = load(world, rank)
        for name in ('x', 'y'):
            assert torch.equal(part[name], one[name][:, rank::world])
        for lam in one['x0']:
            assert torch.equal(part['x0'][lam], one['x0'][lam][:, rank::world])

@pytest.mark.parametrize('name, world', [('g2rpo', 2), ('g2rpo', 4), ('dance', 2), ('flow', 2), ('split', 2), ('split_chain', 2)])
def test_the_same_training(folder, name, world):
    "Gradients to rounding, rewards and costs over all processes, and weights that went the same way: AdamW makes full steps of the rounding of tiny gradients, so not all to the last digit, and from the third iteration on a ratio at the edge of the clip range may fall on either side of it."
    from g2rpo.models.loading import load_policy
    one, other = (rows(folder/f'{name}-{w}') for w in (1, world))
    assert one[0]['grad_norm'][0] == pytest.approx(other[0]['grad_norm'][0], rel=1e-5)
    for a, b in zip(one, other):
        assert a['nfe'] == b['nfe'] and (a['iteration'] > 1 or a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-2))
        for key in ('reward/left', 'group_std/left', 'advantage_by_step', 'ratio'):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6)
    base = load_policy('tiny', 24, 48, 16).pipe.transformer.state_dict()
    base = torch.cat([base[key].flatten() for key in sorted(base)])
    moved = [trained(folder/f'{name}-{w}') - base for w in (1, world)]
    assert (moved[0] - moved[1]).norm() < .05*moved[0].norm() and moved[0].abs().max() > 1e-4

@pytest.mark.parametrize('name, then, now', [('g2rpo', 2, 1), ('g2rpo', 1, 2), ('split', 2, 1), ('split', 1, 2)])
def test_taken_up_by_another_number_of_processes(folder, tmp_path, name, then, now):
    "The last iteration done again from the checkpoint of the one before, by others."
    import shutil
    out = tmp_path/'run'
    shutil.copytree(folder/f'{name}-{then}', out)
    script = tmp_path/'script.py'
    script.write_text(SCRIPT.replace("words, f'{out}/{name}-{world}')", "words, f'{out}/run', resume='2')"))
    finished(launch(now, script, tmp_path, name))
    wanted, found = rows(folder/f'{name}-{then}'), rows(out)
    assert len(found) == 3 and found[:2] == wanted[:2]
    assert found[2]['grad_norm'] == pytest.approx(wanted[2]['grad_norm'], rel=1e-4) and found[2]['nfe'] == wanted[2]['nfe']
    assert (trained(out) - trained(folder/f'{name}-{then}')).norm() < 1e-2*trained(out).norm()

def test_taken_up_by_four_processes_to_the_last_bit(folder, tmp_path):
    "With more than two, a sum depends on the order of its parts."
    import shutil
    out = tmp_path/'run'
    shutil.copytree(folder/'g2rpo-4', out)
    script = tmp_path/'script.py'
    script.write_text(SCRIPT.replace("words, f'{out}/{name}-{world}')", "words, f'{out}/run', resume='2')"))
    wanted = kept(out)
    finished(launch(4, script, tmp_path, 'g2rpo'))
    found = kept(out)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)
    assert [row['grad_norm'] for row in rows(out)] == [row['grad_norm'] for row in rows(folder/'g2rpo-4')]

COMMAND = ['-m', 'g2rpo.cli', 'train', '--T', '4', '--group-size', '3', '--prompts-per-iteration', '2', '--iterations', '8', '--save-every', '1', '--precision', 'no', '--granularities', '1,2', '--ddp-timeout', '20']

def train(world, out, folder, *more):
    (folder/'mine.py').write_text(LEFT + '''
import os, time
def one_fails(images, prompts):
    from g2rpo.errors import RunStopped
    if os.environ['RANK'] == '1' and os.path.exists('now'): raise RunStopped('the judge is gone')
    return left(images, prompts)
def one_hangs(images, prompts):
    if os.environ['RANK'] == '1' and os.path.exists('now'): time.sleep(1000)
    return left(images, prompts)
''')
    return launch(world, *COMMAND, '--out', out, '--rewards', 'mine:left', *more, cwd=folder)

def wait_for(run, out, n, seconds=120):
    "Until the run has `n` rows of metrics."
    until = time.time() + seconds
    while time.time() < until and run.poll() is None and not ((out/'metrics.jsonl').exists() and len((out/'metrics.jsonl').read_text().splitlines()) >= n):
        time.sleep(.05)
    assert run.poll() is None, run.communicate()[0]

def kept(out):
    from g2rpo.training import checkpoint
    from safetensors.torch import load_file
    return {k: v for file in checkpoint.latest_checkpoint(out/'checkpoints').glob('*.safetensors') for k, v in load_file(file).items()}

def test_two_processes_killed_and_taken_up(tmp_path):
    "Both, one after another, at moments drawn at random: the run is the one that was not killed, to the last bit."
    finished(train(2, tmp_path/'a', tmp_path))
    draw = random.Random(0)
    for n in (1, 3, 5):
        run = train(2, tmp_path, '--resume', policy=tmp_path/'b').metrics
        try:
            wait_for(run, tmp_path/'b', n)
            time.sleep(draw.uniform(0, 1.5))
        finally:
            end(run)
    finished(train(2, tmp_path, '--resume', policy=tmp_path/'b').metrics)
    one, other = kept(tmp_path/'a'), kept(tmp_path/'b')
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    strip = lambda out: [{k: v for k, v in row.items() if k != 'seconds'} for row in rows(out)]
    assert strip(tmp_path/'a') == strip(tmp_path/'b')

def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    run = train(2, tmp_path, '--iterations', '1000', policy=tmp_path/'a').metrics
    wait_for(run, tmp_path/'a', 2)
    os.killpg(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=90)[0]
    assert 'Stopped by SIGTERM after' in said and '--resume' in said and 'Traceback (most recent call last):\n  File "' + str(Path(__file__)) not in said
    done = len(rows(tmp_path/'a'))
    assert (tmp_path/'a'/'checkpoints'/f'{done:06d}'/'manifest.json').exists()

@pytest.mark.parametrize('fault, reason', [('mine:one_fails', 'the judge is gone (process 1)'), ('mine:one_hangs', 'ddp_timeout=20'), ('killed', 'waited for another one')])
def test_a_process_that_fails_hangs_or_dies_ends_all_with_the_reason(tmp_path, fault, reason):
    run = train(2, tmp_path, *(['--rewards', fault] if fault != 'killed' else []), '--iterations', policy=tmp_path/'a', on_iteration='1000').metrics
    try:
        wait_for(run, tmp_path/'a', 2)
        began = time.time()
        if fault == 'killed':
            children = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(children[-1]), signal.SIGKILL)
        else:
            (tmp_path/'now').write_text('')
        said = run.communicate(timeout=100)[0]
    finally:
        end(run)
    assert run.returncode != 0 and time.time() - began < 90
    assert reason in said, said[-3000:]
    (tmp_path/'now').unlink(missing_ok=True)
    done = len(rows(tmp_path/'a'))
    finished(train(2, tmp_path, '--resume', *(['--rewards', fault] if fault != 'killed' else []), policy=tmp_path/'a', on_iteration='--iterations').metrics)
    assert len(rows(tmp_path/'a')) == done + 1
