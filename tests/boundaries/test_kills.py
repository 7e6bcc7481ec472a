"Killed before or within any operation on any file, a run and a study's job end as if they had not been."
import json
import random
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from g2rpo import train
from g2rpo.study.job import RunSpec
from g2rpo.study.run_job import run_job
from g2rpo.training.evaluate import EvalConfig
from g2rpo.training.panel import Panel
from helpers import PROMPTS, left_of_right, row, small
from kills import Operations, in_child, moments, operations_of
from safetensors.torch import load_file

TIMED = ('seconds', 'sha256')    # what differs between two runs of the same; the hash is of the seconds, too
DRAWN = 12     # moments that are tried each time; all of them in the long tests

def tossed(images, prompts):
    "A reward that draws from every library's random state."
    return left_of_right(images, prompts) + .01*(torch.rand(len(images)) + random.random() + np.random.rand())

def watched_training(mini, folder):
    "Three iterations with a panel whose scorer draws random numbers, too; the oldest checkpoint is pruned."
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    cfg = small(mini, iterations=3, save_every=1, keep=2)
    panel = Panel(PROMPTS[:2], dict(r=tossed, l=left_of_right), ('r',), every=1, T=4)
    train(cfg, dict(r=tossed), PROMPTS, folder/'run', panel=panel, resume='latest')

def averaged_job(mini, folder):
    "A study's job: a training whose weights are averaged, kept at two places, scored at both."
    method = row('flow_grpo', ema=.9)
    cfg = small(mini, method=method, group_size=4, iterations=2, rewards=('saturation',), save_every=1)
    protocol = EvalConfig(tuple(PROMPTS[:2]), T=4, scorers=('saturation',), height=cfg.height, width=cfg.width)
    run_job(RunSpec('flow_grpo', cfg, protocol, 0, 2, probes=2), folder)

def untimed(value):
    if isinstance(value, dict):
        return {key: untimed(v) for key, v in value.items() if key not in TIMED}
    return [*map(untimed, value)] if isinstance(value, list) else value

def contents(folder):
    "Every file below a folder: what it holds, times apart."
    out = {}
    for file in sorted(f for f in folder.rglob('*') if f.is_file()):
        name, kind = str(file.relative_to(folder)), file.suffix
        if kind == '.safetensors':
            out[name] = {key: value.numpy().tobytes() for key, value in load_file(file).items()}
        elif file.name in ('state.json', 'manifest.json', 'speed.jsonl'):
            out[name] = 'there'                  # they hold times, or hashes of times
        elif kind in ('.json', '.jsonl'):
            out[name] = [untimed(json.loads(line)) for line in file.read_text().splitlines()] if kind == '.jsonl' else (
                untimed(json.loads(file.read_text())))
        else:
            out[name] = file.read_bytes()
    return out

def campaign(work, folder, pick):
    "Kill `work` at the moments that `pick` takes of all there are, take it up again, and compare; how many kills."
    whole = folder/'whole'
    whole.mkdir()
    done = operations_of(partial(work, whole), whole, folder/'operations.json')
    wanted, taken, out = contents(whole), pick(list(moments(done))), folder/'killed'
    for at, limit in taken:
        out.mkdir()
        killed = in_child(partial(work, out), Operations(out, at, limit))
        assert killed in (-signal.SIGKILL, -signal.SIGXFSZ), (at, limit, done[at], killed)
        assert in_child(partial(work, out)) == 0, (at, limit, done[at])
        found = contents(out)
        assert found.keys() == wanted.keys(), (at, limit, done[at], found.keys() ^ wanted.keys())
        for name in wanted:
            assert found[name] == wanted[name], (at, limit, done[at], name)
        shutil.rmtree(out)
    return len(taken)

WORK = dict(training=watched_training, job=averaged_job)

@pytest.mark.parametrize('name', WORK)
def test_killed_at_drawn_operations(mini, tmp_path, name):
    draw = random.Random(0)
    assert campaign(partial(WORK[name], mini), tmp_path, lambda every: draw.sample(every, DRAWN)) == DRAWN

@pytest.mark.slow
@pytest.mark.parametrize('name', WORK)
def test_killed_at_every_operation(mini, tmp_path, name):
    count = campaign(partial(WORK[name], mini), tmp_path, list)
    print(f'{name}: {count} kills')
    assert count >= 50
