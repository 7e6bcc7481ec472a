"Every backbone family goes the whole way: encode, roll out, score, update, save, and the same image from stock diffusers."
import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from g2rpo.training.config import open_policy
from g2rpo.training.presets import tiny
from g2rpo.training.evaluate import generate
from g2rpo.core.rows import METHODS
from g2rpo.models.loading import load_policy
from g2rpo.models.weights import load_weights
from g2rpo.models.random_pipelines import random_pipeline
from g2rpo.training.trainer import train

WORDS = ['a sign that says "123" in red', '"7" written in blue', 'the number "45" in green', 'a sign that says "6" in blue']

def left_of_right(images, prompts):
    half = images.shape[-1]//2
    return images[..., half:].mean((1, 2, 3)) - images[..., :half].mean((1, 2, 3))

@pytest.fixture(scope='module', params=['flux', 'sd3', 'flux2'])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)/'pipeline'
    random_pipeline(request.param).save_pretrained(path)
    return path

def config(folder, **changes):
    return tiny(**dict(model=str(folder), T=4, group_size=4, prompts_per_iteration=2, iterations=2, max_tokens=48, shift=None, guidance_scale=2., lr=1e-3) | changes)

@pytest.mark.parametrize('rank', [0, 4])
@pytest.mark.parametrize('name', ['g2rpo', 'dense_grpo', 'mix_grpo'])
def test_whole_way(folder, tmp_path, name, rank):
    method = METHODS[name] if name != 'mix_grpo' else replace(METHODS[name], window=replace(METHODS[name].window, size=2))
    cfg = config(folder, method=replace(method, ema=0.), lora_rank=rank, precision='bf16' if rank else 'no')
    policy = open_policy(cfg)
    log = train(cfg, dict(r=left_of_right), WORDS, tmp_path/'run', policy=policy).metrics
    assert len(log) == 2    # the trainer stops by itself where a first ratio is not 1
    tuned = generate(policy, WORDS[:2], 0, 4)
    ours = load_weights(load_policy(str(folder), 24, 48, 48, guidance_scale=2., shift=None), tmp_path/'run'/'weights')
    torch.testing.assert_close(generate(ours, WORDS[:2], 0, 4), tuned, rtol=0, atol=1e-4)
    stock = DiffusionPipeline.from_pretrained(folder)
    base = generate(load_policy(str(folder), 24, 48, 48, guidance_scale=2., shift=None), WORDS[:2], 0, 4)
    assert (base - tuned).abs().max() > 1e-3
    if rank:
        stock.load_lora_weights(tmp_path/'run'/'weights')
    else:
        stock.transformer = type(stock.transformer).from_pretrained(tmp_path/'run'/'weights')
    theirs = generate(type(policy)(stock, 24, 48, max_tokens=48, guidance_scale=2., shift=None), WORDS[:2], 0, 4)
    torch.testing.assert_close(theirs, tuned, rtol=0, atol=1e-4)
    assert json.loads((tmp_path/'run'/'config.json').read_text())['model'] == str(folder)

def test_stored_in_half_precision(folder, tmp_path):
    "LoRA on a bfloat16 transformer: adapters are float32, the first ratio is 1, parts away from the device come and go."
    cfg = config(folder, lora_rank=4, dtype='bf16', encoder_dtype='bf16', offload=True, cache=str(tmp_path/'cache'), checkpointing=True)
    policy = open_policy(cfg)
    log = train(cfg, dict(r=left_of_right), WORDS, policy=policy).metrics
    assert log[0]['ratio_spread'][0] == 0. and all(p.dtype == torch.float32 for p in policy.pipe.transformer.parameters() if p.requires_grad)
    assert next(policy.pipe.vae.parameters()).dtype == torch.bfloat16 and len(list((tmp_path/'cache').iterdir())) >= 3
