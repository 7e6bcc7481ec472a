"The cluster's files: accelerate's configs launch, and the batch script takes up what it did not finish."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ENV = os.environ | {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'TQDM_DISABLE': '1', 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
RUN = ['--T', '4', '--group-size', '3', '--prompts-per-iteration', '2', '--precision', 'no', '--granularities', '1', '--rewards', 'mine:left', '--save-every', '1']

@pytest.fixture
def here(tmp_path):
    (tmp_path/'mine.py').write_text('def left(images, prompts): return images[..., 24:].mean((1, 2, 3))\n')
    return tmp_path

@pytest.mark.parametrize('name, processes', [('one_gpu', 1), ('one_node', 8), ('two_nodes', 16)])
def test_configs_are_accelerates(name, processes):
    from accelerate.commands.config.config_args import load_config_from_file
    found = load_config_from_file(str(ROOT/'configs'/f'{name}.yaml'))
    assert found.num_processes == processes and found.mixed_precision == 'no'
    assert set(yaml.safe_load((ROOT/'configs'/f'{name}.yaml').read_text())) >= {'distributed_type', 'num_machines'}

def test_accelerate_launches_two_processes(here):
    "The config of one node, with a CPU's two processes in place of eight GPUs."
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(ROOT/'configs'/'one_node.yaml'), '--num_processes', '2', '--gpu_ids', '0,1', '-m', 'g2rpo.cli', 'train', *RUN, '--iterations', '1', '--shard', 'yes', '--out', 'run'],
        cwd=here, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((here/'run'/'config.json').read_text())['processes'] == 2 and len((here/'run'/'metrics.jsonl').read_text().splitlines()) == 1

def test_the_batch_script_queues_again_what_is_not_finished(here):
    "With stand-ins for Slurm's own commands: the first job hears SIGTERM after its first iteration, the second finishes."
    tools = here/'bin'
    tools.mkdir()
    for name, text in (('srun', 'shift; SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 "$@" & child=$!\nif [ ! -e requeued ]; then until [ -s run/metrics.jsonl ]; do sleep .1; done; pkill -TERM -P $child || kill -TERM $child; fi\nwait $child'),
                       ('scontrol', 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi')):
        (tools/name).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (tools/name).chmod(0o755)
    env = ENV | {'PATH': f'{tools}:{ENV["PATH"]}', 'SLURM_JOB_NODELIST': 'localhost', 'SLURM_JOB_ID': '7', 'MASTER_PORT': '29517', 'ACCELERATE_USE_CPU': 'true'}
    job = lambda: subprocess.run(['bash', str(ROOT/'scripts'/'train.sbatch'), *RUN, '--iterations', '40', '--out', 'run'], cwd=here, env=env, capture_output=True, text=True, timeout=280)
    first = job()
    assert first.returncode == 0 and 'Stopped by SIGTERM' in first.stdout, first.stdout + first.stderr
    assert (here/'requeued').read_text() == 'requeue 7\n'
    done = len((here/'run'/'metrics.jsonl').read_text().splitlines())
    second = job()
    assert second.returncode == 0 and f'checkpoint of iteration {done}' in second.stdout, second.stdout + second.stderr
    assert len((here/'run'/'metrics.jsonl').read_text().splitlines()) == 40 and (here/'requeued').read_text() == 'requeue 7\n'

def test_a_bad_job_is_not_queued_again(here):
    tools = here/'bin'
    tools.mkdir()
    for name, text in (('srun', 'exit 2'), ('scontrol', '[ "$1" = show ] && echo localhost || touch requeued')):
        (tools/name).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (tools/name).chmod(0o755)
    done = subprocess.run(['bash', str(ROOT/'scripts'/'train.sbatch'), '--out', 'run'], cwd=here, env=ENV | {'PATH': f'{tools}:{ENV["PATH"]}', 'SLURM_JOB_NODELIST': 'x', 'SLURM_JOB_ID': '7'}, capture_output=True, text=True)
    assert done.returncode == 2 and not (here/'requeued').exists()

def test_a_study_is_a_job_array(here, monkeypatch):
    "With stand-ins for Slurm's commands: tasks run when submitted, the first is pre-empted once; the second study finds all done and submits nothing."
    from g2rpo.training.presets import tiny
    from g2rpo.training.evaluate import EvalConfig
    from g2rpo.study.launch import Study
    from g2rpo.core.rows import METHODS
    from g2rpo.study.job import RunSpec
    tools = here/'bin'
    tools.mkdir()
    task = f'SLURM_JOB_NODELIST=localhost SLURM_ARRAY_JOB_ID=9 SLURM_ARRAY_TASK_ID=$i bash {ROOT}/scripts/study.sbatch'
    texts = dict(sbatch=f'echo "$@" >> {here}/submitted; shift 3; script=$1; shift\n( for i in 0 1; do until {task} "$@" && [ ! -e {here}/again ]; do rm -f {here}/again; done; done >> {here}/log 2>&1; touch {here}/over ) >/dev/null 2>&1 &\necho "9;cluster"',
        squeue=f'[ -e {here}/over ] || echo RUNNING',
        scontrol=f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {here}/requeued; touch {here}/again; fi',
        srun=f'shift; SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 "$@" & child=$!\nif [ ! -e {here}/requeued ]; then until [ -s {here}/runs/trained/*/metrics.jsonl ]; do sleep .1; done; kill -TERM $child; fi\nwait $child')
    for name, text in texts.items():
        (tools/name).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (tools/name).chmod(0o755)
    for key, value in (ENV | {'PATH': f'{tools}:{ENV["PATH"]}', 'MASTER_PORT': '29519', 'ACCELERATE_USE_CPU': 'true'}).items():
        monkeypatch.setenv(key, value)
    judge = EvalConfig(('a sign', 'a red sign'), T=4, scorers=('saturation',))
    jobs = [RunSpec(name, tiny(T=6, group_size=4, prompts_per_iteration=2, rewards=('saturation',), method=METHODS[name]), judge, 0, 4) for name in ('g2rpo', 'mix_grpo')]
    first = Study(here/'runs', 'slurm', seconds=.5).results(jobs)
    assert [record['places']['iterations']['iterations'] for record in first] == [4, 4] and (here/'requeued').read_text() == 'requeue 9_0\n', (here/'log').read_text()
    assert '--array=0-1' in (here/'submitted').read_text() and len((here/'submitted').read_text().splitlines()) == 1
    assert Study(here/'runs', 'slurm').results(jobs) == first and len((here/'submitted').read_text().splitlines()) == 1

def test_an_array_that_is_over_without_results_is_not_waited_for(here, monkeypatch):
    from g2rpo.errors import RunStopped
    from g2rpo.training.presets import tiny
    from g2rpo.training.evaluate import EvalConfig
    from g2rpo.study.launch import Study
    from g2rpo.study.job import RunSpec
    tools = here/'bin'
    tools.mkdir()
    for name, text in dict(sbatch='echo 9', squeue='if [ -e asked ]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; else touch asked; echo "Unable to contact slurm controller" >&2; fi; exit 1').items():
        (tools/name).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (tools/name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{tools}:{ENV["PATH"]}')
    monkeypatch.chdir(here)
    with pytest.raises(RunStopped, match='1 runs have no result'):
        Study(here/'runs', 'slurm', seconds=.1).results([RunSpec('g2rpo', tiny(), EvalConfig(('x',)), 0, 2)])
