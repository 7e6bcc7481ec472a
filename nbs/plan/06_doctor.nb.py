# %% [markdown]
# # Doctor
#
# > Can this machine run that preset? Everything that would stop a run, looked at in a minute, before it starts.
#
# After this notebook you can ask `g2rpo doctor --preset paper` and know which files, which memory and how many GPU-hours stand between you and the run.

# %%
#| default_exp plan.doctor

# %%
#| export
import os
import shutil
import torch
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from safetensors import SafetensorError
from g2rpo.errors import InputError, NothingToLearn, RunStopped
from g2rpo.models.loading import DTYPES
from g2rpo.plan.blueprint import find_blueprint
from g2rpo.plan.checks import check_assets, check_devices, check_model, check_packages, check_prompts, Finding, free_memory, main_memory
from g2rpo.plan.cost import nfe_per_iteration
from g2rpo.plan.memory import estimate_memory, GIB, model_facts
from g2rpo.rewards.load import load_rewards
from g2rpo.training.config import Config, open_policy
from g2rpo.training.prompts import draw_prompts, load_prompts
from g2rpo.training.run_dir import required_bytes
from g2rpo.training.trainer import train

# %%
#| hide
import tempfile
from fastcore.test import test_eq
from g2rpo.training.presets import paper, tiny
from g2rpo.core.rows import METHODS

# %% [markdown]
# ## Memory, disk and cost
#
# Forwards are counted by a rollout that computes nothing. Where a step could be run, its seconds per forward equivalent give the hours; where not, operations do, at an assumed 400 TFLOPS, which dense bf16 training reaches on an H200 where it goes well.

# %%
#| export
ASSUMED_TFLOPS = 400   # assumed, of an H200, where nothing could be timed

def check_memory(cfg: Config, device: torch.device, processes: int) -> Iterator[Finding]:
    "The estimate against what is free."
    gpu, free = device.type == 'cuda', free_memory(device)
    e = estimate_memory(without_offload(cfg, device), processes, fused=gpu)
    here = 1 if gpu else processes                                                         # processes that share this memory
    fits = e.total*here < .95*free
    yield Finding('memory', (f'{here} times ' if here > 1 else '') + f'{e}; {free/GIB:.1f} GiB free' + ('' if fits else '. ' + memory_advice(cfg, e.phase, gpu)), fits)
    if gpu:
        yield check_host_memory(cfg, min(processes, torch.cuda.device_count()), main_memory())

def without_offload(cfg: Config, device: torch.device) -> Config:
    "`cfg` without offloading where there is nowhere to offload to."
    return cfg if device.type == 'cuda' else replace(cfg, offload=False)

def check_host_memory(cfg: Config, processes: int, free: int) -> Finding:
    "Main memory beside GPUs: every process of the machine reads the whole pipeline there before it moves."
    t = model_facts(cfg)
    need = processes*(t['weights'] + t['vae'] + find_blueprint(cfg.model, cfg.revision).encoders*DTYPES[cfg.encoder_dtype].itemsize)
    return Finding('memory', f'{need/GIB:.1f} GiB of main memory while {processes} process{"es read" if processes > 1 else " reads"} the pipeline; {free/GIB:.1f} GiB free', need < .95*free)

def memory_advice(cfg: Config, phase: str, gpu: bool = True) -> str:
    "What would make a run smaller."
    if not cfg.lora_rank:
        return 'Try --lora-rank 64 --dtype bf16: without gradients and moments of all weights' + ('.' if cfg.shard else '; or --shard yes on several GPUs.')
    if phase in ('rollout', 'decoding'):
        return f'Try a --batch-size below {cfg.batch_size}.'
    if not cfg.checkpointing:
        return 'Try --checkpointing yes.'
    return 'Try --offload yes.' if gpu and not cfg.offload else f'Try a --grad-batch-size below {cfg.grad_batch_size}.'

def written_bytes(cfg: Config) -> dict[str, int]:
    "Bytes of what a run writes."
    return required_bytes(model_facts(cfg)['trained'], cfg)

def check_disk(cfg: Config, out: Path) -> Iterator[Finding]:
    "Room for checkpoints and weights, as the trainer will ask for it."
    there = out.absolute()
    while not there.exists():
        there = there.parent
    free, need = shutil.disk_usage(there).free, written_bytes(cfg)
    total = need['total']
    yield Finding('disk', f'{need["weights"]/GIB:.2f} GiB of weights and {need["checkpoint"]/GIB:.2f} GiB a checkpoint, {total/GIB:.2f} GiB in all with keep={cfg.keep}; {free/GIB:.1f} GiB free for {out}' + ('' if os.access(there, os.W_OK) else ', where nothing can be written'), free > total and os.access(there, os.W_OK))

def estimate_cost(cfg: Config, seconds: float | None) -> Iterator[Finding]:
    "Forward equivalents and device-hours of the whole run; `seconds` a forward equivalent, if that was measured."
    t = model_facts(cfg)
    an_iteration = nfe_per_iteration(cfg, torch.tensor(t['grid'], dtype=torch.float64))
    how = f'at {ASSUMED_TFLOPS} TFLOPS, assumed' if seconds is None else f'{seconds:.3g} s each, measured here'
    seconds = seconds or 2*t['numbers']*t['tokens']/(ASSUMED_TFLOPS*1e12)
    hours = an_iteration*cfg.iterations*seconds/3600
    yield Finding('cost', f'{cfg.iterations} iterations of {an_iteration:,} forward equivalents (a gradient pass is 3): about {hours:.3g} device-hours, {how}')

# %% [markdown]
# ## One real step
#
# One prompt, a small group, one optimiser step through the trainer itself: it stops if the first ratio is not 1 to the last bit, if the rewards of a group do not differ, or if anything is not finite. The weights that it changes are thrown away.

# %%
#| export
def smallest_step(cfg: Config) -> Config:
    "The least of `cfg` that still takes an optimiser step by its method."
    m = cfg.method
    if m.explore == 'single':
        m = replace(m, steps=m.noisy_steps(cfg.T)[:1])
    return replace(cfg, method=m, group_size=min(cfg.group_size, 4*max(1, m.starts)), prompts_per_iteration=1, iterations=1, tracker=None)

def check_step(cfg: Config, device: torch.device) -> tuple[Finding, float | None]:
    "A step of `small(cfg)`, and its seconds per forward equivalent."
    try:
        try:
            row = run_step(smallest_step(cfg), device)
        except NothingToLearn:
            row = run_step(replace(smallest_step(cfg), group_size=cfg.group_size), device)      # a few members may agree by chance
    except (InputError, RunStopped) as error:
        return Finding('step', str(error), False), None
    except Exception as error:
        return Finding('step', f'{type(error).__name__}: {(str(error) or "no message").splitlines()[0][:200]}', False), None    # whatever a scorer or a device raises
    if row['grad_norm'][0] is None:
        return Finding('step', f'the gradient is not finite: {row["skipped"][0]}', False), None
    spread = ', '.join(f'{name} {row[f"reward/{name}"]:.3f} ± {row[f"group_std/{name}"]:.3f} in the group' for name in cfg.rewards)
    return Finding('step', f'first ratio {row["ratio"][0]:.0f} to the last bit, gradient norm {row["grad_norm"][0]:.2g}, {spread}'), row['seconds']/row['nfe']

def run_step(cfg: Config, device: torch.device) -> dict:
    "Metrics of one iteration."
    policy, rewards, prompts = open_policy(cfg, str(device)), load_rewards(cfg.rewards, str(device)), load_prompts(cfg.prompts, cfg.rewards)
    policy.encode(draw_prompts(prompts, 1, cfg.seed, 0))
    rows = train(cfg, rewards, prompts, policy=policy).metrics
    if not rows:
        raise KeyboardInterrupt
    return rows[0]

def diagnose(cfg: Config, device: torch.device, processes: int = 1, out='runs') -> Iterator[Finding]:
    "All findings, the cheap ones first; the step only where nothing before failed."
    fine = True
    for check in (check_packages(cfg), check_devices(cfg, device, processes), check_model(cfg), check_assets(cfg), check_prompts(cfg), check_memory(cfg, device, processes), check_disk(cfg, Path(out))):
        try:
            for finding in check:
                fine &= finding.fine
                yield finding
        except (InputError, SafetensorError) as error:
            yield Finding('plan', f'{error}', False)
            return
    seconds = None
    if fine:
        alone = estimate_memory(without_offload(smallest_step(cfg), device), 1, device.type == 'cuda')
        if alone.total < .95*free_memory(device):
            finding, seconds = check_step(cfg, device)
            yield finding
        else:
            yield Finding('step', f'not taken: it runs in this process alone, where all weights need {alone.total/GIB:.1f} GiB and {free_memory(device)/GIB:.1f} GiB are free')
    yield from estimate_cost(cfg, seconds)

# %% [markdown]
# ## On the embedded default

# %%
cpu = torch.device('cpu')
findings = list(diagnose(tiny(), cpu))
for finding in findings:
    print(finding)
assert all(f.fine for f in findings)
test_eq([f.what for f in findings], ['packages', 'device', 'model', 'prompts', 'memory', 'disk', 'step', 'cost'])

# %% [markdown]
# ## On the paper's preset
#
# A machine without the checkpoints hears which, how large, and what brings them; a machine that is too small hears by how much, part by part.

# %%
with tempfile.TemporaryDirectory() as tmp:
    os.environ['G2RPO_ASSETS'] = tmp
    findings = list(diagnose(paper(), cpu, 16))
    del os.environ['G2RPO_ASSETS']
for finding in findings:
    if finding.what not in ('packages', 'device', 'disk'):
        print(str(finding).replace(tmp, '…'))
failed = {f.what for f in findings if not f.fine}
assert {'scorer', 'prompts', 'memory'} <= failed and 'step' not in {f.what for f in findings}

# %% [markdown]
# Beside GPUs, the main memory that eight processes need while they read Flux.1-dev, and what a container's limit leaves when cached files are not counted.

# %%
print(check_host_memory(paper(), 8, 2000*GIB))
assert check_host_memory(paper(), 8, 2000*GIB).fine and not check_host_memory(paper(), 8, 100*GIB).fine
with tempfile.TemporaryDirectory() as tmp:
    for name, text in dict(max=f'{2*GIB}', current=f'{GIB}', stat=f'anon 5\ninactive_file {GIB//2}').items():
        (Path(tmp)/f'memory.{name}').write_text(text)
    test_eq(main_memory(Path(tmp)), 3*GIB//2)

# %% [markdown]
# ## Every method has a smallest step

# %%
for name, method in METHODS.items():
    cfg = smallest_step(tiny(method=method, T=8, group_size=12))
    assert cfg.group_size <= 16 and len(cfg.method.noisy_steps(8)) >= 1

# %%
print(memory_advice(paper(), 'gradient pass'))
print(memory_advice(paper(lora_rank=8, checkpointing=False), 'gradient pass'))
print(memory_advice(paper(lora_rank=8), 'decoding'))
