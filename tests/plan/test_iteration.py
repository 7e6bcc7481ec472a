"Counts of operations against formulas and other counts, and seconds of an iteration by hand."
from dataclasses import replace

import pytest
import torch
from g2rpo.core.rows import METHODS
from g2rpo.models.random_pipelines import random_pipeline
from g2rpo.models.weights import make_trainable
from g2rpo.plan.flops import count_flops, flop_counts, scorer_flops
from g2rpo.plan.iteration import estimate_iteration, H200, NETWORKS, ring_seconds
from g2rpo.plan.passes import count_passes, iteration_flops, run_flops
from g2rpo.plan.sizes import forward_pass, gradient_pass, trace_passes
from g2rpo.training.config import open_policy
from g2rpo.training.presets import paper, tiny
from torch.nn.attention import sdpa_kernel, SDPBackend

def plain(**changes):
    "The paper's preset without the options that make it fast."
    off = dict(gather_once=False, gather_dtype='fp32', scorer_precision='no', compiled=False, offload=True)
    return paper(**off | changes)

@pytest.mark.parametrize('kind', ['flux', 'sd3', 'flux2', 'z_image'])
@pytest.mark.parametrize('lora', [0, 4])
def test_a_count_without_weights_is_that_of_real_tensors(kind, lora, tmp_path):
    "Also with blocks of one kind counted once, under LoRA, and with checkpointing."
    random_pipeline(kind).save_pretrained(tmp_path)
    cfg = tiny(model=str(tmp_path), precision='no', lora_rank=lora, checkpointing=bool(lora), height=48, width=48)
    policy = open_policy(cfg)
    make_trainable(policy, lora)
    policy.pipe.tokenizer_max_length = 77     # as published pipelines have it; that of the small ones is shorter
    policy.encode = lambda prompts: policy.empty_condition(len(prompts))
    found = flop_counts(cfg)
    with sdpa_kernel(SDPBackend.MATH):     # the counter knows no attention that is fused on a CPU
        assert count_flops(lambda: forward_pass(policy, cfg, 1)) == found.forward
        assert count_flops(lambda: gradient_pass(policy, cfg, 1)) == found.gradient
        assert count_flops(lambda: policy.decode(torch.zeros(1, *policy.latent_shape))) == found.decode

def test_flux_as_it_was_counted_before():
    "An independent count of Flux.1-dev: 37.3 TFLOP at 720², 74.4 at 1024², and 5.0 for the VAE at 720²."
    small, large = flop_counts(paper()), flop_counts(paper(), 1024, 1024)
    for counted, known in ((small.forward, 37.3e12), (large.forward, 74.4e12), (small.decode, 5.0e12)):
        assert counted == pytest.approx(known, rel=.02)

def test_the_pieces_of_an_iteration():
    "G²RPO: 149 passes of a rollout, 8 with gradient, 288 images: 165 gathers. DanceGRPO: 108 passes with gradient."
    passes = count_passes(paper(), 16)
    assert (len(passes.walk + passes.completion), passes.updates, passes.images) == (149, ((1,),)*8, 288)
    dance = count_passes(replace(paper(), method=METHODS['dance_grpo']), 16)
    assert sum(map(len, dance.updates)) == 108 and len(dance.updates) == 3
    gathers = estimate_iteration(plain(), 16, NETWORKS[1]).busy['gathers']
    whole = 4*11_901_408_320
    assert gathers == pytest.approx(165*ring_seconds(whole, 16, NETWORKS[1]))
    assert estimate_iteration(paper(), 16, NETWORKS[1]).busy['gathers'] == pytest.approx(
        8*ring_seconds(whole//2, 16, NETWORKS[1]))

ROWS = {   # changes of the config, seconds by another estimate with 8 × 400G, 4 × 200G, 1 × 200G
    'without options': ({}, (205, 220, 330)),
    'kept': (dict(gather_once=True), (195, 200, 215))}

@pytest.mark.parametrize('row', ROWS)
def test_an_iteration_of_the_paper(row):
    changes, known = ROWS[row]
    for network, seconds in zip(NETWORKS, known):
        assert estimate_iteration(plain(**changes), 16, network).total == pytest.approx(seconds, rel=.06)

@pytest.mark.parametrize('network', NETWORKS, ids=str)
def test_an_iteration_of_the_preset_is_below_160_seconds(network):
    found = estimate_iteration(paper(), 16, network)
    assert found.total <= 160 and found.bound == 'computing'

def test_options_never_cost_time():
    for network in NETWORKS:
        slow = estimate_iteration(plain(), 16, network).total
        options = dict(gather_dtype='bf16', gather_once=True, scorer_precision='bf16', compiled=True, hybrid=True)
        for option, value in options.items():
            assert estimate_iteration(plain(**{option: value}), 16, network).total <= slow

def test_an_infinite_network_leaves_the_operations():
    "Without offloading, seconds are operations over speeds: those of all processes together are those of the run."
    cfg = plain(offload=False, scorer_precision='bf16')
    alone = estimate_iteration(cfg, 1, NETWORKS[0], replace(H200, link=float('inf')))
    assert alone.total == pytest.approx(iteration_flops(cfg)/H200.bf16)
    assert run_flops(cfg, 3) == 3*iteration_flops(cfg)
    assert iteration_flops(cfg) - iteration_flops(replace(cfg, rewards=('clip',))) == (
        count_passes(cfg).images*scorer_flops(['hps21']))

def test_rows_of_a_study_share_a_trace():
    rows = [trace_passes(tiny(method=METHODS[name], lr=lr), 4, False) for name, lr in (('g2rpo', 1.), ('mix_grpo', 2.))]
    assert rows[0] is rows[1]
    assert trace_passes(tiny(method=METHODS['flow_grpo']), 4, False) is not rows[0]      # it has a KL term
