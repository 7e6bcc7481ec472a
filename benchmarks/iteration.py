"""One paper-shaped G²RPO rollout (T=16, G=12, eight noisy steps, Λ={1,2,3}) on the embedded model: the loop of the
published code, one sample at a time, against the engine. Same seeds, same result; prints forwards, seconds and their
ratio.

    python benchmarks/iteration.py [prompts]
"""
import sys
import time

import torch
from g2rpo import METHODS, load_policy
from g2rpo.core.naive import naive_rollout
from g2rpo.core.rollout import rollout
from g2rpo.core.velocity import Ledger
from g2rpo.models.tiny import HEIGHT, sign_prompts, T5_TOKENS, WIDTH

def timed(run, policy, prompts: list[str], chunk: int, **kw):
    "(rollout, images, ledger, seconds) of one iteration up to the reward."
    ledger, began = Ledger(), time.perf_counter()
    roll = run(policy, METHODS['g2rpo'], prompts, 16, 12, ledger=ledger, **kw)
    images = torch.cat([policy.decode(part) for x0 in roll.x0.values() for part in x0.flatten(0, 2).split(chunk)])
    return roll, images, ledger, time.perf_counter() - began

def main(n: int):
    "Time both on `n` prompts."
    policy, prompts = load_policy('tiny', HEIGHT, WIDTH, T5_TOKENS), sign_prompts('train', n)
    timed(rollout, policy, prompts[:1], 64)  # warm up
    naive, naive_images, a, slow = timed(naive_rollout, policy, prompts, 1)
    fast, fast_images, b, quick = timed(rollout, policy, prompts, 64, batch_size=64)
    print(f'prompts {n}, threads {torch.get_num_threads()}')
    for name, ledger, seconds in (('naive, batch 1', a, slow), ('engine', b, quick)):
        print(f'{name:15} {ledger.forwards:6} forwards {seconds:7.1f} s')
    print(f'{"ratio":15} {a.forwards/b.forwards:6.2f}          {slow/quick:7.1f}')
    apart = max((naive.x0[lam] - fast.x0[lam]).abs().max().item() for lam in naive.x0)
    print(f'largest difference: latents {apart:.1e}, images {(naive_images - fast_images).abs().max():.1e}')

if __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
