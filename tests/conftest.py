"Shared by all tests: the repository root, the reference values, a policy small enough to build in a test."
import json
import os
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: idle threads must not starve busy ones
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import pytest

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='session')
def root() -> Path: return ROOT

@pytest.fixture(scope='session')
def vectors() -> dict:
    "Float64 reference values of the published formulas."
    return json.loads((ROOT/'tests'/'data'/'vectors.json').read_text())

@pytest.fixture
def policy():
    "The embedded pipeline."
    from g2rpo.models.loading import load_policy
    return load_policy('tiny', 24, 48, 16)
