"Every notebook runs from top to bottom."
import json
from pathlib import Path

import papermill
import pytest

NBS = Path(__file__).resolve().parents[1]/'nbs'
COLLECTED = NBS.parent/'paper_figures'/'results'/'compare.json'   # what compare.ipynb judges; without it the small study below runs the notebook whole
SHORT = {'pretrain_tiny': dict(vae_steps=2, flow_steps=2, batch=4)}

@pytest.mark.parametrize('path', sorted(p for p in NBS.glob('*.ipynb') if p.stem != 'compare' or COLLECTED.exists()), ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    parameters = SHORT.get(path.stem, {})
    if path.stem == 'pretrain_tiny': parameters['out'] = str(tmp_path/'tiny_flux')
    papermill.execute_notebook(path, tmp_path/path.name, parameters, cwd=NBS, kernel_name='python3', progress_bar=False)

def test_a_study_runs_and_goes_on(tmp_path):
    "Two rows, two seeds, nearly no budget: the notebook searches, runs, collects and judges; a second pass finds everything done."
    small = dict(run=True, folder=str(tmp_path/'runs'), results=str(tmp_path/'study.json'), budget=800, iterations=1, seeds=2, eval_prompts=3, search_prompts=3, rows='flow_grpo_fast,g2rpo_no_mgai', other_seeds=2)
    def execute(): return papermill.execute_notebook(NBS/'compare.ipynb', tmp_path/'out.ipynb', small, cwd=NBS, kernel_name='python3', progress_bar=False)
    execute()
    made = {f: f.stat().st_mtime_ns for f in (tmp_path/'runs').rglob('*.json')}
    first = json.loads((tmp_path/'study.json').read_text())
    assert len(first['runs']) == 4 and all(r['places'].keys() == {'budget', 'iterations'} for r in first['runs'])
    gone = next((tmp_path/'runs').glob('flow_grpo_fast-1-*.json'))
    gone.unlink()
    execute()
    again = json.loads((tmp_path/'study.json').read_text())
    assert {f: f.stat().st_mtime_ns for f in (tmp_path/'runs').rglob('*.json') if f != gone} == {f: t for f, t in made.items() if f != gone}
    for a, b in zip(first['runs'], again['runs']): assert {p: v['scores'] for p, v in a['places'].items()} == {p: v['scores'] for p, v in b['places'].items()}
