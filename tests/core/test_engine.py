"The engine against the plain loops: every row on a formula, one on a real pipeline."
from dataclasses import replace

import pytest
import torch
from g2rpo import METHODS
from g2rpo.core.naive import naive_rollout
from g2rpo.core.rollout import rollout
from g2rpo.core.schedule import shift_grid
from g2rpo.core.velocity import Ledger
from g2rpo.models.policy import Condition
from helpers import PROMPTS, row

class Formula:
    "A smooth velocity of state, time and prompt that counts the samples it is asked for."
    latent_shape, device, passes = (3, 2), 'cpu', 1
    def __init__(self): self.calls = 0
    def grid(self, T): return shift_grid(T)
    def encode(self, prompts):
        return Condition(torch.tensor([[[float(len(p))]] for p in prompts]), torch.zeros(len(prompts), 1))
    def velocity(self, x, sigma, cond):
        self.calls += len(x)
        s = sigma.to(x)[:, None, None]
        return torch.sin(1.7*x + s + .1*cond.embeds) - .5*x*s

ROUNDED = dict(truncate_time=True, bf16_anchor=True)
CASES = {name: row(name) for name in METHODS} | dict(
    rounded=replace(METHODS['g2rpo'], **ROUNDED), spans=replace(METHODS['e_grpo_script'], **ROUNDED),
    told=replace(METHODS['dance_grpo'], truncate_time=True), ddim=replace(METHODS['g2rpo'], form='ddim'))

@pytest.mark.parametrize('name', CASES)
def test_every_row_equals_the_naive_loop(name):
    "Transitions and endpoints agree, the ledger counts what the policy was asked, and never more than the loops ask."
    runs = {}
    for run in (naive_rollout, rollout):
        policy, ledger = Formula(), Ledger()
        runs[run] = run(policy, CASES[name], ['one', 'three'], 10, 4, seed=1, iteration=60, ledger=ledger), policy.calls
        assert policy.calls == ledger.forwards
    (slow, most), (fast, least) = runs[naive_rollout], runs[rollout]
    assert least <= most
    for part in ('x', 'y', 'old_log_prob', 'mean'):
        torch.testing.assert_close(getattr(fast, part), getattr(slow, part), rtol=0, atol=1e-5)
    assert list(fast.x0) == list(slow.x0)
    for lam in fast.x0:
        torch.testing.assert_close(fast.x0[lam], slow.x0[lam], rtol=0, atol=1e-5)

def test_engine_equals_naive_loop_on_the_pipeline(policy):
    method, two = METHODS['g2rpo'], PROMPTS[:2]
    slow, fast = naive_rollout(policy, method, two, 6, 2), rollout(policy, method, two, 6, 2, batch_size=7)
    torch.testing.assert_close(fast.old_log_prob, slow.old_log_prob, rtol=0, atol=1e-4)
    for lam in method.granularities:
        torch.testing.assert_close(fast.x0[lam], slow.x0[lam], rtol=0, atol=1e-3)
