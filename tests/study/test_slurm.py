"A study on a real Slurm of this machine: pre-empted again and again, it gives what it gives undisturbed."
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from g2rpo.errors import RunStopped
from g2rpo.study.job import RunSpec
from g2rpo.study.launch import Study
from g2rpo.training.evaluate import EvalConfig
from helpers import count_lines, free_port, row, small
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ('munged', 'mungekey', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'scontrol', 'scancel')
MISSING = [name for name in PROGRAMS if not shutil.which(name)]
REASON = f'Slurm is not installed here ({", ".join(MISSING)}): apt-get install slurm-wlm munge' if MISSING else ''
if not REASON and os.geteuid():
    REASON = 'the daemons of Slurm are started by root'
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

CONF = '''ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={other}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
JobRequeue=1
MinJobAge=3000
KillWait=5
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
'''

def answer(*words):
    "What a command prints; it has to succeed."
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, f'{words}: {done.stdout}{done.stderr}'
    return done.stdout

def until(condition, seconds=60, what=''):
    "Wait for something, not for ever."
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f'{what or condition} did not happen within {seconds} seconds'
        time.sleep(.02)

def ended(pid):
    "Whether a process is gone."
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False

def end_daemons(home):
    "Cancel all jobs and end the daemons by their pid files."
    subprocess.run(['scancel', '--user', 'root'], capture_output=True)
    time.sleep(2)
    for name in ('slurmd', 'slurmctld', 'munged'):
        file = home/f'{name}.pid'
        if file.exists() and file.read_text().strip():
            pid = int(file.read_text())
            os.kill(pid, signal.SIGTERM)
            until(lambda: ended(pid), 30, f'the end of {name}')

@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "A cluster of one node with two cores, a partition low and one by which it is pre-empted; the path of its files."
    home = tmp_path_factory.mktemp('slurm')
    home.chmod(0o755)
    host = socket.gethostname().split('.')[0]
    conf = home/'slurm.conf'
    conf.write_text(CONF.format(host=host, home=home, port=free_port(), other=free_port()))
    for name in ('state', 'spool'):
        (home/name).mkdir()
    patch = pytest.MonkeyPatch()
    patch.setenv('SLURM_CONF', str(conf))
    try:
        answer('mungekey', '--create', '--keyfile', home/'munge.key')
        files = [f'--{name}-file={home}/munged.{name}' for name in ('pid', 'log', 'seed')]
        answer('munged', '--force', f'--key-file={home}/munge.key', f'--socket={home}/munge.socket', *files)
        answer('slurmctld')
        answer('slurmd')
        def idle(): return 'idle' in subprocess.run(['sinfo', '-h'], capture_output=True, text=True).stdout
        until(idle, 60, 'an idle node')
        yield home
    finally:
        end_daemons(home)
        patch.undo()

TOML = '''partition = "low"
time = "30:00"
nodes = 1
tasks_per_node = 2
gpus_per_node = 0
cpus_per_task = 1
mem = ""
signal = 60
retries = 1
'''
MINE = '''import os, time
from pathlib import Path
from g2rpo.training import checkpoint, signals
HERE, PHASE = Path(__file__).parent, ['in an iteration']
fsync, write, handle = checkpoint.fsync, checkpoint.write_checkpoint, signals.SignalHandler.handle

def left(images, prompts):
    time.sleep(.7)
    return images[..., 24:].mean((1, 2, 3))

def lost(images, prompts):
    "Its process is killed once, in the middle of the training."
    if not (HERE/'killed').exists() and list(HERE.glob('runs/trained/*/checkpoints/000001')):
        (HERE/'killed').touch()
        os.kill(os.getpid(), 9)
    return left(images, prompts)

def slow_disk(path):
    time.sleep(.2)
    fsync(path)

def save(*args):
    PHASE.append('in a save')
    try:
        write(*args)
    finally:
        PHASE.pop()

def heard(self, number, frame):
    "Write down what process 0 was doing when a signal came."
    if os.environ.get('RANK') == '0':
        with open(HERE/'heard', 'a') as file:
            print(PHASE[-1], file=file)
    handle(self, number, frame)

checkpoint.fsync, checkpoint.write_checkpoint, signals.SignalHandler.handle = slow_disk, save, heard
'''
ENV = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', TQDM_DISABLE='1', ACCELERATE_USE_CPU='true',
           PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]),
           PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))

@pytest.fixture
def here(cluster, tmp_path, monkeypatch):
    "A folder with a space in its name, where the cluster is described and a reward is defined."
    place = tmp_path/'a study'
    place.mkdir()
    (place/'slurm.toml').write_text(TOML)
    (place/'mine.py').write_text(MINE)
    for name, value in (ENV | dict(G2RPO_SLURM=str(place/'slurm.toml'))).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(place)
    return place

def study_jobs(mini, iterations=4, reward='mine:left'):
    "Three jobs of seconds: a shared trunk, a window that moves, and a method that averages from its eighth step on."
    judge = EvalConfig(('a sign', 'a red sign'), T=4, scorers=('saturation',))
    rows = dict(g2rpo=row('g2rpo', granularities=(1, 2)), mix_grpo=row('mix_grpo'), averaged=row('flow_grpo', ema=.9))
    configs = {name: small(mini, method=method, T=6, group_size=4, rewards=(reward,)) for name, method in rows.items()}
    return [RunSpec(name, cfg, judge, 0, max(iterations, 8*(name == 'averaged'))) for name, cfg in configs.items()]

def without_seconds(value):
    "A record without times."
    if isinstance(value, dict):
        return {key: without_seconds(each) for key, each in value.items() if key != 'seconds'}
    return [without_seconds(each) for each in value] if isinstance(value, list) else value

def restarts(folder):
    "Task → how often Slurm started it again, of all tasks with a log."
    tasks = sorted(log.stem for log in (folder/'jobs').glob('*.log'))
    return {task: int(re.search(r'Restarts=(\d+)', answer('scontrol', 'show', 'job', task))[1]) for task in tasks}

def rows_so_far(folder): return sum(count_lines(file) for file in folder.glob('trained/*/metrics.jsonl'))

def pre_empt(folder, draw, alive):
    "Let a job of the high partition take the node, some moment after another iteration is done."
    before = rows_so_far(folder)
    until(lambda: rows_so_far(folder) > before or not alive(), 400, 'another iteration')
    time.sleep(draw.uniform(0, 4))
    if not alive():
        return
    options = '--parsable', '--partition=high', '--ntasks=2', '--output=/dev/null'
    job = answer('sbatch', *options, '--wrap', 'true').strip()
    until(lambda: job not in answer('squeue', '-h', '-o', '%i').split(), 120, 'the end of the other job')

class Waiting(Thread):
    "A study that is waited for beside the test."
    def __init__(self, study, jobs):
        super().__init__(daemon=True)
        self.study, self.jobs, self.records = study, jobs, None

    def run(self): self.records = self.study.results(self.jobs)

def assert_same_snapshots(one, other):
    "All weights that two studies keep, to the last bit; how many tensors."
    names = sorted(file.relative_to(one) for file in one.glob('trained/*/at/*.safetensors'))
    assert names == sorted(file.relative_to(other) for file in other.glob('trained/*/at/*.safetensors')) and names
    count = 0
    for name in names:
        a, b = load_file(one/name), load_file(other/name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
        count += len(a)
    return count

def test_pre_empted_again_and_again(here, mini):
    "Records, metrics and snapshots of a study that lost its node five times or more: those of an undisturbed one."
    jobs, draw = study_jobs(mini), random.Random(0)
    straight = Study(here/'straight', 'slurm', seconds=.5).results(jobs)
    assert set(restarts(here/'straight').values()) == {0} and not (here/'heard').exists()
    waiting, heard, again = Waiting(Study(here/'runs', 'slurm', seconds=.5), jobs), [], {}
    waiting.start()
    while waiting.is_alive() and (sum(again.values()) < 5 or len(set(heard)) < 2):
        pre_empt(here/'runs', draw, waiting.is_alive)
        again = restarts(here/'runs')
        heard = (here/'heard').read_text().splitlines() if (here/'heard').exists() else []
    waiting.join(900)
    assert waiting.records, 'the study was not finished'
    again = restarts(here/'runs')
    assert sum(again.values()) >= 5 and set(heard) == {'in an iteration', 'in a save'}, (again, heard)
    assert without_seconds(waiting.records) == without_seconds(straight)
    tensors = assert_same_snapshots(here/'straight', here/'runs')
    print(f'started again: {again}; signals: { {where: heard.count(where) for where in set(heard)} }; '
          f'{len(jobs)} records and {tensors} tensors equal')

def test_a_task_that_fails_is_reported_at_once(here, mini):
    "Its own fault is said, with its log, while other tasks are queued; it is not queued again."
    good, bad = study_jobs(mini, 40)[0], study_jobs(mini, 1, 'mine:nothing')[0]
    with pytest.raises(RunStopped, match=r"_0, g2rpo with seed 0, ended with 2: g2rpo: reward='mine:nothing'"):
        Study(here/'runs', 'slurm', seconds=.5).results([bad, good])
    assert answer('squeue', '-h') and restarts(here/'runs')[next((here/'runs'/'jobs').glob('*_0.log')).stem] == 0
    answer('scancel', '--user', 'root')

def test_a_lost_process_is_tried_again(here, mini):
    "A process that is killed once takes the task with it, which goes on from its checkpoint."
    job = study_jobs(mini, 3, 'mine:lost')[0]
    record, = Study(here/'runs', 'slurm', seconds=.5).results([job])
    assert (here/'killed').exists() and [*restarts(here/'runs').values()] == [1]
    assert record['places']['iterations']['iterations'] == 3
    until(lambda: not list((here/'runs'/'jobs').glob('*.lost')), 30, 'the end of its batch script')
    assert not list((here/'runs'/'jobs').glob('*.failed'))
