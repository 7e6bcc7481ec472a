"The pictures of the demo."
import pytest
import torch
from g2rpo.cli.demo import draw_grid
from helpers import PROMPTS

@pytest.mark.parametrize('n', [2, 3, 15])
def test_any_number_of_prompts_is_drawn(n, tmp_path):
    show = (PROMPTS*2)[:min(16, n)//2*2]
    images = torch.rand(len(show), 3, 24, 48)
    draw_grid(show, images, images, ['000', '了'] + ['']*(len(show) - 2), ['']*len(show), tmp_path/'grid.png')
    assert (tmp_path/'grid.png').stat().st_size > 1000
