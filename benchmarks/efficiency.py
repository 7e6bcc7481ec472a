"""How much of the time of a rollout, and of a whole iteration, is spent in forward passes at their best speed.

    python benchmarks/efficiency.py tiny          # the embedded default
    python benchmarks/efficiency.py mid           # a random Flux transformer of 30 M parameters
    python benchmarks/efficiency.py tiny scaling  # with group size, noisy steps, granularities, prompts, processes

Efficiency is (necessary forwards × the best time of one forward) / wall time: 1 is a machine that does nothing else.
The best forward time is measured over batch sizes, in the same run; beside it stands diffusers' batched denoising.
"""
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from g2rpo import METHODS, load_policy, train
from g2rpo.core.rollout import rollout
from g2rpo.core.velocity import Ledger
from g2rpo.models.families import FluxPolicy
from g2rpo.models.tiny import HEIGHT, T5_TOKENS, WIDTH, build_tiny_pipeline, sign_prompts
from g2rpo.training.presets import tiny

ROW = METHODS['g2rpo']

def open_model(name: str):
    "The embedded default, or a random transformer with a width of 512 between the same encoders and VAE."
    if name == 'tiny':
        return load_policy('tiny', HEIGHT, WIDTH, T5_TOKENS)
    from diffusers import FluxTransformer2DModel
    pipe, small = build_tiny_pipeline(), build_tiny_pipeline().transformer.config
    same = {key: small[key] for key in ('in_channels', 'joint_attention_dim', 'pooled_projection_dim')}
    size = dict(num_layers=1, num_single_layers=4, attention_head_dim=64, num_attention_heads=8)
    pipe.register_modules(transformer=FluxTransformer2DModel(**same, **size, axes_dims_rope=(16, 24, 24)))
    return FluxPolicy(pipe, HEIGHT, WIDTH, T5_TOKENS)

@torch.no_grad()
def seconds_of(policy, size: int, repeats: int = 5) -> float:
    "Best time of a forward of `size` states, for each of them."
    cond, x = policy.encode(sign_prompts('test', size)), torch.randn(size, *policy.latent_shape)
    best, sigma = float('inf'), torch.full((size,), .5)
    for _ in range(repeats):
        began = time.perf_counter()
        policy.velocity(x, sigma, cond)
        best = min(best, time.perf_counter() - began)
    return best/size

def best_size(policy) -> tuple[int, float]:
    "The batch size with the fastest forward, and its seconds for a state."
    times = {size: seconds_of(policy, size) for size in (8, 16, 32, 64, 128)}
    print('ms a forward by batch size:', ', '.join(f'{size}: {1e3*t:.2f}' for size, t in times.items()))
    size = min(times, key=times.get)
    return size, times[size]

@torch.no_grad()
def rolled(policy, method=ROW, prompts: int = 4, T: int = 10, group_size: int = 8, size: int = 64) -> tuple[int, float]:
    "Forwards and seconds of one rollout."
    ledger, began = Ledger(), time.perf_counter()
    rollout(policy, method, sign_prompts('train', prompts), T, group_size, batch_size=size, grad_batch_size=size,
            ledger=ledger)
    return ledger.forwards, time.perf_counter() - began

def efficiency(policy, best: float, **changes) -> float:
    "Of the better of two rollouts."
    return max(forwards*best/seconds for forwards, seconds in (rolled(policy, **changes) for _ in range(2)))

@torch.no_grad()
def diffusers_seconds(policy, size: int, steps: int = 10) -> float:
    "Seconds for each forward of a stock pipeline that draws `size` images at once, latents out."
    policy.pipe.set_progress_bar_config(disable=True)
    prompts, began = sign_prompts('test', size), time.perf_counter()
    policy.pipe(prompts, height=HEIGHT, width=WIDTH, num_inference_steps=steps, max_sequence_length=T5_TOKENS,
                output_type='latent')
    return (time.perf_counter() - began)/(size*steps)

def iteration(policy, best: float) -> None:
    "A whole iteration of the trainer: how much of it are forwards at their best speed, how much all else."
    cfg = tiny(method=ROW, precision='no', iterations=3, save_every=0)
    result = train(cfg, policy=policy)
    for before, row in zip(result.metrics[:-1], result.metrics[1:]):
        seconds, nfe = row['seconds'] - before['seconds'], row['nfe'] - before['nfe']
        print(f'iteration of the trainer: {seconds:.2f} s, {nfe} equivalents: {nfe*best/seconds:.2f} of it')

def worker(prompts: int) -> tuple[int, float]:
    torch.set_num_threads(1)
    policy = open_model('tiny')
    rolled(policy, prompts=1)
    return rolled(policy, prompts=prompts)

def processes(count: int) -> float:
    "Forwards a second of `count` processes with four prompts each."
    with ProcessPoolExecutor(count, get_context('spawn')) as pool:
        found = list(pool.map(worker, [4]*count))
    return sum(forwards for forwards, _ in found)/max(seconds for _, seconds in found)

def scaling(policy, best: float) -> None:
    "Efficiency as the parts of a rollout grow."
    steps = {n: replace(ROW, steps=tuple(range(n))) for n in (1, 2, 4, 8)}
    lams = {lam: replace(ROW, granularities=lam) for lam in ((1,), (1, 2), (1, 2, 3))}
    cases_of = dict(
        group_size={n: dict(group_size=n) for n in (2, 4, 8, 16)},
        noisy_steps={n: dict(method=method) for n, method in steps.items()},
        granularities={lam: dict(method=method) for lam, method in lams.items()},
        prompts={n: dict(prompts=n) for n in (1, 2, 4, 8)})
    for name, cases in cases_of.items():
        print(f'{name:14}', ', '.join(f'{key}: {efficiency(policy, best, **case):.2f}' for key, case in cases.items()))
    one, two = processes(1), processes(2)
    print(f'processes      1: {one:.0f} forwards a second, 2: {two:.0f}, {two/one/2:.2f} of twice as many')

def main(model: str = 'tiny', what: str = '') -> None:
    torch.set_num_threads(1)
    policy = open_model(model)
    size, best = best_size(policy)
    print(f'rollout of {model}, batches of {size}: efficiency {efficiency(policy, best, size=size):.2f}')
    print(f'diffusers, {size} images at once: {best/diffusers_seconds(policy, size):.2f}')
    if what == 'scaling':
        scaling(policy, best)
    elif model == 'tiny':
        iteration(policy, best)

if __name__ == '__main__':
    main(*sys.argv[1:])
