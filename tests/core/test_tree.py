"Trees: one that splits once is a chain, and a shared step is trained once."
import torch
from dataclasses import replace
import pytest
from g2rpo.core.advantage import compute_advantages
from g2rpo.core.loss import transition_weights
from g2rpo.core.method import Method
from g2rpo.core.rollout import rollout
from g2rpo.core.rows import METHODS
from g2rpo.core.schedule import shift_grid
from g2rpo.core.velocity import Ledger
from g2rpo.core.window import Window
from g2rpo.errors import InputError
from g2rpo.study.toy import replicated, toy_base, toy_prompts, ToyConfig, ToyPolicy, train_toy

TREE = replace(METHODS['branch_grpo'], updates=1)

def test_a_tree_that_splits_once_trains_as_a_chain_from_one_start():
    chain = replace(METHODS['dance_grpo'], timestep_fraction=1., updates=1, clip_range=TREE.clip_range)
    toy = ToyConfig(T=6, replicas=2, iterations=3, lr=1e-3)
    once = replace(TREE, widths=(0,))
    weights = [torch.cat([w.flatten() for w in train_toy(m, toy).parameters()]) for m in (chain, once)]
    start = torch.cat([w.detach().flatten() for w in replicated(toy_base(), 2).parameters()])
    assert (weights[0] - start).abs().max() > 1e-4                      # they moved
    assert (weights[0] - weights[1]).abs().max() < 1e-5

def test_a_level_without_a_split_has_the_credit_of_the_one_before():
    method = replace(TREE, widths=(2, 1, 3), steps=(0, 1, 2, 3))
    rewards = torch.rand(1, 1, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second, third, fourth = compute_advantages(method, method.plan(shift_grid(8)), dict(r=rewards))
    assert torch.equal(first, second) and torch.equal(third, fourth)
    nodes = rewards[0, 0].unflatten(-1, (2, 3)).mean(-1)                # (P, 2)
    expected = (nodes - nodes.mean(-1, keepdim=True))/(nodes.std(-1, keepdim=True) + 1e-8)
    assert torch.allclose(first[:, ::3], expected)

@pytest.mark.parametrize('pruned', [(), (0,), (2, 3)])
def test_a_pruned_level_costs_no_gradient_and_changes_no_picture(pruned):
    policy, ledger = ToyPolicy(replicated(toy_base(), 1)), Ledger()
    method = replace(TREE, widths=(2, 1, 3), steps=(0, 1, 2, 3))
    whole = rollout(policy, method, toy_prompts(1), 8, 6)
    roll = rollout(policy, replace(method, pruned=pruned), toy_prompts(1), 8, 6, ledger=ledger)
    kept = [k for k in range(4) if k not in pruned]
    assert roll.steps == tuple(kept)
    assert torch.allclose(roll.x0[1], whole.x0[1], atol=1e-6) and torch.allclose(roll.y, whole.y[kept], atol=1e-6)
    trained = sum(len(rows) for step in roll.updates for _, rows in step)
    assert trained == 4*sum([1, 2, 2, 6][k] for k in kept)
    assert ledger.forwards == 4*((1 + 2 + 2 + 6) + 6*4)                 # four prompts; six leaves with four steps left

@pytest.mark.parametrize('changes,word', [
    (dict(widths=(2, 2)), 'this one has 4'), (dict(widths=(0, 2), pruned=(7,)), 'there are 7'),
    (dict(widths=(0, 2), pruned=tuple(range(7))), 'nobody')])
def test_what_does_not_fit_a_group_is_refused(changes, word):
    with pytest.raises(InputError, match=word):
        replace(TREE, **changes).check(8, 6)

@pytest.mark.parametrize('name,changes,word', [
    ('mix_grpo', dict(pruned=(0,)), 'nobody would train in an iteration of 1 noisy step'),
    ('tmpo', dict(window=Window(3), updates=2), 'there are 1 a prompt'),
    ('branch_grpo', dict(pruned=tuple(range(1, 7)), updates=3), 'there are 1 a prompt')])
def test_what_comes_later_or_is_pruned_counts(name, changes, word):
    "A window that comes to its end has one step, and an optimiser step needs a state of a level that is trained."
    with pytest.raises(InputError, match=word):
        replace(METHODS[name], **changes).check(8, 12)

def test_nodes_worth_the_same_have_no_advantage():
    "Means of the same rewards in another order may differ by a bit."
    method, many = replace(TREE, widths=(2, 8), steps=(0, 1)), 2000
    rewards = torch.randint(0, 6, (many, 16), generator=torch.Generator().manual_seed(0))
    found = compute_advantages(method, method.plan(shift_grid(8)), dict(r=(rewards/5)[None, None]))[0]
    same = rewards[:, :8].sum(1) == rewards[:, 8:].sum(1)
    assert same.sum() > 50 and not found[same].any() and found[~same].abs().amin() > .7

@pytest.mark.parametrize('changes,word', [
    (dict(widths=(2, 0)), 'widths'), (dict(shuffle=True, updates=2), 'share'), (dict(timestep_fraction=.5), 'share'),
    (dict(normalise='joint'), 'numbers of nodes'), (dict(last_noisy=True), 'ODE'), (dict(trim=.5), 'two nodes')])
def test_what_a_tree_cannot_have_is_refused(changes, word):
    with pytest.raises(InputError, match=word):
        replace(TREE, **changes)

def test_a_leaf_is_of_trees():
    with pytest.raises(InputError, match='leaves'):
        Method('m', normalise='leaf')

TMPO = replace(METHODS['tmpo'], window=None, steps=(0, 1, 2), widths=(2, 1, 3), boltzmann=1.5, adv_clip=99.)

def some_paths():
    "Rewards (1, 1, P, G) and log-probabilities (K, P, G) of two groups of six; neighbours share the first two steps."
    draw = torch.Generator().manual_seed(0)
    rewards = torch.rand(1, 1, 2, 6, generator=draw, dtype=torch.float64)
    nodes = torch.randn(3, 2, 6, generator=draw, dtype=torch.float64)
    nodes[:2] = nodes[:2, :, ::3].repeat_interleave(3, -1)
    return rewards, nodes

def test_the_gradient_of_matched_paths_is_that_of_the_released_loss():
    "mean over paths of -A ratio, A = log softmax(βR) - log softmax(log p) (softmax_tb.py, total_loss.py@af2fa6c)."
    rewards, log_prob = some_paths()
    r = rewards[0, 0]
    R = (r - r.mean(-1, keepdim=True))/(r.std(-1, correction=0, keepdim=True) + 1e-4)
    old = log_prob.sum(0)
    A = torch.log(torch.softmax(1.5*R, -1)) - torch.log(torch.softmax(old, -1))
    now = [log_prob[j, :, ::n].clone().requires_grad_() for j, n in enumerate((3, 3, 1))]       # one number a node
    path = sum(t.repeat_interleave(6//t.shape[1], -1) for t in now)
    theirs = torch.autograd.grad(-(A*(path - old).exp()).mean(), now)
    advantage = compute_advantages(TMPO, TMPO.plan(shift_grid(8)), dict(r=rewards), log_prob=log_prob)
    counts = transition_weights(TMPO, advantage, [2, 2, 6])
    total, loss = sum(counts[j, :, ::n].sum() for j, n in enumerate((3, 3, 1))), 0.
    for j, (n, node) in enumerate(zip((3, 3, 1), now)):                 # here: a mean over all steps of all paths
        loss = loss - (counts*advantage)[j, :, ::n].mul((node - node.detach()).exp()).sum()/total
    for ours, grad in zip(torch.autograd.grad(loss, now), theirs):
        assert torch.allclose(3*ours, grad, atol=1e-12)

def test_paths_as_probable_as_they_should_be_teach_nothing():
    rewards, _ = some_paths()
    r = rewards[0, 0]
    R = (r - r.mean(-1, keepdim=True))/(r.std(-1, correction=0, keepdim=True) + 1e-4)
    chain = replace(METHODS['dance_grpo'], timestep_fraction=1., boltzmann=1.5, ddof=0, eps=1e-4)
    plan = chain.plan(shift_grid(8))
    log_prob = (1.5*R/len(plan.trained)).expand(len(plan.trained), -1, -1)
    assert compute_advantages(chain, plan, dict(r=rewards), log_prob=log_prob).abs().max() < 1e-12

@pytest.mark.parametrize('changes,word', [
    (dict(normalise='leaf'), 'share a distribution'), (dict(explore='chain', widths=(), credit='gain'), 'one reward'),
    (dict(explore='single', widths=(), credit='branch'), 'whole paths'), (dict(pruned=(1,)), 'all its steps')])
def test_what_paths_cannot_have_is_refused(changes, word):
    with pytest.raises(InputError, match=word):
        replace(TMPO, **changes)
