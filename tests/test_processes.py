"Two real processes draw what one draws, and learn what one learns."
import os
import subprocess
import sys

import pytest
import torch

SCRIPT = '''
import sys, torch
from dataclasses import replace
from accelerate import PartialState
from g2rpo.method import METHODS
from g2rpo.policy import load_policy
from g2rpo.rollout import rollout
from g2rpo.config import tiny
from g2rpo.trainer import train
state, policy = PartialState(cpu=True), load_policy('tiny', 24, 48, 16)
words = [f'a sign that says "{i}" in red' for i in (123, 456, 789, 321)]
method = replace(METHODS['g2rpo'], granularities=(1, 2))
mine = words[state.process_index::state.num_processes]
roll = rollout(policy, method, mine, 4, 3, seed=5, iteration=2)
cfg = tiny(iterations=2, T=4, group=3, prompts_per_iteration=4, precision='no', method=method)
before = torch.cat([p.detach().flatten().clone() for p in policy.pipe.transformer.parameters()])
log = train(cfg, policy, dict(left=lambda i, p: i[..., 24:].mean((1, 2, 3))), words)
chain = load_policy('tiny', 24, 48, 16)
cfg = tiny(iterations=4, T=8, group=4, prompts_per_iteration=4, precision='no', method=METHODS['dance_grpo'], grad_batch=3)
dance = train(cfg, chain, dict(left=lambda i, p: i[..., 24:].mean((1, 2, 3))), words)
flow = train(replace(cfg, iterations=2, method=METHODS['flow_grpo'], T=4), load_policy('tiny', 24, 48, 16), dict(left=lambda i, p: i[..., 24:].mean((1, 2, 3))), words)
torch.save(dict(dance=[n for row in dance for n in row['grad_norm']], dance_weight=next(chain.pipe.transformer.parameters()).detach(), spent=[row['equivalents'] for row in dance],
    flow=[n for row in flow for n in row['grad_norm']], prompts=mine, x=roll.x, y=roll.y, x0=roll.x0, moved=torch.cat([p.detach().flatten() for p in policy.pipe.transformer.parameters()]) - before, norms=[n for row in log for n in row['grad_norm']]), f'{sys.argv[1]}/{state.num_processes}-{state.process_index}.pt')
'''

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    (folder/'script.py').write_text(SCRIPT)
    env = os.environ | {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'ACCELERATE_USE_CPU': 'true'}
    subprocess.run([sys.executable, str(folder/'script.py'), str(folder)], check=True, env=env, timeout=300)
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(folder/'script.py'), str(folder)],
                   check=True, env=env, timeout=300)
    return [torch.load(folder/f'{name}.pt', weights_only=True) for name in ('1-0', '2-0', '2-1')]

def test_same_directions(results):
    one, *two = results
    for rank, part in enumerate(two):
        assert part['prompts'] == one['prompts'][rank::2]
        torch.testing.assert_close(part['y'], one['y'][:, rank::2], rtol=0, atol=1e-5)
        for lam in part['x0']: torch.testing.assert_close(part['x0'][lam], one['x0'][lam][:, rank::2], rtol=0, atol=1e-4)

def test_same_noise_to_the_bit():
    from g2rpo.rollout import directions
    whole = directions((72, 32), 5, 2, ['a', 'b', 'c', 'd'], 1, 3)
    for rank in (0, 1): assert torch.equal(directions((72, 32), 5, 2, ['a', 'b', 'c', 'd'][rank::2], 1, 3), whole[rank::2])

def test_same_update(results):
    "The gradient is that of the whole batch, and the weights go the same way. AdamW's first steps turn rounding of tiny gradients into full steps, so not to the last digit."
    one, *two = results
    assert torch.equal(two[0]['moved'], two[1]['moved']) and one['moved'].abs().max() > 1e-4
    assert torch.nn.functional.cosine_similarity(two[0]['moved'], one['moved'], dim=0) > .99
    assert two[0]['norms'][0] == pytest.approx(one['norms'][0], rel=1e-4)
    assert two[0]['norms'] == pytest.approx(one['norms'], rel=2e-2)

def test_chains_with_different_batches_on_each_process(results):
    "DanceGRPO's members draw their steps, so processes have different numbers of batches; Flow-GRPO's std is over all of them."
    one, *two = results
    assert torch.equal(two[0]['dance_weight'], two[1]['dance_weight'])
    for name in ('dance', 'flow'):
        assert two[0][name] == two[1][name] and two[0][name][0] == pytest.approx(one[name][0], rel=1e-4)
        assert two[0][name] == pytest.approx(one[name], rel=5e-2)
    assert two[0]['spent'] == one['spent']     # counted over all processes
