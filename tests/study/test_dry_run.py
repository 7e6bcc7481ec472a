"What a dry run says: judges, processes, disk, the next command; and a rehearsal in the types of the published runs."
from dataclasses import replace

import pytest
from g2rpo.errors import RunStopped
from g2rpo.plan.doctor import remedies
from g2rpo.study.defaults import check_study_disk, launch_plan, resolve_parameters, cluster_processes, study_bytes
from g2rpo.study.dry_run import _run_findings, device_hours, rehearsal_spec, static_findings
from g2rpo.study.launch import Study
from g2rpo.study.run_job import run_job
from g2rpo.study.setting import ExperimentConfig

DECLARED = dict(preset='tiny', reward='', launcher='', workers=0, seeds=0, rows='', folder='runs/study',
                results='paper_figures/results', dry_run=False)

def published_jobs(reward, *rows, seeds=1):
    "Jobs of rows as published, judged on one prompt."
    setting = ExperimentConfig('paper', reward, seeds=seeds)
    return setting.jobs(setting.rows(*rows), {}, setting.eval_config(('a sign',)))

def test_a_plan_for_a_cluster_names_its_processes_everywhere(monkeypatch):
    "Without a GPU and without Slurm: planned for the script that Slurm would run."
    monkeypatch.setattr('g2rpo.study.defaults.torch.cuda.is_available', lambda: False)
    asked = DECLARED | dict(preset='paper', dry_run=True)
    parameters = resolve_parameters(asked, 'main_table')
    assert (parameters['launcher'], parameters['workers']) == ('slurm', cluster_processes())
    launch = launch_plan('main_table', parameters, DECLARED, 4)
    assert (launch.processes, launch.at_once) == (cluster_processes(), 4)
    assert launch.command == 'g2rpo repro main_table --preset paper --launcher slurm -p reward hps'
    small = resolve_parameters(DECLARED | dict(dry_run=True), 'main_table')
    assert (small['launcher'], launch_plan('main_table', small, DECLARED, 40).processes) == ('inline', 1)

def test_the_disk_of_a_study():
    "LoRA adapters of two seeds: weights, and those of one place each; checkpoints of the runs that go on at once."
    jobs = published_jobs('pickscore', 'flow_grpo', seeds=2)
    one = study_bytes(jobs[:1], 1)
    assert study_bytes(jobs, 1) == dict(weights=2*one['weights'], checkpoints=one['checkpoints'])
    assert study_bytes(jobs, 2)['checkpoints'] == 2*one['checkpoints']
    with_average = jobs[0].cfg.method.ema > 0
    assert one['checkpoints'] == (jobs[0].cfg.keep + 1)*(4 if with_average else 3)*one['weights']//2
    longer = [replace(jobs[0], iterations=n) for n in (10, 20)]       # one training, scored at two places
    assert study_bytes(longer, 1)['weights'] == one['weights']//2*3

def test_a_full_disk_is_found(tmp_path, monkeypatch):
    from collections import namedtuple
    usage = namedtuple('usage', 'total used free')(10**12, 10**12, 10**6)
    monkeypatch.setattr('g2rpo.plan.room.shutil.disk_usage', lambda path: usage)
    found = check_study_disk(published_jobs('pickscore', 'flow_grpo'), 1, tmp_path/'study')
    assert not found.fine and 'free some' in found.text

@pytest.mark.slow
def test_all_judges_and_the_memory_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv('G2RPO_ASSETS', str(tmp_path))
    monkeypatch.delenv('G2RPO_UNIFIED_REWARD', raising=False)
    setting = ExperimentConfig('paper', 'hps+clip')
    asked = DECLARED | dict(preset='paper', reward='hps+clip', launcher='slurm', folder=str(tmp_path/'study'))
    launch = launch_plan('main_table', resolve_parameters(asked, 'main_table'), DECLARED, 1)
    found = list(static_findings(setting, setting.rows('g2rpo'), launch))
    commands = ' '.join(remedies(found))
    for fetched in ('hps21', 'clip_dfn', 'pickscore', 'imagereward', 'bert_vocab', 'hpdv2_train', 'hpdv2_test'):
        assert f'g2rpo fetch {fetched}' in commands
    assert 'export G2RPO_UNIFIED_REWARD=' in commands and 'hf download black-forest-labs/FLUX.1-dev' in commands
    memory, = (f for f in found if f.what == 'memory')
    assert memory.fine and memory.text.startswith('each of 16 processes')

def test_hours_follow_from_counted_operations():
    "A row that judges twice as many pictures, and no other, takes what they take."
    job, = published_jobs('hps', 'g2rpo')
    twice = replace(job, protocol=replace(job.protocol, prompts=('a', 'b')))
    three = replace(job, protocol=replace(job.protocol, prompts=('a', 'b', 'c')))
    assert device_hours(three) - device_hours(twice) == pytest.approx(device_hours(twice) - device_hours(job))
    untrained = replace(job, iterations=0)
    assert device_hours(untrained) == pytest.approx(device_hours(twice) - device_hours(job), rel=1e-6)

def test_a_rehearsal_that_ends_badly_is_a_finding(monkeypatch, tmp_path):
    def ended(self, jobs): raise RunStopped('g2rpo with seed 42 ended with 1')
    monkeypatch.setattr(Study, 'results', ended)
    found, = _run_findings(published_jobs('hps', 'g2rpo'), tmp_path)
    assert not found.fine and 'ended with 1' in found.text

@pytest.mark.slow
@pytest.mark.parametrize('reward, row', [('hps', 'g2rpo'), ('pickscore', 'flow_grpo')])
def test_a_row_is_rehearsed_in_its_published_types(reward, row, tmp_path):
    "Training, judging and the record: encoders in bf16 on Flux, everything stored in bf16 under LoRA on SD3.5."
    job, = published_jobs(reward, row)
    small = rehearsal_spec(job, tmp_path)
    types = 'dtype', 'encoder_dtype', 'precision', 'offload', 'checkpointing'
    assert [getattr(small.cfg, name) for name in types] == [getattr(job.cfg, name) for name in types]
    record = run_job(small, tmp_path/'study')
    assert record['places']['iterations']['iterations'] == 2
