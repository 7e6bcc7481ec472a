"A long run keeps its memory and descriptors, and Ctrl-C leaves no process behind, whoever launched it."
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from g2rpo import train
from helpers import PROMPTS, left_of_right, small
from kills import in_child

TESTS = Path(__file__).resolve().parents[1]
WARM = 10      # iterations before memory is measured: allocators and caches fill

def resident():
    "Bytes of this process that are in memory."
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')

def descriptors(): return len(os.listdir('/proc/self/fd'))

@pytest.mark.slow
def test_thirty_iterations_take_no_more_than_ten(tmp_path):
    "With checkpoints, a panel's worth of scoring and every file of a run: flat within 2 %."
    def work():
        cfg = small('tiny', iterations=30, save_every=2, panel=('saturation', 'edge_density'), panel_every=5)
        seen = []
        train(cfg, dict(r=left_of_right), PROMPTS, tmp_path/'run',
              on_iteration=lambda row: seen.append((resident(), descriptors())))
        (tmp_path/'seen').write_text(json.dumps(seen))
    assert in_child(work) == 0
    seen = json.loads((tmp_path/'seen').read_text())
    memory, opened = zip(*seen[WARM:])
    grown = sum(memory[-5:])/sum(memory[:5]) - 1
    print(f'{len(seen)} iterations: memory {grown:+.2%}, descriptors {min(opened)} to {max(opened)}')
    assert len(seen) == 30 and abs(grown) < .02 and min(opened) == max(opened)

def marked(mark):
    "Processes that have `mark` in their environment, however deep below the first."
    found = []
    for place in Path('/proc').glob('[0-9]*'):
        try:
            if mark in (place/'environ').read_bytes() and b'\0' in (place/'cmdline').read_bytes():
                found.append(int(place.name))
        except OSError:
            continue      # it is gone, or of another user
    return found

STUDY = """
import sys
from g2rpo.study.job import RunSpec
from g2rpo.study.launch import Study
from g2rpo.training.evaluate import EvalConfig
from helpers import small
if __name__ == '__main__':
    jobs = [RunSpec('g2rpo', small(sys.argv[1], iterations=10000, rewards=('saturation',), seed=seed),
                    EvalConfig(('a sign',), T=4, scorers=('saturation',)), 0, 10000) for seed in range(3)]
    Study('runs', sys.argv[2], 2).results(jobs)
"""
TORCHRUN = '-m torch.distributed.run --standalone --nproc_per_node=2 -m g2rpo.cli train'
TRAIN = '--T 4 --group-size 3 --granularities 1 --rewards saturation --iterations 10000 --out runs --model'
LAUNCHERS = dict(inline='study.py MODEL inline', accelerate='study.py MODEL accelerate',
                 train=f'-m g2rpo.cli train {TRAIN} MODEL', torchrun=f'{TORCHRUN} {TRAIN} MODEL')

@pytest.mark.slow
@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_ctrl_c_leaves_no_process(mini, tmp_path, launcher):
    (tmp_path/'study.py').write_text(STUDY)
    mark = uuid.uuid4().hex
    env = os.environ | dict(MARK=mark, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', TQDM_DISABLE='1',
                            PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    words = LAUNCHERS[launcher].replace('MODEL', str(mini)).split()
    with open(tmp_path/'said', 'w') as said:
        one = subprocess.Popen([sys.executable, *words], cwd=tmp_path, env=env, stdout=said, stderr=said,
                               start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        until = time.time() + 300
        while not any(file.stat().st_size for file in tmp_path.rglob('metrics.jsonl')):
            assert one.poll() is None and time.time() < until, (tmp_path/'said').read_text()[-2000:]
            time.sleep(.2)
        before = marked(mark.encode())
        os.killpg(one.pid, signal.SIGINT)        # as a terminal does: to all of the group
        one.wait(timeout=120)
        until = time.time() + 20
        while (left := marked(mark.encode())) and time.time() < until:
            time.sleep(.2)
    finally:
        for pid in marked(mark.encode()):
            os.kill(pid, signal.SIGKILL)
    print(f'{launcher}: {len(before)} processes, {len(left)} left')
    assert before and not left
