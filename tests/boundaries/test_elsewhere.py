"Machines that are no Linux, and processes that write at once."

import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import pytest
from g2rpo.study.records import add_records, read_records

ROOT = Path(__file__).resolve().parents[2]
UNIX_ONLY = ('fcntl', 'resource', 'pwd', 'grp', 'termios', 'pty', 'syslog')
UNIX_SIGNALS = (
    'SIGHUP',
    'SIGKILL',
    'SIGUSR1',
    'SIGUSR2',
    'SIGALRM',
    'SIGQUIT',
    'SIGTSTP',
    'SIGCHLD',
    'SIGCONT',
    'SIGSTOP',
    'alarm',
    'setitimer',
    'pause',
    'pthread_kill',
    'pthread_sigmask',
)

def test_nothing_imports_what_only_unix_has():
    found = re.compile(rf'^\s*(?:import|from)\s+({"|".join(UNIX_ONLY)})\b', re.M)
    assert [(f.name, m) for f in (ROOT / 'g2rpo').rglob('*.py') for m in found.findall(f.read_text())] == []

def test_signals_are_asked_for():
    "A signal that Windows lacks is not named but by `getattr`."
    lacking = re.compile(rf'signal\.({"|".join(UNIX_SIGNALS)})\b')
    assert [(f.name, m) for f in (ROOT / 'g2rpo').rglob('*.py') for m in lacking.findall(f.read_text())] == []

ELSEWHERE = f'''
import builtins, importlib, os, pkgutil, signal, sys
import torch, diffusers, transformers, accelerate, peft, filelock, matplotlib.pyplot
real = builtins.__import__
def guarded(name, globals=None, *args, **kw):
    own = (globals or {{}}).get("__name__", "").startswith("g2rpo")
    if own and name.split(".")[0] in {UNIX_ONLY}:
        raise ImportError(name)
    return real(name, globals, *args, **kw)
builtins.__import__ = guarded
for name in {UNIX_SIGNALS}:
    if hasattr(signal, name): delattr(signal, name)
for name in ("mkfifo", "getuid", "fork", "sched_getaffinity"):
    if hasattr(os, name): delattr(os, name)
import g2rpo
for m in pkgutil.walk_packages(g2rpo.__path__, "g2rpo."):
    if not m.name.endswith("__main__"): importlib.import_module(m.name)
from g2rpo.cli.main import main
assert main(["--device"]) == 2
'''

def elsewhere(more, folder):
    done = subprocess.run([sys.executable, '-c', ELSEWHERE + more], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

def test_every_module_is_imported_elsewhere(tmp_path):
    elsewhere('', tmp_path)

@pytest.mark.slow
def test_the_demo_runs_elsewhere(tmp_path):
    words = ['demo', '--iterations', '2', '--eval-prompts', '4', '--out', 'demo']
    elsewhere(f'assert main({words}) == 0', tmp_path)
    assert (tmp_path / 'demo' / 'result.json').exists()

EMPTY = dict(
    code='0.1.0',
    machine='',
    base='',
    picture=0.0,
    config=dict(seed=0),
    protocol='',
    curve=[],
    clipped=[],
    checkpoints=[],
    places={},
    probes=[],
    others=[],
    seconds=0.0,
)

def add_some(file, writer, n):
    for i in range(n):
        add_records(file, [EMPTY | dict(name=f'row{writer}', key=f'{writer}-{i}')])

def test_writers_of_records_lose_none(tmp_path):
    "Four processes add records to one collection at once."
    file, context = tmp_path / 'runs.jsonl', multiprocessing.get_context('fork')
    writers = [context.Process(target=add_some, args=(file, writer, 15)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0] * 4
    assert len(read_records(file)) == 60 and file.read_text().count('\n') == 60
