"The engine on a real pipeline."
import torch
from g2rpo import METHODS
from g2rpo.core.naive import naive_rollout
from g2rpo.core.rollout import rollout
from helpers import PROMPTS

def test_engine_equals_naive_loop_on_the_pipeline(policy):
    method, two = METHODS['g2rpo'], PROMPTS[:2]
    slow, fast = naive_rollout(policy, method, two, 6, 2), rollout(policy, method, two, 6, 2, batch_size=7)
    torch.testing.assert_close(fast.old_log_prob, slow.old_log_prob, rtol=0, atol=1e-4)
    for lam in method.granularities:
        torch.testing.assert_close(fast.x0[lam], slow.x0[lam], rtol=0, atol=1e-3)
