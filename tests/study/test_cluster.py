"The cluster's files: accelerate's configs launch, and the batch scripts go on with what they did not finish."
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from g2rpo import METHODS
from g2rpo.errors import InputError, RunStopped
from g2rpo.study.cluster import SlurmConfig, batch_script, read_slurm_config
from g2rpo.study.job import RunSpec
from g2rpo.study.launch import Study
from g2rpo.study.workers import write_specs
from g2rpo.training.evaluate import EvalConfig
from helpers import count_lines, free_port, small

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | dict(
    OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', TQDM_DISABLE='1',
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]),
    PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
FLAGS = ('--T 4 --group-size 3 --prompts-per-iteration 2 --precision no --granularities 1 --rewards mine:left '
         '--save-every 1 --out run').split()
TASK = 'SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1'      # what srun says to a process

@pytest.fixture
def here(tmp_path):
    "A folder with a reward of one's own."
    (tmp_path/'mine.py').write_text('def left(images, prompts): return images[..., 24:].mean((1, 2, 3))\n')
    return tmp_path

def with_commands(folder, **texts):
    "The environment in which the commands of `texts`, name=bash, are found before all others."
    tools = folder/'bin'
    tools.mkdir()
    for name, text in texts.items():
        (tools/name).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (tools/name).chmod(0o755)
    path = os.pathsep.join([str(tools), ENV['PATH']])
    return ENV | dict(PATH=path, MASTER_PORT=str(free_port()), ACCELERATE_USE_CPU='true')

def run(command, here, env, seconds=280):
    "A command that ends."
    return subprocess.run([*map(str, command)], cwd=here, env=env, capture_output=True, text=True, timeout=seconds)

@pytest.mark.parametrize('name, processes', [('one_gpu', 1), ('one_node', 8), ('two_nodes', 16)])
def test_configs_are_accelerates(name, processes):
    from accelerate.commands.config.config_args import load_config_from_file
    file = ROOT/'configs'/f'{name}.yaml'
    found = load_config_from_file(str(file))
    assert found.num_processes == processes and found.mixed_precision == 'no'
    assert set(yaml.safe_load(file.read_text())) >= {'distributed_type', 'num_machines'}

def test_accelerate_launches_two_processes(here, mini):
    "The config of one node, with a CPU's two processes in place of eight GPUs."
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', ROOT/'configs'/'one_node.yaml']
    train = ['-m', 'g2rpo.cli', 'train', '--model', mini, *FLAGS, '--iterations', 1, '--shard', 'yes']
    done = run([*launch, '--num_processes', 2, '--gpu_ids', '0,1', *train], here, ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((here/'run'/'config.json').read_text())['processes'] == 2
    assert count_lines(here/'run'/'metrics.jsonl') == 1

NO_OPTIONS = 'while [[ "$1" == --* ]]; do shift; done'      # of srun
SRUN = f'''{NO_OPTIONS}
{TASK} "$@" & child=$!
if [ ! -e requeued ]; then
    until [ -s run/metrics.jsonl ]; do sleep .1; done
    kill -TERM $child      # the process itself: the task is exec
fi
wait $child'''
SCONTROL = 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi'

def test_the_batch_script_queues_again_what_is_not_finished(here, mini):
    "With stand-ins for Slurm's commands: the first job hears SIGTERM after its first iteration, the second finishes."
    env = with_commands(here, srun=SRUN, scontrol=SCONTROL) | dict(SLURM_JOB_NODELIST='localhost', SLURM_JOB_ID='7')
    job = ['bash', ROOT/'scripts'/'train.sbatch', '--model', mini, *FLAGS, '--iterations', 20]
    first = run(job, here, env)
    assert first.returncode == 0 and 'Stopped by SIGTERM' in first.stdout, first.stdout + first.stderr
    assert (here/'requeued').read_text() == 'requeue 7\n'
    done = count_lines(here/'run'/'metrics.jsonl')
    assert 0 < done < 20
    second = run(job, here, env)
    printed = second.stdout + second.stderr
    assert second.returncode == 0 and f'checkpoint of iteration {done}' in second.stdout, printed
    assert count_lines(here/'run'/'metrics.jsonl') == 20 and (here/'requeued').read_text() == 'requeue 7\n'

def test_a_bad_job_is_not_queued_again(here):
    env = with_commands(here, srun='exit 2', scontrol='[ "$1" = show ] && echo localhost || touch requeued')
    job = ['bash', ROOT/'scripts'/'train.sbatch', '--out', 'run']
    done = run(job, here, env | dict(SLURM_JOB_NODELIST='x', SLURM_JOB_ID='7'))
    assert done.returncode == 2 and not (here/'requeued').exists()

def slurm_array(here):
    "An array of two tasks that run one after another when they are submitted; the first is pre-empted once."
    place = shlex.quote(str(here))
    names = 'SLURM_JOB_NODELIST=localhost SLURM_JOB_ID=9$i SLURM_ARRAY_JOB_ID=9 SLURM_ARRAY_TASK_ID=$i'
    sbatch = f'''echo "$@" >> {place}/submitted
script=$4
shift 4
task() {{ {names} bash "$script" "$@"; }}
tasks() {{
    for i in 0 1; do
        until task "$@" && [ ! -e {place}/again ]; do rm {place}/again || exit 1; done
    done >> {place}/log 2>&1
}}
( tasks "$@"; touch {place}/over ) >/dev/null 2>&1 &
echo "9;cluster"'''
    srun = f'''{NO_OPTIONS}
{TASK} "$@" & child=$!
if [ ! -e {place}/requeued ]; then
    until [ -s {place}/runs/trained/*/metrics.jsonl ]; do sleep .1; done
    kill -TERM $child
fi
wait $child'''
    scontrol = (f'if [ "$1" = show ]; then echo localhost; '
                f'else echo "$@" >> {place}/requeued; touch {place}/again; fi')
    return dict(sbatch=sbatch, squeue=f'[ -e {place}/over ] || echo 9_0 9_1', srun=srun, scontrol=scontrol)

def attempt(here, code, restarts=0):
    "One attempt of a task of a study, in a folder with a space, whose processes end with `code`; its exit code."
    script = here/'study.sbatch'
    config = SlurmConfig(requeues=2, retries=1, before=('export BEFORE="a b"',),
                         container=('env', 'IMAGE=my image.sif'))
    script.write_text(batch_script(config, ROOT/'scripts'/'study.sbatch'))
    assert subprocess.run(['bash', '-n', script]).returncode == 0
    scontrol = 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi'
    if not (here/'bin').exists():
        with_commands(here, scontrol=scontrol, srun='printf "%s\\n" "$BEFORE" "$@" > asked; exit $CODE')
    env = ENV | dict(PATH=os.pathsep.join([str(here/'bin'), ENV['PATH']]), CODE=str(code), SLURM_JOB_ID='12',
                     SLURM_ARRAY_JOB_ID='11', SLURM_ARRAY_TASK_ID='0', SLURM_RESTART_COUNT=str(restarts),
                     SLURM_JOB_NODELIST='localhost', SLURM_CPUS_PER_TASK='3')
    (here/'a study'/'jobs').mkdir(parents=True, exist_ok=True)
    return run(['bash', script, 'jobs of a study.json', 'a study'], here, env).returncode

def test_which_tasks_are_queued_again(tmp_path):
    "Asked to end: up to `requeues` times. A process lost: up to `retries` times. Its own fault: never."
    failed, mark = tmp_path/'a study'/'jobs'/'11_0.failed', tmp_path/'a study'/'jobs'/'11_0.lost'
    assert attempt(tmp_path, 0) == 0 and not failed.exists() and not (tmp_path/'requeued').exists()
    for code in (1, 2):
        assert attempt(tmp_path, code) == code and failed.read_text() == f'{code}\n'
    assert not (tmp_path/'requeued').exists()
    assert attempt(tmp_path, 75) == attempt(tmp_path, 75, restarts=1) == 0 and not failed.exists()
    assert attempt(tmp_path, 75, restarts=2) == 75 and failed.read_text() == '75\n'
    assert attempt(tmp_path, 137) == 0 and not failed.exists()
    assert attempt(tmp_path, 139, restarts=1) == 139 and mark.read_text() == '137\n139\n'
    assert (tmp_path/'requeued').read_text() == 'requeue 11_0\n'*3
    assert attempt(tmp_path, 0) == 0 and not mark.exists() and not failed.exists()

def test_what_srun_is_asked(tmp_path):
    "Lines of before, options, the container's words and the task's, each whole whatever it holds."
    attempt(tmp_path, 0)
    before, *words = (tmp_path/'asked').read_text().splitlines()
    assert before == 'a b' and words[:3] == ['--cpus-per-task=3', '--kill-on-bad-exit=0', '--wait=60']
    assert words[3:6] == ['env', 'IMAGE=my image.sif', 'bash']
    assert words[-4:] == ['g2rpo', 'jobs of a study.json', 'a study', '0']

@pytest.mark.parametrize('name', ['study', 'train'])
def test_scripts_say_the_defaults(name):
    "A batch script that is submitted by hand asks for what `SlurmConfig` has as defaults."
    script = ROOT/'scripts'/f'{name}.sbatch'
    assert subprocess.run(['bash', '-n', script]).returncode == 0
    def parts(text):
        lines = text.splitlines()
        settings = lines[lines.index('# settings'):lines.index('# end of settings')]
        return {line for line in lines if line.startswith('#SBATCH')}, set(settings)
    assert parts(script.read_text()) == parts(batch_script(SlurmConfig(), script))

BAD_TOML = {
    'partiton = "a"': "partiton='a' is not known; the keys are partition", 'nodes = "2"': "nodes='2' must be a whole",
    'nodes = true': 'nodes=True must be a whole', 'offline = 1': 'offline=1 must be true or false',
    'before = "module load cuda"': 'must be a list of texts', 'options = [1]': r'options=\[1\] must be a list',
    'nodes = 0': 'nodes=0 must be at least 1', 'retries = -1': 'retries=-1 must be at least 0',
    'time = 24:00:00': 'cannot be read', 'time = 10:00:00': 'must be a text', 'account = "a b"': 'has a space',
    'before = ["a\\nb"]': 'each line of bash',
    'gres = "gpu:8"': 'both ask for GPUs', 'nodes =': 'cannot be read', '[low]': 'low={} is not known'}

@pytest.mark.parametrize('text', BAD_TOML)
def test_a_description_is_read_strictly(tmp_path, text):
    "One line that names file, key and value."
    file = tmp_path/'slurm.toml'
    file.write_text(text + '\n')
    with pytest.raises(InputError, match=BAD_TOML[text]) as refused:
        read_slurm_config(file)
    assert str(file) in str(refused.value) and '\n' not in str(refused.value)

def test_a_description_that_is_no_file_is_refused(tmp_path):
    (tmp_path/'latin').write_bytes(b'account = "\xe9"')
    for name in ('none', '', 'latin'):
        with pytest.raises(InputError, match='cannot be read'):
            read_slurm_config(tmp_path/name)

SLOW_REWARD = '''import time
def slow(images, prompts):
    print('scoring', flush=True)
    time.sleep(60)
'''

@pytest.mark.parametrize('where', ['importing', 'scoring'])
def test_a_signal_before_the_first_iteration_gives_75(tmp_path, mini, where):
    "While torch is imported, and while the judges are tried."
    (tmp_path/'late.py').write_text(SLOW_REWARD)
    judge = EvalConfig(('a sign',), T=4, scorers=('late:slow',))
    file = write_specs(tmp_path, [RunSpec('g2rpo', small(mini, rewards=('saturation',)), judge, 0, 2)], 'one')
    command = [sys.executable, '-m', 'g2rpo.study', file, tmp_path/'runs']
    task = subprocess.Popen([*map(str, command)], cwd=tmp_path, env=ENV | dict(ACCELERATE_USE_CPU='true'),
                            stdout=subprocess.PIPE, text=True)
    try:
        if where == 'scoring':
            assert task.stdout.readline() == 'scoring\n'
        else:
            time.sleep(.7)
        task.terminate()
        assert task.wait(30) == 75
    finally:
        task.kill()
        task.communicate()

@pytest.mark.slow
def test_a_study_is_a_job_array(here, mini, monkeypatch):
    "Tasks run when submitted, the first is pre-empted once; the second study finds all done and submits nothing."
    for key, value in with_commands(here, **slurm_array(here)).items():
        monkeypatch.setenv(key, value)
    judge = EvalConfig(('a sign', 'a red sign'), T=4, scorers=('saturation',))
    short = dict(T=6, group_size=4, rewards=('saturation',))
    jobs = [RunSpec(name, small(mini, method=METHODS[name], **short), judge, 0, 4) for name in ('g2rpo', 'mix_grpo')]
    first = Study(here/'runs', 'slurm', seconds=.5).results(jobs)
    log = (here/'log').read_text()
    assert [record['places']['iterations']['iterations'] for record in first] == [4, 4], log
    assert (here/'requeued').read_text() == 'requeue 9_0\n', log
    assert '--array=0-1' in (here/'submitted').read_text() and count_lines(here/'submitted') == 1
    assert Study(here/'runs', 'slurm').results(jobs) == first and count_lines(here/'submitted') == 1

SQUEUE = '''if [ -e asked ]
then echo "slurm_load_jobs error: Invalid job id specified" >&2
else touch asked; echo "Unable to contact slurm controller" >&2
fi
exit 1'''

def test_an_array_that_is_over_without_results_is_not_waited_for(here, monkeypatch):
    "A controller that does not answer is asked again."
    monkeypatch.setenv('PATH', with_commands(here, sbatch='echo 9', squeue=SQUEUE)['PATH'])
    monkeypatch.chdir(here)
    with pytest.raises(RunStopped, match='task 9_0, g2rpo with seed 0, is over and has no result'):
        Study(here/'runs', 'slurm', seconds=.1).results([RunSpec('g2rpo', small('tiny'), EvalConfig(('x',)), 0, 2)])
