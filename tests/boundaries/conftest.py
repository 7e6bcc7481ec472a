import pytest
from bench import Bench

@pytest.fixture(scope='session')
def bench(tmp_path_factory, mini): return Bench(tmp_path_factory.mktemp('bench'), mini).fill()

@pytest.fixture
def here(bench, monkeypatch):
    "The bench, with its folder as the working one."
    monkeypatch.chdir(bench.folder)
    return bench
