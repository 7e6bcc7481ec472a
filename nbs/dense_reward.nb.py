# %% [markdown]
# # Dense rewards
#
# > DenseGRPO: each step gets its own gain instead of the final reward; how far a state is completed to be valued; and noise that is calibrated per step instead of constant.
#
# On `tiny` this reads the collected runs, within a minute; a run that is missing takes about five minutes of a core. `preset=paper` is the published setting on SD3.5-M, with `reward` pickscore, ocr or geneval: 1,500 to 4,500 iterations of 48 groups of 24, 1,850 device-hours for Flow-GRPO and 3,650 for DenseGRPO (OCR: 620 and 1,220), at an assumed 400 TFLOPS; `-p dry_run True` prints them and rehearses.

# %% tags=["parameters"]
preset: str = 'tiny'        # tiny; smoke (seconds, means nothing); paper (as published)
reward: str = ''            # what is trained on: pickscore, ocr or geneval, hps on tiny; empty: pickscore, hps on tiny
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
from dataclasses import replace
from g2rpo.study.records import Claim
from g2rpo.study.tables import gain_table, published_rows, published_table
from g2rpo.study.job import repo_root
from g2rpo.study.reproduction import Reproduction
repro = Reproduction(In, 'dense_reward')
published = repo_root()/'paper_figures'/'paper_reported.json'
rows = repro.setting.rows('flow_grpo', 'stepwise_grpo', 'dense_value', 'dense_constant', 'dense_grpo')
rows['dense_two'] = replace(rows['stepwise_grpo'], completion=2)
repro.plan(rows)

# %% [markdown]
# `flow_grpo` spreads the final reward over all steps. `dense_constant` gives each step its gain, states completed over every step that is left (n = t), with the constant noise η = 0.7; `stepwise_grpo` completes with one step, `dense_two` with two.
# `dense_value` takes the value of the next state in place of the gain. `dense_grpo` has the calibrated noise ψ(t).

# %%
records = repro.records(rows)

# %% [markdown]
# ## The paper's table
#
# Table 1 on SD3.5-M; ablations are published as curves only. Its scores besides the task's are of DrawBench's prompts, ours of the task's.

# %%
print(published_table([row | dict(label=f"{row['task']}: {row['method']}") for row in published_rows(published, 'densegrpo', 'main')], ('geneval', 'ocr', 'pickscore_task', 'aesthetic', 'imagereward', 'pickscore', 'unifiedreward_re'), 'label'))
for claim in published_rows(published, 'densegrpo', 'ablations_as_curves'):
    print('·', claim)

# %% [markdown]
# ## Ours

# %%
for place in repro.setting.places:
    print(f'\nat the end of the {place}')
    print(gain_table(records, place, (*repro.setting.trained, *repro.setting.held_out)))

# %%
verdicts = repro.report_verdicts(records, [Claim('dense > sparse', 'dense_constant', 'flow_grpo'), Claim('DenseGRPO > Flow-GRPO', 'dense_grpo', 'flow_grpo'), Claim('gain > value', 'dense_constant', 'dense_value'), Claim('value > sparse', 'dense_value', 'flow_grpo'),
    Claim('calibrated > constant noise', 'dense_grpo', 'dense_constant'), Claim('n = t > n = 2', 'dense_constant', 'dense_two'), Claim('n = 2 > n = 1', 'dense_two', 'stepwise_grpo'), Claim('sparse > n = 1', 'flow_grpo', 'stepwise_grpo')])
