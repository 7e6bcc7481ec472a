"One iteration: the first ratio, what an update changes, and what leaves it alone."
import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from g2rpo import METHODS, train
from g2rpo.core import steps
from g2rpo.core.rollout import Rollout, rollout
from g2rpo.core.velocity import Ledger
from g2rpo.errors import InputError, RunStopped
from g2rpo.models.loading import load_policy
from g2rpo.training import gradient
from g2rpo.study.toy import replicated, toy_base, toy_prompts, ToyPolicy
from g2rpo.training.config import Config, open_policy
from g2rpo.training.gradient import ratio_tolerance, TrainState
from g2rpo.training.update import score_rollout, update_average, update_policy
from helpers import PROMPTS, left_of_right, row, small

def parameters(policy): return dict(policy.pipe.transformer.named_parameters())

def under_lora(name): return name.replace('.weight', '.base_layer.weight').replace('.bias', '.base_layer.bias')

@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('update', ['per_step', 'accumulate'])
@pytest.mark.parametrize('rank', [0, 4])
def test_first_ratio_is_one_and_weights_move(mini, policy, tmp_path, precision, update, rank):
    before = {n: p.detach().clone() for n, p in parameters(policy).items()}
    method = row('g2rpo', granularities=(1, 2), update=update)
    cfg = small(mini, precision=precision, lora_rank=rank, method=method, grad_batch_size=1)
    metrics, = train(cfg, left_of_right, PROMPTS, tmp_path/'run', policy=policy).metrics
    assert metrics['ratio_spread'][0] == 0. and metrics['ratio'][0] == 1.
    assert len(metrics['grad_norm']) == (2 if update == 'per_step' else 1)
    after = parameters(policy)
    same = [torch.equal(p, after[n if n in after else under_lora(n)]) for n, p in before.items()]
    assert all(same) if rank else not any(same[:4])
    assert json.loads((tmp_path/'run'/'metrics.jsonl').read_text()) == metrics
    assert (tmp_path/'run'/'weights').is_dir()

@pytest.mark.parametrize('name', METHODS)
def test_every_row_trains_from_a_ratio_of_one(mini, policy, name):
    "Batches of three split members, steps and prompts unevenly; the trainer stops if any first ratio is off by a bit."
    method = row(name)
    cfg = small(mini, iterations=2, T=6, group_size=4, method=method, grad_batch_size=3)
    log = train(cfg, left_of_right, PROMPTS, policy=policy).metrics
    for got in log:
        assert len(got['grad_norm']) == (len(got['steps']) if method.update == 'per_step' else method.updates)
        assert all(norm > 0 for norm in got['grad_norm']) and ('kl' in got) == bool(method.kl)
    if method.kl:
        assert log[0]['kl'][0] < log[1]['kl'][0]

NEEDS_COMPILER = pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')),
                                    reason='torch.compile needs a C++ compiler on a CPU')

@pytest.mark.slow
@NEEDS_COMPILER
def test_compiled_completions_leave_the_first_ratio_at_one(mini, policy):
    "Completions go through compiled blocks and round otherwise; noisy steps and gradients stay eager."
    from torch._dynamo.utils import counters
    cfg = small(mini, compiled=True)
    compiled = open_policy(cfg)
    args = cfg.method, PROMPTS[:2], cfg.T, cfg.group_size, cfg.seed, 0, cfg.batch_size, cfg.grad_batch_size
    eager, fast = rollout(policy, *args), rollout(compiled, *args)
    assert counters['stats']['unique_graphs'] >= 2
    assert torch.equal(fast.y, eager.y) and torch.equal(fast.old_log_prob, eager.old_log_prob)
    for lam, x0 in fast.x0.items():
        torch.testing.assert_close(x0, eager.x0[lam], rtol=0, atol=1e-4)
    metrics, = train(cfg, left_of_right, PROMPTS, policy=compiled).metrics
    assert metrics['ratio_spread'][0] == 0. and metrics['ratio'][0] == 1.

def nudge(policy, by, monkeypatch):
    "Let the policy compute a little otherwise where there is a gradient, as a kernel of its own would."
    plain = type(policy).predict
    def predict(self, x, sigma, cond):
        v = plain(self, x, sigma, cond)
        return v*(1 + by) if torch.is_grad_enabled() else v
    monkeypatch.setattr(type(policy), 'predict', predict)

def test_a_ratio_that_is_not_one_stops_the_run(mini, policy, monkeypatch):
    nudge(policy, 1e-3, monkeypatch)
    with pytest.raises(RunStopped, match='off by .*, not 1: .* Suspect matrix products or normalisation'):
        train(small(mini), left_of_right, PROMPTS, policy=policy)

def test_an_accelerator_may_round(mini, policy, monkeypatch):
    "A tenth of the clip range is allowed where kernels are chosen by whether there is a gradient, with a warning."
    assert ratio_tolerance(small(mini), torch.device('cpu')) == 0.
    assert ratio_tolerance(small(mini), torch.device('cuda')) == pytest.approx(1e-5)
    monkeypatch.setattr(gradient, 'ratio_tolerance', lambda cfg, device: 1e-5)
    nudge(policy, 1e-6, monkeypatch)
    with pytest.warns(UserWarning, match='ratio before the first update is off by'):
        train(small(mini), left_of_right, PROMPTS, policy=policy)

def test_attention_is_suspected_where_it_is_to_blame(mini, policy, monkeypatch):
    "Attention that rounds otherwise with a gradient, unless it is the plain one."
    attend = torch.nn.functional.scaled_dot_product_attention
    def chosen(*args, **options):
        fused = torch.backends.cuda.flash_sdp_enabled() and torch.is_grad_enabled()
        return attend(*args, **options)*(1.001 if fused else 1.)
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', chosen)
    with pytest.raises(RunStopped, match="Suspect attention; try attention='_native_math'"):
        train(small(mini), left_of_right, PROMPTS, policy=policy)

def test_the_embedded_model_in_bf16():
    "As the demo trains it: all weights, bf16 autocast."
    cfg = small('tiny', precision='bf16', T=4)
    metrics, = train(cfg, left_of_right, PROMPTS).metrics
    assert metrics['ratio_spread'][0] == 0. and all(norm > 0 for norm in metrics['grad_norm'])

def test_the_first_ratio_is_that_before_the_first_step(mini, policy):
    "Of an iteration with several optimiser steps, whose later ratios are not 1."
    log = train(small(mini, method=row('mix_grpo', window=None, steps=(0, 1), updates=3)), left_of_right, PROMPTS,
                policy=policy).metrics
    assert log[0]['first_ratio'] == 0. and log[0]['ratio_spread'][0] > 0.

def test_later_ratios_differ_with_per_step(mini, policy):
    metrics, = train(small(mini, lr=1e-3), left_of_right, PROMPTS, policy=policy).metrics
    assert metrics['ratio_spread'][0] == 0. and metrics['ratio_spread'][1] > 0.

@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_what_the_scripts_round_is_rounded_on_both_sides(mini, policy, precision):
    "Truncated times and bf16 states: the first ratio is 1 to the last bit, and the numbers are others."
    def first(**changes):
        cfg = small(mini, precision=precision, method=row('g2rpo', granularities=(1, 2), **changes))
        return train(cfg, left_of_right, PROMPTS, policy=policy).metrics[0]
    rounded = first(truncate_time=True, bf16_anchor=True)
    assert rounded['ratio_spread'][0] == 0. and rounded['loss'] != first()['loss']

def test_guidance_trains_and_costs_twice(mini):
    def first(scale):
        policy = load_policy(str(mini), 24, 48, 16, guidance_scale=scale)
        return train(small(mini, guidance_scale=scale), left_of_right, PROMPTS, policy=policy).metrics[0]
    one, two = first(1.), first(2.)
    for key in ('forwards', 'grad_forwards'):
        assert two[key] == 2*one[key]
    with pytest.raises(InputError, match='guidance_scale=2.0'):
        train(small(mini, guidance_scale=2.), left_of_right, PROMPTS, policy=load_policy(str(mini), 24, 48, 16))

@pytest.mark.parametrize('rank,kl', [(0, 'exact'), (4, 'exact'), (4, 'velocity')])
def test_kl_holds_the_policy_back(mini, rank, kl):
    def distance(beta):
        method = row('g2rpo', granularities=(1, 2), kl=kl, beta=beta)
        log = train(small(mini, iterations=4, method=method, lora_rank=rank, lr=1e-3), left_of_right, PROMPTS).metrics
        assert log[0]['kl'][0] == pytest.approx(0, abs=1e-8)
        return sum(log[-1]['kl'])
    assert distance(100.) < distance(1e-12)/2

def test_ema_is_kept(mini, policy, tmp_path):
    "The weights that are kept lie between the base and those of optimiser step 7, where Flow-GRPO averages first."
    from diffusers import FluxTransformer2DModel
    base, last = {n: p.detach().clone() for n, p in parameters(policy).items()}, {}
    def keep(metrics): last.update({n: p.detach().clone() for n, p in parameters(policy).items()})
    cfg = small(mini, iterations=7, method=row('g2rpo_accumulate', granularities=(1, 2), ema=.9))
    train(cfg, left_of_right, PROMPTS, tmp_path/'run', policy=policy, on_iteration=keep)
    kept = dict(FluxTransformer2DModel.from_pretrained(tmp_path/'run'/'weights').named_parameters())
    for name in list(base)[:6]:      # decay 8/17, twice
        torch.testing.assert_close(kept[name], base[name] + (1 - (8/17)**2)*(last[name] - base[name]))

def flow_grpo_average(steps, decay=.9, batches=4, accumulate=2):
    "Flow-GRPO's loop (train_sd3.py and ema.py@ac4c86e) where each optimiser step moves a weight by 1."
    weight = average = 0.
    step = batch = 0
    while step < steps:
        batch += 1
        if batch % accumulate == 0:
            weight, step = weight + 1, step + 1
        if step < steps and (step + 1) % 8 == 0:
            average += (1 - min((1 + step)/(10 + step), decay))*(weight - average)
    return average

def test_the_average_lags_as_in_flow_grpo():
    "Under a drift of one unit a step; averaging once an eligible step instead of twice would lag far more."
    from types import SimpleNamespace
    from diffusers.training_utils import EMAModel
    lags = {}
    for repeats in (1, 2):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        state = SimpleNamespace(ema=EMAModel([weight], decay=.9), params=[weight], steps=0,
                                cfg=SimpleNamespace(method=row('flow_grpo', ema_repeats=repeats)))
        for state.steps in range(1, 101):
            weight.data += 1
            update_average(state)
        lags[repeats] = 1 - state.ema.shadow_params[0].item()/100
    assert lags[2] == pytest.approx(1 - flow_grpo_average(100)/100, abs=1e-12)
    assert lags[2] == pytest.approx(.32, abs=.005) and lags[1] == pytest.approx(.49, abs=.005)

def prepared(mini, policy, optimizer, **changes):
    "Config, state and a rollout, for calling `update_policy` alone."
    from accelerate import Accelerator
    cfg, params = small(mini, **changes), list(policy.pipe.transformer.requires_grad_(True).parameters())
    state = TrainState(cfg, params, optimizer(params), Accelerator(cpu=True))
    return state, lambda: rollout(policy, cfg.method, PROMPTS[:2], cfg.T, cfg.group_size)

def test_masked_groups_leave_the_mean(mini, policy):
    "With one of two groups constant, the masked gradient is twice the unmasked one."
    norms = []
    for mask in (False, True):
        method = row('g2rpo', granularities=(1, 2), update='accumulate', mask_constant=mask)
        state, roll = prepared(mini, policy, lambda p: torch.optim.SGD(p, lr=1e-20), max_grad_norm=1e9, method=method)
        advantage = torch.zeros(2, 2, 3)
        advantage[:, 0] = torch.tensor([1., -2., 1.])
        with pytest.raises(RunStopped) as stop:
            update_policy(policy, state, roll(), advantage, Ledger())
        norms.append(float(str(stop.value).split('gradient norm ')[1].split(')')[0]))
    assert norms[1] == pytest.approx(2*norms[0], rel=1e-2)

def test_silent_step_is_skipped_and_a_silent_iteration_stops(mini, policy):
    "Groups that are constant at one step only: no optimiser step there, and no false alarm."
    state, roll = prepared(mini, policy, lambda p: torch.optim.AdamW(p, lr=1e-4))
    advantage = torch.zeros(2, 2, 3)
    advantage[1, 0] = torch.tensor([1., -1., 0.])
    norms = update_policy(policy, state, roll(), advantage, Ledger())['grad_norm']
    assert norms[0] == 0. and norms[1] > 0.
    with pytest.raises(RunStopped, match='no gradient'):
        update_policy(policy, state, roll(), torch.zeros(2, 2, 3), Ledger())

class LatentsAsImages:
    "Decoding that shows the latent itself."
    def decode(self, x): return x[:, None].expand(-1, 3, -1, -1)

def test_scores_belong_to_their_prompt_and_direction():
    "A latent says who it is, a reward reads that and its prompt: every entry of the table is where it should be."
    L, K, P, G = 2, 3, 4, 5
    who = torch.arange(L*K*P*G, dtype=torch.float32).reshape(L, K, P, G, 1, 1)
    def reward(images, prompts): return images[:, 0, 0, 0]*10 + torch.tensor(['abcd'.index(p) for p in prompts])
    roll = Rollout(list('abcd'), None, None, None, None, None, {1: who[0], 3: who[1]}, [], [])
    table = score_rollout(LatentsAsImages(), roll, dict(r=reward), 7, Ledger())['r']
    assert torch.equal(table, who[..., 0, 0]*10 + torch.arange(P)[:, None])

def test_a_step_on_which_no_member_trains(mini, policy):
    "Members of DanceGRPO draw their steps; with few of them a step may have none, and says so by a neutral number."
    method = row('dance_grpo', updates=1)
    cfg = small(mini, T=4, group_size=2, prompts_per_iteration=1, iterations=4, method=method)
    log = train(cfg, left_of_right, PROMPTS, policy=policy).metrics
    assert len(log) == 4 and any(0. in entry['loss'] for entry in log)

def test_groups_that_prefer_already_weigh_less():
    "DGPO's loss by autograd over whole groups, as its formula has it, gives the gradient of an update."
    method = replace(METHODS['dgpo'], preference=40., beta=1e-9)
    cfg = Config(method=method, height=1, width=1, precision='no', T=6, group_size=4, prompts_per_iteration=4,
                 iterations=1, max_grad_norm=1e9)
    policy, before = ToyPolicy(replicated(toy_base(), 1)), ToyPolicy(replicated(toy_base(), 1))
    with torch.no_grad():
        for n, w in enumerate(policy.transformer.parameters()):       # a policy that has moved
            w.add_(.1*torch.randn(w.shape, generator=torch.Generator().manual_seed(n)))
    prompts, params = toy_prompts(1), list(policy.transformer.requires_grad_(True).parameters())
    roll = rollout(policy, method, prompts, 6, 4)
    advantage = torch.randn(4, 4, generator=torch.Generator().manual_seed(9)).expand(3, 4, 4)     # one reward an image
    state = TrainState(
        cfg, params, torch.optim.SGD(params, lr=1.), Accelerator(cpu=True), reference=before.velocity)
    start = [p.detach().clone() for p in params]
    update_policy(policy, state, roll, advantage, Ledger())            # SGD with lr 1: the step is minus the gradient
    found = [was - p.detach() for was, p in zip(start, params)]
    with torch.no_grad():
        for p, was in zip(params, start):
            p.copy_(was)
    expected, weights, cond = 0., [], policy.encode(prompts).take(torch.arange(4).repeat_interleave(4))
    for j, k in enumerate(roll.steps):
        x, u, s = roll.x[j].flatten(0, 1), roll.y[j].flatten(0, 1), roll.plan.grid[k].expand(16)
        now, then = (((p.velocity(x, s, cond) - u)**2).mean((1, 2)).view(4, 4) for p in (policy, before))
        weight = torch.sigmoid((advantage[j]*40.*(now - then)).sum(1)/4).detach()
        weights += weight.tolist()
        expected = expected + (weight[:, None]*advantage[j]*now).sum()/(3*16)
    assert max(weights) - min(weights) > .05
    for ours, grad in zip(found, torch.autograd.grad(expected, params)):
        torch.testing.assert_close(ours, grad, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('name', ['awm', 'v_grpo'])
def test_a_ratio_that_is_one_anyway_takes_no_pass(mini, policy, monkeypatch, name):
    "With one optimiser step the update tells the old log-probability itself: the same weights for fewer passes."
    start, cfg = copy.deepcopy(policy.pipe.transformer.state_dict()), small(mini, T=6, group_size=4, method=row(name))
    def trained():
        policy.pipe.transformer.load_state_dict(start)
        log = train(cfg, left_of_right, PROMPTS, policy=policy).metrics
        return {n: p.detach().clone() for n, p in parameters(policy).items()}, log[-1]
    weights, spent = trained()
    for module in (gradient, steps):
        monkeypatch.setattr(module, 'asks_old', lambda method: True)
    asked, more = trained()
    assert all(torch.equal(weights[n], asked[n]) for n in asked)
    assert not all(torch.equal(start[n], asked[n]) for n in asked)
    passes = more['forwards'] - spent['forwards']
    assert passes == more['grad_forwards'] and spent['grad_forwards'] == passes
