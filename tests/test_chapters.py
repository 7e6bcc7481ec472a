"Every chapter runs from top to bottom."
import json
from pathlib import Path

import papermill
import pytest
from chapters import run_chapter
from g2rpo.study.reproduction import experiment_names

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
CHAPTERS = sorted(p for p in NBS.rglob('*.ipynb') if p.stem not in (*experiment_names(), 'figures', 'pretrain_tiny'))
LONG = ('study/03_run_job', 'study/07_launch', 'study/16_dry_run', 'training/14_panel', 'plan/05_memory',
        'plan/07_passes', 'plan/08_iteration', 'rewards/03_ocr')      # half a minute or more

def chapter_name(path): return path.relative_to(NBS).with_suffix('').as_posix()

def with_mark(path): return pytest.param(path, marks=[pytest.mark.slow] if chapter_name(path) in LONG else [])

def execute(path, out, parameters=None):
    "A notebook by papermill, from its own folder."
    quiet = dict(kernel_name='python3', progress_bar=False)
    return papermill.execute_notebook(path, out/path.name, parameters or {}, cwd=path.parent, **quiet)

@pytest.mark.parametrize('path', [*map(with_mark, CHAPTERS)], ids=chapter_name)
def test_chapter(path, tmp_path):
    log = tmp_path/'log'
    assert run_chapter(path, log) == 0, log.read_text()[-3000:]

@pytest.mark.parametrize('cell, code', [('x = 1', 0), ('assert x == 1', 1), ('import sys; sys.exit(0)', 1)])
def test_a_chapter_that_fails_is_found(tmp_path, cell, code):
    notebook = tmp_path/'chapter.ipynb'
    notebook.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=[cell])])))
    assert run_chapter(notebook, tmp_path/'log') == code

def test_long_chapters_are_there(): assert set(LONG) <= set(map(chapter_name, CHAPTERS))

def test_the_embedded_model_is_trained_again(tmp_path):
    "A few steps of what made the shipped weights."
    short = dict(vae_steps=2, flow_steps=4, look_every=2, batch_size=4, out=str(tmp_path/'tiny_flux'))
    execute(NBS/'pretrain_tiny.ipynb', tmp_path, short)

PICTURES = ('before_after', 'groups', 'hacking', 'learning', 'spread_by_step', 'tree')

@pytest.mark.slow
def test_figures_are_the_same_bytes_again(tmp_path):
    for out in ('a', 'b'):
        execute(NBS/'figures.ipynb', tmp_path, dict(out=str(tmp_path/out)))
    made = sorted(f.name for f in (tmp_path/'a').iterdir())
    assert made == sorted(f'{name}.{kind}' for name in PICTURES for kind in ('png', 'pdf'))
    for name in made:
        assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes(), name
