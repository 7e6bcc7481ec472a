"Shared by all tests: the root, the reference values, and a pipeline that is small enough to train in a second."
import json
import os
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: idle threads must not starve busy ones
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('TQDM_DISABLE', '1')
import pytest

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='session')
def root() -> Path: return ROOT

@pytest.fixture(scope='session')
def vectors() -> dict:
    "Float64 reference values of the published formulas."
    return json.loads((ROOT/'tests'/'data'/'vectors.json').read_text())

@pytest.fixture(scope='session')
def mini(tmp_path_factory) -> Path:
    "The embedded pipeline with a random transformer of two thin blocks: a fifth of the time, the same code."
    from diffusers import FluxPipeline
    from g2rpo.models.loading import TINY
    from helpers import thin_transformer
    folder = tmp_path_factory.mktemp('mini')/'pipeline'
    pipe = FluxPipeline.from_pretrained(TINY)
    pipe.transformer = thin_transformer(pipe)
    pipe.save_pretrained(folder)
    return folder

@pytest.fixture
def policy(mini):
    "A fresh policy of `mini`."
    from g2rpo.models.loading import load_policy
    return load_policy(str(mini), 24, 48, 16)
