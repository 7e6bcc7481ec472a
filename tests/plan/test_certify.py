"The certificate of a machine: in one process, in two with split weights, and where something is wrong."
import json
import os
import subprocess
import sys

import pytest
from g2rpo.cli.main import main
from g2rpo.training import run
from helpers import free_port

FLAGS = ('--random --device cpu --precision no --T 4 --group-size 4 --prompts-per-iteration 4 --batch-size 8 '
         '--granularities 1,2').split()

def test_one_process(mini, tmp_path, capsys):
    out = tmp_path/'certificate.json'
    assert main(['certify', '--model', str(mini), '--out', str(out), *FLAGS]) == 0
    printed, stored = capsys.readouterr().out, json.loads(out.read_text())
    assert stored['fine'] and stored['numbers']['ratio_off'] == 0 and stored['machine']['processes'] == 1
    assert {f['what'] for f in stored['findings']} == {
        'ratio', 'speed', 'memory', 'rollout', 'gathers', 'resume', 'judge'}
    assert all(f['text'] in printed for f in stored['findings'])
    assert sorted(file.name for file in tmp_path.iterdir()) == ['certificate.json', 'certificate.png']
    assert main(['certify', '--model', str(mini), '--out', str(out), *FLAGS]) == 2       # never overwritten

def test_the_first_ratio_of_several_optimiser_steps(mini, tmp_path):
    "It is that before the first of them."
    flags = [*FLAGS[:-2], '--method', 'mix_grpo', '--window', 'size=1', '--updates', '2']
    assert main(['certify', '--model', str(mini), '--out', str(tmp_path/'c.json'), *flags]) == 0

def test_a_wrong_resume_is_found(mini, tmp_path, capsys, monkeypatch):
    "Weights that come back a little larger than they were saved."
    restore = run.checkpoint.restore_tensors
    def enlarged(place, names, params, *others):
        restore(place, names, params, *others)
        for p in params:
            p.data *= 1.001
    monkeypatch.setattr(run.checkpoint, 'restore_tensors', enlarged)
    assert main(['certify', '--model', str(mini), '--out', str(tmp_path/'c.json'), *FLAGS]) == 1
    assert 'FAIL  resume' in capsys.readouterr().out

@pytest.mark.slow
def test_two_processes_with_split_weights(mini, tmp_path):
    "As many gathers and reductions as optimiser steps, of two blocks and what is outside of them."
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', str(free_port())]
    out = tmp_path/'certificate.json'
    flags = ['--model', str(mini), '--out', str(out), '--shard', 'yes', '--gather-once', 'yes', *FLAGS]
    env = os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
    done = subprocess.run([*launch, '-m', 'g2rpo.cli', 'certify', *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(out.read_text())['numbers']
    assert (numbers['units'], numbers['optimiser_steps']) == (3, 2)
    assert (numbers['gathers'], numbers['reduces']) == (6, 6)
