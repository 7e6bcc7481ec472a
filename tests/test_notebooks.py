"Every notebook runs from top to bottom."
from pathlib import Path

import papermill
import pytest

NBS = Path(__file__).resolve().parents[1]/'nbs'
SHORT = {'pretrain_tiny': dict(vae_steps=2, flow_steps=2, batch=4)}

@pytest.mark.parametrize('path', sorted(NBS.glob('*.ipynb')), ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    parameters = SHORT.get(path.stem, {})
    if path.stem == 'pretrain_tiny': parameters['out'] = str(tmp_path/'tiny_flux')
    papermill.execute_notebook(path, tmp_path/path.name, parameters, cwd=NBS, kernel_name='python3', progress_bar=False)
