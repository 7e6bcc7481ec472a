"The cluster's files: accelerate's configs launch, and the batch scripts go on with what they did not finish."
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from g2rpo import METHODS
from g2rpo.errors import RunStopped
from g2rpo.study.job import RunSpec
from g2rpo.study.launch import Study
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

SRUN = f'''shift
{TASK} "$@" & child=$!
if [ ! -e requeued ]; then
    until [ -s run/metrics.jsonl ]; do sleep .1; done
    pkill -TERM -P $child || kill -TERM $child
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
    place, script = (shlex.quote(str(path)) for path in (here, ROOT/'scripts'/'study.sbatch'))
    names = 'SLURM_JOB_NODELIST=localhost SLURM_ARRAY_JOB_ID=9 SLURM_ARRAY_TASK_ID=$i'
    sbatch = f'''echo "$@" >> {place}/submitted
shift 4
task() {{ {names} bash {script} "$@"; }}
tasks() {{
    for i in 0 1; do
        until task "$@" && [ ! -e {place}/again ]; do rm {place}/again || exit 1; done
    done >> {place}/log 2>&1
}}
( tasks "$@"; touch {place}/over ) >/dev/null 2>&1 &
echo "9;cluster"'''
    srun = f'''shift
{TASK} "$@" & child=$!
if [ ! -e {place}/requeued ]; then
    until [ -s {place}/runs/trained/*/metrics.jsonl ]; do sleep .1; done
    kill -TERM $child
fi
wait $child'''
    scontrol = (f'if [ "$1" = show ]; then echo localhost; '
                f'else echo "$@" >> {place}/requeued; touch {place}/again; fi')
    return dict(sbatch=sbatch, squeue=f'[ -e {place}/over ] || echo RUNNING', srun=srun, scontrol=scontrol)

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
    with pytest.raises(RunStopped, match='1 runs have no result'):
        Study(here/'runs', 'slurm', seconds=.1).results([RunSpec('g2rpo', small('tiny'), EvalConfig(('x',)), 0, 2)])
