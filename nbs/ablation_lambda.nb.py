# %% [markdown]
# # Which granularities
#
# > G²RPO's ablation: a branch is imaged at the strides Λ, and in the paper's table more of them teach more. Λ = {1}, {1, 2}, {1, 3}, {1, 2, 3}.
#
# On `tiny` this reads the collected runs, within a minute; a run that is missing takes about five minutes of a core. `preset=paper` is the published setting on Flux.1-dev: 300 iterations of 16 prompts, 230 to 350 device-hours a row at an assumed 400 TFLOPS; `-p dry_run True` prints them and rehearses.

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
from dataclasses import replace
from g2rpo.study.records import Claim
from g2rpo.study.tables import gain_table, published_rows, published_table
from g2rpo.study.job import repo_root
from g2rpo.study.reproduction import Reproduction
repro = Reproduction(In, 'ablation_lambda')
published = repo_root()/'paper_figures'/'paper_reported.json'
rows = repro.setting.rows('g2rpo_no_mgai', 'g2rpo')
one, all_three = rows['g2rpo_no_mgai'], replace(rows['g2rpo'], granularities=(1, 2, 3))
rows = {'g2rpo_no_mgai': one, 'g2rpo_1_2': replace(all_three, granularities=(1, 2)), 'g2rpo_1_3': replace(all_three, granularities=(1, 3)), 'g2rpo': all_three}
repro.plan(rows)

# %%
records = repro.records(rows)

# %% [markdown]
# ## The paper's table
#
# Trained on HPS and CLIP, as `preset=paper` does here unless `reward` says otherwise.

# %%
print(published_table(published_rows(published, 'g2rpo', 'ablation_lambda'), ('hps', 'clip', 'pickscore', 'imagereward', 'unifiedreward'), 'granularities'))

# %% [markdown]
# ## Ours
#
# `g2rpo_no_mgai` is Λ = {1}, `g2rpo` is {1, 2, 3}: runs that the main table asks for, too. More granularities cost more forwards an iteration, so at equal cost they have taken fewer steps.

# %%
for place in repro.setting.places:
    print(f'\nat the end of the {place}')
    print(gain_table(records, place, (*repro.setting.trained, *repro.setting.held_out)))

# %%
verdicts = repro.report_verdicts(records, [Claim('{1,2,3} > {1}', 'g2rpo', 'g2rpo_no_mgai'), Claim('{1,2} > {1}', 'g2rpo_1_2', 'g2rpo_no_mgai'), Claim('{1,3} > {1}', 'g2rpo_1_3', 'g2rpo_no_mgai'),
    Claim('{1,2,3} > {1,2}', 'g2rpo', 'g2rpo_1_2'), Claim('{1,2,3} > {1,3}', 'g2rpo', 'g2rpo_1_3')])
