"Training as a caller meets it: one function and a reward, runs that stop themselves, refusals."
import json

import pytest
import torch
from g2rpo import train
from g2rpo.errors import InputError, RunStopped
from g2rpo.files import read_json, read_jsonl
from helpers import PROMPTS, brightness, left_of_right, small
from PIL import Image

def without_seconds(log): return [{k: v for k, v in row.items() if k != 'seconds'} for row in log]

def test_rewards_in_every_form(mini):
    "One function, several with weights, or names of one's own; the policy is opened unless one is given."
    one = train(small(mini), left_of_right, PROMPTS)
    assert 'reward/left_of_right' in one.metrics[0] and one.policy.pipe.transformer is not None and one.out is None
    two = train(small(mini), [left_of_right, brightness], PROMPTS, weights=(1, .5)).metrics[0]
    assert {'reward/left_of_right', 'reward/brightness'} <= two.keys()
    named = dict(left_of_right=left_of_right, brightness=brightness)
    same = train(small(mini, weights=(1, .5)), named, PROMPTS).metrics[0]
    assert without_seconds([two]) == without_seconds([same])

def test_weights_of_another_number_are_refused(mini, tmp_path):
    with pytest.raises(InputError, match='weights'):
        train(small(mini), [left_of_right, brightness], PROMPTS, tmp_path/'run', weights=(1, 2, 3))
    assert not (tmp_path/'run').exists()

def test_same_seed_same_run(mini):
    "Bit for bit, LoRA's own initialisation included."
    one, two = (without_seconds(train(small(mini, lora_rank=4), left_of_right, PROMPTS).metrics) for _ in range(2))
    assert one == two

def test_training_raises_an_easy_reward(mini):
    def darkness(images, prompts): return -brightness(images, prompts)
    log = train(small(mini, iterations=6, lr=1e-3), darkness, PROMPTS).metrics
    rewards = [entry['reward/darkness'] for entry in log]
    assert sum(rewards[-2:]) > sum(rewards[:2])

def test_stopped_run_keeps_its_weights(mini, tmp_path):
    calls = []
    def sours(images, prompts):
        calls.append(len(images))
        return brightness(images, prompts) if len(calls) < 4 else torch.ones(len(images))
    with pytest.raises(RunStopped):
        train(small(mini, iterations=5), sours, PROMPTS, tmp_path/'run')
    assert (tmp_path/'run'/'metrics.jsonl').read_text().count('\n') >= 1 and any((tmp_path/'run'/'weights').iterdir())

BAD_REWARDS = [(lambda i, p: torch.ones(len(i)), 'same reward'), (lambda i, p: i.mean((1, 2, 3))/0, 'not finite'),
               (lambda i, p: i.mean(), 'must return')]

@pytest.mark.parametrize('reward, why', BAD_REWARDS, ids=[why for _, why in BAD_REWARDS])
def test_bad_rewards_stop(mini, tmp_path, reward, why):
    with pytest.raises((InputError, RunStopped), match=why):
        train(small(mini), dict(r=reward), PROMPTS, tmp_path/'run')

def test_step_that_moves_nothing_stops(mini):
    with pytest.raises(RunStopped, match='no parameter moved'):
        train(small(mini, lr=1e-30, weight_decay=0.), left_of_right, PROMPTS)

def test_non_finite_weights_stop(mini, policy):
    next(policy.pipe.transformer.parameters()).data.fill_(float('nan'))
    with pytest.raises(RunStopped, match='not finite'):
        train(small(mini), left_of_right, PROMPTS, policy=policy)

def test_out_in_use_is_refused(mini, tmp_path):
    (tmp_path/'metrics.jsonl').write_text('')
    with pytest.raises(InputError, match='already holds a run'):
        train(small(mini), left_of_right, PROMPTS, tmp_path)

def test_samples_speed_and_a_trace(mini, policy, tmp_path):
    "Pictures of the same noise on the way, a row of seconds an iteration, and the phases by name in a trace."
    cfg = small(mini, iterations=2, samples_every=1, profile=1)
    metrics = train(cfg, left_of_right, PROMPTS, tmp_path, policy=policy).metrics
    pictures = [Image.open(tmp_path/'samples'/f'{n:06d}.png') for n in (1, 2)]
    assert [p.size for p in pictures] == [(4*48, 24)]*2
    rows = read_jsonl(tmp_path/'speed.jsonl')
    assert [row['iteration'] for row in rows] == [0, 1]
    assert {'trunk', 'branches', 'completions', 'decode', 'score', 'gradient', 'optimiser'} <= rows[0]['phases'].keys()
    assert sum(rows[0]['phases'].values()) == pytest.approx(metrics[0]['seconds'], rel=.5)
    events = json.loads((tmp_path/'profile'/'000.json').read_text())['traceEvents']
    assert {f'g2rpo:{name}' for name in ('completions', 'gradient')} <= {event.get('name') for event in events}

def test_a_panel_named_in_the_config_is_watched(mini):
    "Python and the command line see the same config."
    cfg = small(mini, panel=('saturation',), panel_size=2, panel_every=1)
    looked, = train(cfg, left_of_right, PROMPTS[:4]).metrics
    assert set(looked['panel']) == {'left_of_right', 'saturation'}

def test_prompts_that_were_handed_over_are_not_recorded_as_a_set(mini, tmp_path):
    "A run says tiny only where it was the embedded set; its own name goes on without the list."
    train(small(mini), left_of_right, PROMPTS[:4], tmp_path/'own')
    assert read_json(tmp_path/'own'/'config.json')['prompts'] == 'in-memory'
    with pytest.raises(InputError, match='handed over in Python'):
        train(small(mini, prompts='in-memory'), left_of_right)
    (tmp_path/'texts.txt').write_text('\n'.join(PROMPTS[:4]))
    train(small(mini), left_of_right, str(tmp_path/'texts.txt'), tmp_path/'file')
    assert read_json(tmp_path/'file'/'config.json')['prompts'] == str(tmp_path/'texts.txt')
