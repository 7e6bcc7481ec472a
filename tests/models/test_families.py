"Every backbone family goes the whole way: encode, roll out, score, update, save, the same image from stock diffusers."
import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from g2rpo import METHODS, presets, train
from g2rpo.models.loading import load_policy
from g2rpo.models.random_pipelines import random_pipeline
from g2rpo.models.weights import load_weights
from g2rpo.training.config import open_policy
from g2rpo.training.evaluate import generate
from helpers import left_of_right, row, thin_transformer

PROMPTS = ['a sign that says "123" in red', '"7" written in blue', 'the number "45" in green',
           'a sign that says "6" in blue']
SAMPLED = dict(guidance_scale=2., shift=None)     # guided, on the pipeline's own grid
FAMILIES = ('flux', 'sd3', 'flux2')

@pytest.fixture(scope='module', params=FAMILIES)
def folder(request, tmp_path_factory):
    "A stored pipeline of a family with random weights."
    path = tmp_path_factory.mktemp(request.param)/'pipeline'
    pipe = random_pipeline(request.param)
    if request.param == 'flux':
        pipe.transformer = thin_transformer(pipe)      # the other two are thin
    pipe.save_pretrained(path)
    return path

def config(folder, **changes):
    "Two iterations on the pipeline in `folder`."
    short = dict(model=str(folder), T=4, group_size=4, prompts_per_iteration=2, iterations=2, max_tokens=48, lr=1e-3)
    return presets.tiny(**short | SAMPLED | changes)

def images(policy): return generate(policy, PROMPTS[:2], seed=0, T=4)

def stock_with(folder, weights, rank):
    "The pipeline as diffusers loads it, with what a run has kept."
    stock = DiffusionPipeline.from_pretrained(folder)
    if rank:
        stock.load_lora_weights(weights)
    else:
        stock.transformer = type(stock.transformer).from_pretrained(weights)
    return stock

LATER = [pytest.param(name, 4, marks=pytest.mark.slow) for name in ('dense_grpo', 'mix_grpo')]

@pytest.mark.parametrize('name, rank', [('g2rpo', 0), ('g2rpo', 4), ('dense_grpo', 0), ('mix_grpo', 0), *LATER])
def test_whole_way(folder, tmp_path, name, rank):
    "Full weights in float32, LoRA in bf16; the trainer stops by itself where a first ratio is not 1."
    method = replace(row(name) if name == 'mix_grpo' else METHODS[name], ema=0.)
    cfg = config(folder, method=method, lora_rank=rank, precision='bf16' if rank else 'no')
    policy, weights = open_policy(cfg), tmp_path/'run'/'weights'
    base = images(policy)
    assert len(train(cfg, left_of_right, PROMPTS, tmp_path/'run', policy=policy).metrics) == 2
    tuned = images(policy)
    assert (base - tuned).abs().max() > 1e-3
    ours = load_weights(load_policy(str(folder), 24, 48, 48, **SAMPLED), weights)
    torch.testing.assert_close(images(ours), tuned, rtol=0, atol=1e-4)
    theirs = type(policy)(stock_with(folder, weights, rank), 24, 48, max_tokens=48, **SAMPLED)
    torch.testing.assert_close(images(theirs), tuned, rtol=0, atol=1e-4)
    assert json.loads((tmp_path/'run'/'config.json').read_text())['model'] == str(folder)

def test_stored_in_half_precision(folder, tmp_path):
    "LoRA on a bfloat16 transformer: adapters are float32, the first ratio is 1, unused parts leave the device."
    halves = dict(dtype='bf16', encoder_dtype='bf16', offload=True, cache=str(tmp_path/'cache'), checkpointing=True)
    cfg = config(folder, lora_rank=4, **halves)
    policy = open_policy(cfg)
    log = train(cfg, left_of_right, PROMPTS, policy=policy).metrics
    assert log[0]['ratio_spread'][0] == 0.
    assert all(p.dtype == torch.float32 for p in policy.pipe.transformer.parameters() if p.requires_grad)
    assert next(policy.pipe.vae.parameters()).dtype == torch.bfloat16 and len(list((tmp_path/'cache').iterdir())) >= 3
