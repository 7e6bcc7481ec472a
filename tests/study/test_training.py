"A job's training: what is kept when it is killed, and what is looked at before it begins."
import os
import signal

import pytest
import torch
from g2rpo.errors import InputError
from g2rpo.study import training
from g2rpo.study.job import RunSpec
from g2rpo.study.run_job import run_job
from g2rpo.study.training import snapshot_file, train_to
from g2rpo.training import run as training_run
from g2rpo.training.evaluate import EvalConfig
from helpers import row, small
from safetensors.torch import load_file

LAST = 8    # optimiser steps after which a method that averages has an average

@pytest.fixture
def averaging(mini):
    "A training whose weights are averaged."
    return small(mini, method=row('flow_grpo', ema=.9), group_size=4, rewards=('saturation',), save_every=1)

def killed(work):
    "Do `work` in a child that is to end by SIGKILL."
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        try:
            work()
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.parametrize('module, name', [(training_run, 'release_policy'), (training, 'save_snapshot')])
def test_killed_before_its_average_is_kept(averaging, tmp_path, monkeypatch, module, name):
    """The last iteration is done and the average is not kept: nothing is there to be scored.

    Taken up again, it ends with the average of a training that was not killed, to the last bit."""
    torch.set_num_threads(1)
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    train_to(averaging, [LAST], whole)
    with monkeypatch.context() as patched:
        patched.setattr(module, name, die)
        killed(lambda: train_to(averaging, [LAST], cut))
    assert (cut/'metrics.jsonl').read_text().count('\n') == LAST and not snapshot_file(cut, LAST).exists()
    log = train_to(averaging, [LAST], cut)
    average, again = load_file(snapshot_file(whole, LAST)), load_file(snapshot_file(cut, LAST))
    assert len(log) == LAST and average.keys() == again.keys()
    assert all(torch.equal(average[key], again[key]) for key in average)

def test_the_average_is_what_is_kept(averaging, tmp_path):
    "It differs from the raw weights of the same training, which its checkpoint has."
    torch.set_num_threads(1)
    train_to(averaging, [LAST], tmp_path)
    kept, place = load_file(snapshot_file(tmp_path, LAST)), tmp_path/'checkpoints'/f'{LAST:06d}'
    saved = {key: value for file in place.glob('*.safetensors') for key, value in load_file(file).items()}
    assert all(torch.equal(kept[key], saved[f'average {key}']) for key in kept)
    assert any(not torch.equal(kept[key], saved[f'param {key}']) for key in kept)
    assert not (tmp_path/'weights').exists()

@pytest.mark.parametrize('where', ['protocol', 'others'])
def test_a_missing_judge_fails_before_the_training(mini, tmp_path, monkeypatch, where):
    monkeypatch.delenv('G2RPO_UNIFIED_REWARD', raising=False)
    has = EvalConfig(('a sign',), T=4, scorers=('saturation',))
    lacks = EvalConfig(('a sign',), T=6, scorers=('saturation', 'unified_reward'))
    first, others = (lacks, ()) if where == 'protocol' else (has, (lacks,))
    job = RunSpec('g2rpo', small(mini, rewards=('saturation',)), first, 0, 1, others=others)
    with pytest.raises(InputError, match='G2RPO_UNIFIED_REWARD'):
        run_job(job, tmp_path/'runs')
    assert not (tmp_path/'runs').exists()
