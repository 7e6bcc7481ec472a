"What runs where the repository is hosted: workflows, templates, hooks, and what nbdev makes of the notebooks there."
import json
import re
import shutil
import tomllib
from pathlib import Path

import docs_quarto
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT/'.github'/'workflows').glob('*.yml'))
PUBLISHED = {'actions/checkout': 'v7', 'actions/setup-python': 'v7', 'actions/upload-artifact': 'v7',
             'actions/download-artifact': 'v8', 'actions/upload-pages-artifact': 'v5', 'actions/deploy-pages': 'v5',
             'quarto-dev/quarto-actions/setup': 'v2', 'pypa/gh-action-pypi-publish': 'release/v1'}

def project(): return tomllib.loads((ROOT/'pyproject.toml').read_text())

def read(file):
    "A YAML file; `on` is read as true."
    return yaml.safe_load(file.read_text())

def steps(workflow):
    "All steps of all jobs."
    return [step for job in workflow['jobs'].values() for step in job.get('steps', ())]

def targets():
    "Names that make knows."
    return set(re.findall(r'^([\w-]+):', (ROOT/'Makefile').read_text(), re.M))

@pytest.mark.parametrize('file', WORKFLOWS, ids=lambda f: f.name)
def test_workflows_run_make(file):
    "Every command is a make target, so what fails there can be run here."
    for step in steps(read(file)):
        if 'run' in step:
            assert re.fullmatch(r'make [\w-]+', step['run']) and step['run'].split()[1] in targets(), step
        else:
            action, version = step['uses'].split('@')
            assert PUBLISHED[action] == version

def test_workflows_are_three_and_may_do_little():
    assert [f.stem for f in WORKFLOWS] == ['docs', 'release', 'test']
    for file in WORKFLOWS:
        workflow = read(file)
        assert workflow['permissions'] == {'contents': 'read'}
        granted = [name for name, job in workflow['jobs'].items() if 'permissions' in job]
        assert granted == {'docs': ['deploy'], 'release': ['publish'], 'test': []}[file.stem]

def test_tests_run_on_supported_versions():
    workflow = read(ROOT/'.github'/'workflows'/'test.yml')
    versions = workflow['jobs']['test']['strategy']['matrix']['python']
    assert project()['project']['requires-python'] == f'>={versions[0]}'
    assert {'make test', 'make check'} == {step['run'] for step in steps(workflow) if 'run' in step}

def test_a_release_is_tested_and_needs_no_password():
    text = (ROOT/'.github'/'workflows'/'release.yml').read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True] == {'push': {'tags': ['v*']}} and 'secrets' not in text
    jobs = workflow['jobs']
    assert jobs['build']['needs'] == 'test' and jobs['publish']['needs'] == 'build'
    assert jobs['test']['uses'] == './.github/workflows/test.yml'
    assert jobs['publish']['permissions'] == {'id-token': 'write'}

@pytest.mark.parametrize('name', ['bug', 'method'])
def test_issue_forms(name):
    form = read(ROOT/'.github'/'ISSUE_TEMPLATE'/f'{name}.yml')
    assert form['name'] and form['description']
    ids = [part['id'] for part in form['body']]
    assert len(ids) == len(set(ids)) and all(part['attributes']['label'] for part in form['body'])
    if name == 'method':        # the four questions that a row answers
        assert {'explore', 'complete', 'credit', 'update'} < set(ids)

def test_other_yaml_is_read():
    assert read(ROOT/'.github'/'ISSUE_TEMPLATE'/'config.yml') == {'blank_issues_enabled': True}
    assert read(ROOT/'nbs'/'_quarto.yml')['metadata-files'] == ['nbdev.yml', 'sidebar.yml']

def test_hooks_are_those_of_the_pinned_nbdev():
    config = read(ROOT/'.pre-commit-config.yaml')
    published, local = config['repos']
    pinned = next(d for d in project()['project']['optional-dependencies']['dev'] if d.startswith('nbdev=='))
    assert pinned == f'nbdev=={published["rev"]}'
    assert [hook['id'] for hook in published['hooks']] == ['nbdev-clean', 'nbdev-export']
    for hook in local['hooks']:
        words = hook['entry'].split()
        assert all((ROOT/word).exists() for word in words if word.endswith('.py'))

def test_attributes_are_those_of_nbdev():
    lines = (ROOT/'.gitattributes').read_text().splitlines()
    assert {'*.ipynb merge=jupyternotebook', '*.ipynb diff=jupyternotebook'} <= set(lines)

def test_addresses_are_real():
    "The repository's own address is not known, so only the papers are linked."
    for address in project()['project']['urls'].values():
        assert address.startswith('https://arxiv.org/abs/')
    assert (ROOT/'g2rpo'/'py.typed').read_bytes() == b''

def test_constraints_name_no_host():
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    assert all(line.startswith('#') or re.fullmatch(r'[\w-]+==[\w.]+', line) for line in lines)

def test_nbdev_processes_what_is_staged(tmp_path, monkeypatch):
    "nbdev's files are as it would write them, and a page keeps its prose and its code without being run."
    for name in ('pyproject.toml', 'g2rpo/__init__.py', 'nbs/nbdev.yml', 'nbs/_quarto.yml'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/name, tmp_path/name)
    docs_quarto.stage(tmp_path/'build'/'quarto')
    monkeypatch.chdir(tmp_path)
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    for name in ('nbdev.yml', '_quarto.yml'):
        assert (tmp_path/'nbs'/name).read_text() == (ROOT/'nbs'/name).read_text(), name
    made = proc_nbs(path='build/quarto', file_glob='01_schedule.ipynb', n_workers=0)
    cells = json.loads((Path(made)/'core'/'01_schedule.ipynb').read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells)
    for part in ('title: Schedule', 'After this chapter you can', 'def shift_time', '$$s(t)='):
        assert part in text
    assert 'from fastcore.test' not in text and (Path(made)/'sidebar.yml').is_file()
