# %% [markdown]
# # Which steps take noise
#
# > G²RPO trains on the first half of the grid. Which half, and how many steps? E-GRPO (arXiv 2601.00423) published one score for each of four answers on Flux.1-dev; here they are judged, at equal cost and at equal iterations.
#
# **Hypotheses, stated before the runs.** Early steps decide what is written, so at equal cost the first half teaches more than the second. All steps are no better than the first half. Noise at every second step of the first half does nearly as well as at all of them, since neighbours teach the same.
# The three claims below ask for more, that the first half is better than each of the others: the hypotheses expect that the first holds and that the other two do not or cannot be told.
#
# On `tiny` this reads the collected runs, within a minute; a run that is missing takes about five minutes of a core. There the grid has ten steps: the first half is steps 0 to 4, the second 5 to 8, as the last step takes no noise. `preset=paper` is the published setting on Flux.1-dev: 300 iterations of 16 prompts, 76 device-hours for the second half to 300 for all steps, at an assumed 400 TFLOPS;
# `-p dry_run True` prints them and rehearses.

# %% tags=["parameters"]
preset: str = 'tiny'        # tiny; smoke (seconds, means nothing); paper (as published); official_script (as the released scripts train)
reward: str = ''            # what is trained on: hps or hps+clip, on tiny one text reader or two; empty: hps
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
repro = Reproduction(In, 'ablation_steps')
published = repo_root()/'paper_figures'/'paper_reported.json'
first = repro.setting.rows('g2rpo_no_mgai')['g2rpo_no_mgai']
T = repro.setting.preset_of('g2rpo').T
rows = {'g2rpo_no_mgai': first, 'second_half': replace(first, steps=tuple(range(T//2, T - 1))), 'all_steps': replace(first, steps='all'), 'every_second': replace(first, steps=tuple(range(0, T//2, 2)))}
repro.plan(rows)

# %%
records = repro.records(rows)

# %% [markdown]
# ## Published
#
# Table 3 of E-GRPO: HPS of its own row, which merges quiet steps, trained on HPS on a grid of 16 steps.

# %%
print(published_table(published_rows(published, 'e_grpo', 'steps'), ('hps',), 'noisy'))

# %% [markdown]
# ## What came out
#
# `g2rpo_no_mgai` is the first half: the main table's runs.

# %%
for place in repro.setting.places:
    print(f'\nat the end of the {place}')
    print(gain_table(records, place, (*repro.setting.trained, *repro.setting.held_out)))

# %%
verdicts = repro.report_verdicts(records, [Claim('first half > second half', 'g2rpo_no_mgai', 'second_half'), Claim('first half > all steps', 'g2rpo_no_mgai', 'all_steps'), Claim('first half > every second of it', 'g2rpo_no_mgai', 'every_second')])

# %% [markdown]
# On `tiny` the first hypothesis is not borne out at equal cost, where it was stated: the second half's completions are short, so it gets three times the iterations and does at least as well. For each iteration the first half is ahead, which is the order that was published at 300 iterations each; the intervals allow either. The other two came out as expected.
