"Every backbone family goes the whole way: encode, roll out, score, update, save, the same image from stock diffusers."
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from g2rpo import METHODS, presets, train
from g2rpo.cli.share import comfyui_lora
from g2rpo.models.loading import load_policy
from g2rpo.models.random_pipelines import random_pipeline
from g2rpo.models.weights import load_weights
from g2rpo.study.job import RunSpec
from g2rpo.study.run_job import run_job
from g2rpo.training.calibrate import Calibration, calibrate
from g2rpo.training.config import open_policy
from g2rpo.training.evaluate import EvalConfig, evaluate, generate
from helpers import left_of_right, row, thin_transformer

PROMPTS = ['a sign that says "123" in red', '"7" written in blue', 'the number "45" in green',
           'a sign that says "6" in blue']
SAMPLED = dict(guidance_scale=2., shift=None)     # guided, on the pipeline's own grid
FAMILIES = ('flux', 'sd3', 'flux2', 'z_image')

@pytest.fixture(scope='module', params=FAMILIES)
def folder(request, tmp_path_factory):
    "A stored pipeline of a family with random weights."
    path = tmp_path_factory.mktemp(request.param)/'pipeline'
    pipe = random_pipeline(request.param)
    if request.param == 'flux':
        pipe.transformer = thin_transformer(pipe)      # the others are thin
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

STORED = [(4, 'fp32'), (0, 'bf16'), (0, 'fp32')]
STORED = [(4, 'bf16'), *(pytest.param(*each, marks=pytest.mark.slow) for each in STORED)]

@pytest.fixture(scope='module')
def half_folder(folder):
    "The pipeline of `folder` with its weights stored in bfloat16."
    path = folder.with_name('half')
    DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).save_pretrained(path)
    return path

@pytest.mark.parametrize('rank, dtype', STORED)
def test_every_use_in_every_precision(folder, half_folder, tmp_path, rank, dtype):
    "Trained under autocast, calibrated, evaluated and judged in it, saved, and opened by stock diffusers."
    half = dtype == 'bf16'
    place = half_folder if half else folder
    kept = dict(dtype=dtype, encoder_dtype=dtype) if rank else dict(encoder_dtype=dtype)   # what is trained is float32
    cfg = config(place, lora_rank=rank, precision='bf16', iterations=1, **kept)
    result = train(cfg, left_of_right, PROMPTS, tmp_path/'run')
    assert result.metrics[0]['ratio_spread'][0] == 0. and result.policy.precision == 'bf16'
    protocol = EvalConfig(tuple(PROMPTS[:2]), (0,), 2, scorers=('left',), precision='bf16')
    scores = evaluate(result.policy, protocol, dict(left=left_of_right))['left']
    loaded = load_weights(open_policy(cfg), tmp_path/'run'/'weights')
    torch.testing.assert_close(evaluate(loaded, protocol, dict(left=left_of_right))['left'], scores, rtol=0, atol=1e-3)
    calibration = Calibration(T=3, trajectories=2, rounds=2)
    assert len(calibrate(loaded, left_of_right, PROMPTS, calibration)['values']) == 3
    stock = type(loaded)(stock_with(place, tmp_path/'run'/'weights', rank), 24, 48, max_tokens=48, **SAMPLED)
    stock.precision = 'bf16'
    torch.testing.assert_close(images(stock), images(result.policy), rtol=0, atol=.05)      # encoders in fp32 there
    judged = run_job(RunSpec('row', replace(cfg, rewards=('saturation',)), EvalConfig(
        tuple(PROMPTS[:2]), (0,), 2, scorers=('saturation',), precision='bf16'), 0, 1), tmp_path/'study')
    assert len(judged['places']['iterations']['scores']['saturation']) == 2

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
    ours = load_weights(load_policy(str(folder), 24, 48, 48, precision=cfg.precision, **SAMPLED), weights)
    torch.testing.assert_close(images(ours), tuned, rtol=0, atol=1e-4)
    theirs = type(policy)(stock_with(folder, weights, rank), 24, 48, max_tokens=48, **SAMPLED)
    theirs.precision = cfg.precision
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

COMFYUI_NAMES = dict(   # of modules that ComfyUI maps (comfy/utils.py: flux_, mmdit_, z_image_to_diffusers)
    flux=r'transformer\.(transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)'
         r'|single_transformer_blocks\.\d+\.attn\.to_[qkv])',
    sd3=r'transformer\.transformer_blocks\.\d+\.attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)',
    flux2=r'transformer\.(transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)'
          r'|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))',
    z_image=r'transformer\.(layers|(context|noise)_refiner)\.\d+\.attention\.(to_[qkv]|to_out\.0)')

def test_an_export_for_comfyui(folder, tmp_path):
    "Names and shapes as ComfyUI reads them, the scale in the values: the same image where nobody knows alpha."
    cfg = config(folder, lora_rank=4, lora_alpha=12, precision='no', iterations=1)
    result, out = train(cfg, left_of_right, PROMPTS, tmp_path/'run'), tmp_path/'out'
    shutil.copytree(tmp_path/'run'/'weights', out)
    with safe_open(comfyui_lora(cfg, out), 'pt') as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        assert not file.metadata() or 'lora_adapter_metadata' not in file.metadata()
    modules = {name.rpartition('.lora_')[0] for name in shapes}
    name = re.compile(COMFYUI_NAMES[folder.parent.name[:-1]])
    assert [each for each in modules if not name.fullmatch(each)] == []
    weights = dict(result.policy.pipe.transformer.named_parameters())
    for each in modules:
        full = weights[each.removeprefix('transformer.') + '.base_layer.weight'].shape
        assert (shapes[f'{each}.lora_A.weight'], shapes[f'{each}.lora_B.weight']) == ([4, full[1]], [full[0], 4])
    assert len(shapes) == 2*len(modules)
    stock = DiffusionPipeline.from_pretrained(folder)
    stock.load_lora_weights(out/'comfyui', weight_name='lora.safetensors')
    theirs = type(result.policy)(stock, 24, 48, max_tokens=48, **SAMPLED)
    torch.testing.assert_close(images(theirs), images(result.policy), rtol=0, atol=1e-4)
