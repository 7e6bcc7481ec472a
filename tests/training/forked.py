"Run by test_processes: trains rows in one, two and four processes, and goes on with runs in other numbers of them."
import json
import os
import shutil
import sys
from multiprocessing import get_context
from pathlib import Path

import torch
from g2rpo import METHODS, train
from g2rpo.core.rollout import rollout
from g2rpo.training.config import open_policy
from g2rpo.training.distributed import init_processes
from helpers import PROMPTS, free_port, left_of_right, small

CHAIN = dict(method=METHODS['dance_grpo'], T=6, group_size=4)
ROWS = dict(
    g2rpo=dict(batch_size=3, grad_batch_size=1),       # a pass holds one prompt, however many a process has
    dance=CHAIN | dict(grad_batch_size=3),
    flow=dict(method=METHODS['flow_grpo'], group_size=4, grad_batch_size=3),
    lost=dict(method=METHODS['flow_grpo'], group_size=4, grad_batch_size=3),
    split=dict(shard=True, checkpointing=True),
    split_chain=CHAIN | dict(grad_batch_size=1, shard=True),
    once=dict(shard=True, checkpointing=True, gather_once=True),
    once_chain=CHAIN | dict(grad_batch_size=1, shard=True, gather_once=True),
    hybrid=dict(shard=True, checkpointing=True, gather_once=True, hybrid=True))
SPLIT_AGAIN = ['once', 'once_chain', 'hybrid']                                        # compared with the other two
TRAINED = {1: [n for n in ROWS if n not in SPLIT_AGAIN], 2: list(ROWS)[:-1], 4: ['g2rpo', 'once', 'hybrid']}
NODE = {4: 2}       # processes: of them on a node, where there are several
RESUMED = [(2, 1, 'g2rpo'), (2, 1, 'split'), (1, 2, 'g2rpo'), (1, 2, 'split'), (4, 4, 'g2rpo')]   # first, then, row
PATIENCE = 60       # seconds that processes wait for one another

class CountedCollectives:
    "How often this process has taken part in gathering weights and in reducing gradients."
    names = dict(gather=('all_gather_single', 'all_gather_into_tensor'),          # of newer and of older torch
                 reduce=('reduce_scatter_single', 'reduce_scatter_tensor'))

    def __init__(self):
        self.counts = dict.fromkeys(self.names, 0)
        for what, names in self.names.items():
            name = next(name for name in names if hasattr(torch.distributed, name))
            setattr(torch.distributed, name, self.counted(what, getattr(torch.distributed, name)))

    def counted(self, name, collective):
        def call(*args, **options):
            self.counts[name] += 1
            return collective(*args, **options)
        return call

def lost(images, prompts):
    "`left_of_right`, broken for a prompt as soon as whole groups are scored."
    broken = torch.tensor([len(prompts) > 2 and prompt == PROMPTS[1] for prompt in prompts])
    return left_of_right(images, prompts).masked_fill(broken, torch.nan)

def config(model, name):
    "Three iterations of a row, each with its checkpoint."
    return small(model, iterations=3, prompts_per_iteration=4, save_every=1, ddp_timeout=PATIENCE, **ROWS[name])

def train_rows(folder, model, names):
    "Keep the rollout of each row of `names` before it is trained, and its run."
    state = init_processes(PATIENCE, cpu=True)
    rank, world = state.process_index, state.num_processes
    collectives, counts = CountedCollectives(), {}
    for name in names:
        cfg = config(model, name)
        policy = open_policy(cfg)
        roll = rollout(policy, cfg.method, PROMPTS[rank:4:world], cfg.T, cfg.group_size, seed=5, iteration=2,
                       batch_size=cfg.batch_size, grad_batch_size=cfg.grad_batch_size)
        torch.save(dict(x=torch.stack(roll.x), y=roll.y, x0=roll.x0), folder/f'{name}-{world}-{rank}.pt')
        seen = counts[name] = [dict(collectives.counts)]
        reward = dict(left_of_right=lost if name == 'lost' else left_of_right)
        train(cfg, reward, PROMPTS[:4], folder/f'{name}-{world}', policy=policy,
              on_iteration=lambda row: seen.append(dict(collectives.counts)))
    (folder/f'counts-{world}-{rank}.json').write_text(json.dumps(counts))

def resume_row(folder, model, name, out):
    "Do the last iteration of a run again, from the checkpoint of the one before."
    init_processes(PATIENCE, cpu=True)
    train(config(model, name), left_of_right, PROMPTS[:4], folder/out, resume='2')

def as_rank(rank, world, port, work, args):
    "Do `work` as one of `world` processes, as torch.distributed.run says it."
    if world > 1:
        node = str(NODE.get(world, world))
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=node,
                           MASTER_ADDR='localhost', MASTER_PORT=str(port))
    work(*args)

def in_processes(world, work, *args):
    "`work` in processes that are forked from this one: what it has imported they need not import again."
    fork, port = get_context('fork'), free_port()
    processes = [fork.Process(target=as_rank, args=(rank, world, port, work, args)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f'{work.__name__}{args} in {world} processes failed')

def main(folder, model):
    open_policy(config(model, 'g2rpo'))      # for what it imports
    for world, names in TRAINED.items():
        in_processes(world, train_rows, folder, model, names)
    for first, then, name in RESUMED:
        out = f'{name}-{first}-{then}'
        shutil.copytree(folder/f'{name}-{first}', folder/out)
        in_processes(then, resume_row, folder, model, name, out)

if __name__ == '__main__':
    main(Path(sys.argv[1]), sys.argv[2])
