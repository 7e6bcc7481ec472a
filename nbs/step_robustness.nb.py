# %% [markdown]
# # Fewer steps at inference
#
# > G²RPO's table of inference steps: rows trained on one grid, sampled with 10, 20 and 50 steps. The paper's claim is that G²RPO stays above MixGRPO at each.
#
# On `tiny` this reads the collected runs, within a minute; a run that is missing takes about five minutes of a core. `preset=paper` is the published setting on Flux.1-dev: the weights of the main table's rows, scored with 10, 20 and 50 steps besides: no training of its own.

# %% tags=["parameters"]
preset: str = 'tiny'        # tiny; smoke (seconds, means nothing); paper (as published); official_script (as the released scripts train)
reward: str = ''            # what is trained on: hps or hps+clip, on tiny one text reader or two; empty: hps on tiny, hps+clip as published
launcher: str = ''          # who runs what is missing: inline, accelerate, slurm; none: only what is there; empty: inline on tiny and smoke, else slurm where sbatch is, or accelerate
workers: int = 0            # inline: runs at once, a thread each, 0: 2; accelerate: processes of a run, 0: one for each GPU
seeds: int = 0              # training seeds; 0: 5 on tiny, 1 as published
budget: int = 0             # forward equivalents of a run, tiny only; 0: 16,000
iterations: int = 0         # second comparison, tiny only; 0: at 10
eval_prompts: int = 0       # held-out prompts; 0: 100 on tiny, all as published
search_prompts: int = 0     # training prompts for the choice of learning rates, tiny only; 0: 100
folder: str = 'runs/study'  # one folder a training, shared by all notebooks; from the repository's root
results: str = 'paper_figures/results'  # collected runs, and the row of this notebook
dry_run: bool = False       # print the plan, rehearse it on random pipelines, run nothing else

# %%
from g2rpo.study.records import Claim
from g2rpo.study.tables import gain_table, published_rows, published_table
from g2rpo.study.job import repo_root
from g2rpo.study.reproduction import Reproduction
repro = Reproduction(In, 'step_robustness', steps=(10, 20, 50))
published = repo_root()/'paper_figures'/'paper_reported.json'
rows = repro.setting.rows('mix_grpo', 'g2rpo')
repro.plan(rows)

# %%
records = repro.records(rows)

# %% [markdown]
# ## The paper's table
#
# Trained on HPS and CLIP, as `preset=paper` does here unless `reward` says otherwise; with 50 steps it is the main table's.

# %%
fifty = [row | dict(steps=50) for row in published_rows(published, 'g2rpo', 'main') if row['train_reward'] == 'hps+clip' and row['method'] in ('MixGRPO', 'G2RPO')]
print(published_table([row | dict(label=f"{row['method']}, {row['steps']} steps") for row in (*published_rows(published, 'g2rpo', 'step_robustness'), *fifty)], ('hps', 'clip', 'pickscore', 'imagereward', 'unifiedreward'), 'label'))

# %% [markdown]
# ## Ours
#
# At the end of the last iterations of each row (on tiny the end of the budget or the tenth iteration, whichever is later), gain over the base model sampled with as many steps.

# %%
places = ('T=10', 'T=20', 'T=50')
for place in places:
    print(f'\n{place[2:]} inference steps')
    print(gain_table(records, place, (*repro.setting.trained, *repro.setting.held_out)))

# %%
verdicts = repro.report_verdicts(records, [Claim('G²RPO > MixGRPO', 'g2rpo', 'mix_grpo')], places)

# %% [markdown]
# How a score changes from 50 steps to 10, each row against itself, and the base model:

# %%
from functools import partial
import torch
from g2rpo.study.stats import crossed_interval
change = lambda of, scorer: crossed_interval(torch.atleast_2d(of('T=10', scorer) - of('T=50', scorer)))
for scorer in (*repro.setting.trained, *repro.setting.held_out):
    print(f'{"base":12}{scorer:10} 10 steps − 50 steps  {change(records.of_base, scorer)}')
    for name in records.rows:
        print(f'{name:12}{scorer:10} 10 steps − 50 steps  {change(partial(records.table, name), scorer)}')
