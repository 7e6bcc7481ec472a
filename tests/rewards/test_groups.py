"Rewards that compare the images of one prompt: scored in whole groups, trained on, and not judged by."
import pytest
import torch
from g2rpo import evaluate, train
from g2rpo.core.rollout import rollout
from g2rpo.core.velocity import Ledger
from g2rpo.errors import InputError
from g2rpo.rewards.groups import RankReward, WinRate
from g2rpo.rewards.protocol import call_reward
from g2rpo.training.config import open_policy
from g2rpo.training.evaluate import EvalConfig
from g2rpo.training.update import broken_groups, score_rollout
from helpers import left_of_right, PROMPTS, small

def scored(mini, reward, batch_size=8, spoil=False):
    "Rewards (Λ, V, P, G) of one rollout; `spoil` breaks a member of the second group."
    cfg, ledger = small(mini), Ledger()
    policy = open_policy(cfg)
    roll = rollout(policy, cfg.method, PROMPTS[:2], cfg.T, cfg.group_size)
    if spoil:
        list(roll.x0.values())[0][0, 1, 2] = torch.nan
    return score_rollout(policy, roll, dict(r=reward), batch_size, ledger)['r'], roll, ledger

@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_groups_are_scored_whole(mini, batch_size):
    "Ranks within each group of each endpoint, however many images are decoded at a time."
    plain, _, spent = scored(mini, left_of_right)
    ranks, _, ledger = scored(mini, RankReward(left_of_right), batch_size)
    G = plain.shape[-1]
    for flat, rank in zip(plain.flatten(0, 2), ranks.flatten(0, 2)):
        for i in range(G):
            others = [float(flat[i] > flat[j]) + float(flat[i] == flat[j])/2 for j in range(G) if j != i]
            assert rank[i].item() == pytest.approx(sum(others)/len(others), abs=1e-6)
    assert (ledger.decodes, ledger.scored) == (spent.decodes, spent.scored)

def test_a_group_with_a_broken_member_is_not_shown(mini):
    seen = []
    def judge(images, others, prompts):
        seen.extend(prompts)
        return torch.full((len(images),), .5)
    ranks, roll, _ = scored(mini, WinRate(judge), spoil=True)
    broken, problems = broken_groups(dict(r=ranks), roll, 0, 0)
    assert broken.tolist() == [False, True] and 'latents not finite' in problems[0]
    assert ranks[0, 0, 1].isnan().all() and ranks[:, :, 0].isfinite().all()

def test_a_run_learns_from_ranks_and_is_watched_by_single_images(mini):
    cfg = small(mini, iterations=2, panel=('saturation',), panel_every=1, panel_size=2)
    result = train(cfg, dict(ranks=RankReward(left_of_right)), PROMPTS)
    assert all(row['reward/ranks'] == pytest.approx(.5) for row in result.metrics)
    assert result.metrics[-1]['grad_norm'][0] > 0

def test_an_evaluation_refuses_it(mini):
    cfg = small(mini)
    protocol = EvalConfig(tuple(PROMPTS[:2]), (0,), 2, cfg.height, cfg.width, ('ranks',))
    with pytest.raises(InputError, match='compares the images of a group, and here are single ones'):
        evaluate(open_policy(cfg), protocol, dict(ranks=RankReward(left_of_right)))

def test_a_judge_must_give_probabilities():
    images = torch.rand(6, 3, 4, 4)
    for wrong in (lambda a, b, p: torch.full((len(a),), 2.), lambda a, b, p: torch.zeros(3), lambda a, b, p: 'yes'):
        with pytest.raises(InputError, match='probabilities that the first image is better'):
            call_reward('wins', WinRate(wrong), images, ['a']*3 + ['b']*3, members=3)
