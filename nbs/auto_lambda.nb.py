# %% [markdown]
# # Choosing Λ and the steps by measurement
#
# > Beyond the papers: G²RPO picks Λ = {1, 2, 3} and the first half of the grid by hand. Measure on the base model, before any training, how well each choice sees the true effect of a direction for what it costs, choose by that, and train against the hand-picked row.
#
# **The measurement.** At every step of the grid, directions of a group are completed on a grid four times finer than the training grid: their reward is what the direction is truly worth to the deterministic sampler, up to what four times more steps leave.
# $\rho_{\Lambda,k}$ is the correlation, within groups, of the advantage fused over Λ with that reward; $\sigma_k$ its spread within groups. A direction of unit advantage moves the true reward by $\rho_{\Lambda,k}\sigma_k$, so the signal of a step is $(\rho_{\Lambda,k}\sigma_k)^2$.
#
# **The rule, fixed before the runs.** For each Λ out of the subsets of {1, 2, 3}, keep the steps whose signal per forward equivalent is at least half of its best step's; choose the Λ whose kept steps have the most signal together per forward equivalent of an iteration.
#
# **Hypothesis, stated before the runs.** The cheapest completions see nearly as much as the full ones, so the choice is cheaper than {1, 2, 3}, and at equal cost it is at least as good.
#
# On `tiny` this reads what was measured and the collected runs, within a minute. Measuring takes about three minutes of two cores.

# %% tags=["parameters"]
preset: str = 'tiny'        # tiny; smoke (seconds, means nothing)
reward: str = ''            # what is trained on: hps (one text reader) or hps+clip (two); empty: hps
launcher: str = ''          # who runs what is missing: inline, accelerate, slurm; none: only what is there; empty: inline
workers: int = 0            # inline: runs at once, a thread each, 0: 2; accelerate: processes of a run, 0: one for each GPU
seeds: int = 0              # training seeds; 0: 5 on tiny, 1 as published
budget: int = 0             # forward equivalents of a run, tiny only; 0: 16,000
iterations: int = 0         # second comparison, tiny only; 0: at 10
eval_prompts: int = 0       # held-out prompts; 0: 100 on tiny, all as published
search_prompts: int = 0     # training prompts for the choice of learning rates, tiny only; 0: 100
folder: str = 'runs/study'  # one folder a training, shared by all notebooks; from the repository's root
results: str = 'paper_figures/results'  # collected runs, and the row of this notebook
dry_run: bool = False       # print the plan, rehearse it on random pipelines, run nothing else
measure_prompts: int = 0    # training prompts that are measured on; 0: 12 on tiny, 2 on smoke

# %%
from dataclasses import replace
import json
import torch
from itertools import combinations
from g2rpo.errors import InputError
from g2rpo.training.config import open_policy
from g2rpo.study.records import Claim
from g2rpo.study.tables import gain_table, round_floats
from g2rpo.study.job import repo_root
from g2rpo.study.reproduction import Reproduction
from g2rpo.core.rows import METHODS
from g2rpo.rewards.load import load_rewards
from g2rpo.rewards.protocol import call_reward
from g2rpo.core.rollout import rollout
from g2rpo.core.velocity import Ledger, batched_velocity
from g2rpo.core.sampler import ode_step
from g2rpo.plan.cost import nfe_per_iteration, training_grid
from g2rpo.models.tiny import sign_prompts
from g2rpo.training.update import score_rollout
repro = Reproduction(In, 'auto_lambda')
if repro.setting.published:
    raise InputError(f'preset={preset!r}: what is measured here is a small model; on a cluster call the cells with your policy, then train the row that they choose.')

# %% [markdown]
# ## Measured

# %%
cfg = repro.setting.config('g2rpo', replace(METHODS['g2rpo'], steps='all'), 100)     # a seed that no study uses
FINER = 4

def truth(policy, roll, k: int, y: torch.Tensor) -> torch.Tensor:
    "Clean latents of the states `y` (P, G, N, C) behind step `k`, on the finer grid."
    grid, x = policy.grid(FINER*cfg.T), y.flatten(0, 1)
    cond, rows = policy.encode(roll.prompts), torch.arange(len(roll.prompts)).repeat_interleave(y.shape[1])
    for s, t in zip(grid[FINER*(k + 1):-1], grid[FINER*(k + 1) + 1:]):
        x = ode_step(x, batched_velocity(policy, x, s.expand(len(x)), cond, rows, cfg.batch_size, Ledger()), s, t)
    return x

def measure() -> dict:
    "Rewards of directions: by granularity (Λ, K, P, G), and on the finer grid (K, P, G)."
    policy, rewards = open_policy(cfg), load_rewards(cfg.rewards[:1])
    words = sign_prompts('train')[-(measure_prompts or dict(tiny=12, smoke=2)[preset]):]
    roll = rollout(policy, cfg.method, words, cfg.T, cfg.group_size, cfg.seed, 0, cfg.batch_size)
    (name, reward), = rewards.items()
    said = [p for p in words for _ in range(cfg.group_size)]
    fine = [call_reward(name, reward, policy.decode(truth(policy, roll, k, y)), said).reshape(len(words), -1).tolist() for k, y in zip(roll.steps, roll.y)]
    return round_floats(dict(steps=list(roll.steps), prompts=words, coarse=score_rollout(policy, roll, rewards, cfg.batch_size, Ledger())[name].tolist(), fine=fine))

file = repo_root()/results/f'auto_lambda_measured_{preset}{f"_{measure_prompts}" if measure_prompts else ""}.json'
if not file.exists():
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(measure()))
measured = json.loads(file.read_text())
steps, coarse, fine = measured['steps'], torch.tensor(measured['coarse']), torch.tensor(measured['fine'])
coarse.shape, fine.shape

# %%
def unit(r: torch.Tensor) -> torch.Tensor: return (r - r.mean(-1, keepdim=True))/(r.std(-1, keepdim=True) + 1e-8)

def seen(lams: tuple[int, ...]) -> torch.Tensor:
    "ρ of the advantage fused over `lams` with the true reward, (K,); groups without any spread have none."
    a, b = unit(sum(unit(coarse[lam - 1]) for lam in lams)), unit(fine)
    return (a*b).mean(-1).mean(-1)*fine.shape[-1]/(fine.shape[-1] - 1)

sigma = fine.std(-1).mean(-1)
def cost(lams, kept) -> int: return nfe_per_iteration(replace(cfg, prompts_per_iteration=1, method=replace(cfg.method, granularities=lams, steps=tuple(kept))), training_grid(cfg))
subsets = [lams for n in (1, 2, 3) for lams in combinations((1, 2, 3), n)]
choices = {}
print(f'{"step":12}' + ''.join(f'{k:8}' for k in steps))
print(f'{"σ":12}' + ''.join(f'{s:8.3f}' for s in sigma))
for lams in subsets:
    rho = seen(lams)
    signal = (rho.clamp(min=0)*sigma)**2
    per = torch.tensor([s/cost(lams, [k]) for s, k in zip(signal.tolist(), steps)])
    kept = [k for k, p in zip(steps, per) if p >= per.max()/2]
    choices[lams] = kept, signal[[steps.index(k) for k in kept]].sum().item()/cost(lams, kept)
    print(f'ρ {str(lams):10}' + ''.join(f'{r:8.3f}' for r in rho) + f'   keeps {kept}: {choices[lams][1]*1e6:.2f} signal per million equivalents')
best = max(choices, key=lambda lams: choices[lams][1])
hand = tuple(METHODS['g2rpo'].noisy_steps(cfg.T))
print(f'\nchosen: Λ = {best}, steps {choices[best][0]}, {cost(best, choices[best][0])} equivalents a prompt; by hand: Λ = (1, 2, 3), steps {list(hand)}, {cost((1, 2, 3), hand)}')

# %% [markdown]
# ## Trained

# %%
rows = repro.setting.rows('g2rpo', 'g2rpo_no_mgai')
rows['auto'] = replace(rows['g2rpo'], granularities=best, steps=tuple(choices[best][0]))
repro.plan(rows)

# %%
records = repro.records(rows)

# %%
for place in repro.setting.places:
    print(f'\nat the end of the {place}')
    print(gain_table(records, place, (*repro.setting.trained, *repro.setting.held_out)))

# %%
verdicts = repro.report_verdicts(records, [Claim('chosen > {1,2,3}, first half', 'auto', 'g2rpo'), Claim('chosen > {1}, first half', 'auto', 'g2rpo_no_mgai')], chosen=dict(granularities=best, steps=choices[best][0]))
