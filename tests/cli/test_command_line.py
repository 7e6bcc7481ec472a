"The commands as a user types them: refusals, training and evaluation, calibration, assets, Ctrl-C, help."
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from g2rpo.cli.main import main
from g2rpo.rewards.image_reward import score_head
from helpers import count_lines, PROMPTS

BAD = [
    '--preset huge', '--preset paper --prompts {good}', '--model {folder}', '--device tpu', '--unknown 1',
    '--precision int4', '--prompts /nowhere.txt', '--prompts {empty}', '--prompts {unquoted}',
    '--prompts {latin}', '--prompts-per-iteration 5000', '--granularities 0,1', '--granularities 1,1',
    '--granularities x', '--steps 0,10', '--steps 3,3', '--starts 0', '--starts 2', '--group-size 1', '--eta 0',
    '--eta -1', '--lr 0', '--T 0', '--T 1', '--iterations 0', '--height 25', '--form cps --eta 0.5 --steps 9',
    '--method dpo', '--method dance_grpo --granularities 1,2', '--method mix_grpo --T 5',
    '--method dense_grpo --psi /nowhere.json', '--method dense_grpo --psi {good}',
    '--method g2rpo --completion 2', '--method tempflow_grpo --group-size 6', '--method dense_grpo --steps 3',
    '--method dense_grpo --steps 7,8,9', '--method mix_grpo --window 4', '--method mix_grpo --window size=0',
    '--beta 1', '--kl exact', '--noise-weighted maybe', '--rewards nonsense', '--rewards tests_no_such:f',
    '--rewards :f', '--rewards {module}:wrong_shape', '--rewards {module}:not_a_number',
    '--rewards {module}:nothing', '--rewards hps21', '--rewards ppocr6,colour --weights 1', '--weights x',
    '--method mix_grpo --window size=2,every=1 --pruned 0', '--panel {module}:compared', '--rewards none',
    '--mix product', '--guidance-scale 0.5', '--dtype bf16', '--shift 0', '--shift x', '--attention magic']

MODULE = '''
def wrong_shape(images, prompts): return images.mean()
def nothing(images, prompts): return None
def not_a_number(images, prompts): return images.mean((1, 2, 3))*float("nan")
def compared(images, prompts): return images.mean((2, 3, 4))
compared.group = True
'''
SHADE = 'def dark(images, prompts): return 1 - images.mean((1, 2, 3))'

@pytest.mark.parametrize('flags', BAD)
def test_bad_input_is_one_line_and_exit_2(flags, mini, tmp_path, capsys, monkeypatch):
    (tmp_path/'empty.txt').write_text('\n\n')
    (tmp_path/'unquoted.txt').write_text('a sign\n')
    (tmp_path/'good.txt').write_text('a sign that says "1"\n')
    (tmp_path/'latin.txt').write_bytes(b'caf\xe9 "1"\n')
    (tmp_path/'folder').mkdir()
    (tmp_path/'bad_rewards.py').write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    files = {name: tmp_path/f'{name}.txt' for name in ('empty', 'unquoted', 'good', 'latin')}
    words = flags.format(**files, folder=tmp_path/'folder', module='bad_rewards').split()
    model = [] if '--model' in words or '--preset' in words else ['--model', str(mini)]
    code = main(['train', '--out', str(tmp_path/'run'), *model, *words])
    printed = capsys.readouterr().err.strip()
    assert code == 2 and printed.startswith('g2rpo') and '\n' not in printed and 'Traceback' not in printed
    assert not (tmp_path/'run').exists()

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a reward and prompts of one's own, in which commands are typed."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'shade.py').write_text(SHADE)
    (tmp_path/'prompts.txt').write_text('\n'.join(PROMPTS[:4]))
    return tmp_path

SHORT = '--T 4 --group-size 3 --prompts-per-iteration 2 --precision no --prompts prompts.txt --rewards shade:dark'

def test_train_then_evaluate(here, mini, capsys):
    "A reward from a file beside which the command is typed; pictures of another size than were trained."
    assert main(f'train --model {mini} {SHORT} --iterations 1 --granularities 1,2 --out run'.split()) == 0
    assert json.loads((here/'run'/'config.json').read_text())['rewards'] == ['shade:dark']
    assert main('evaluate run --prompts prompts.txt --scorers shade:dark,colour --T 2 --seeds 0'.split()) == 0
    printed = capsys.readouterr().out
    assert 'protocol' in printed and 'shade:dark' in printed and '→' in printed
    assert main('evaluate run --T 2 --seeds 0 --out own'.split()) == 0          # the run's own reward and prompts
    found = json.loads((here/'own'/'evaluation.json').read_text())
    assert [*found['gains']] == ['shade:dark'] and found['T'] == 2 and (here/'own'/'evaluation.png').exists()
    colour = 'evaluate run --prompts prompts.txt --scorers colour --seeds 0'
    assert main(f'{colour} --T 2 --height 48'.split()) == 0 and '48x48 pixels' in capsys.readouterr().out
    assert main(f'{colour} --T 2 --height 25'.split()) == 2
    assert main(f'{colour} --T 0'.split()) == 2
    assert [main(['evaluate', bad]) for bad in ('nowhere', '.')] == [2, 2]

def test_only_what_is_typed_is_held_against_a_run(here, mini, capsys):
    "A run goes on with the config in its folder; what is typed besides must agree or be named by --override."
    first = f'train --model {mini} {SHORT} --iterations 1 --lr 3e-4 --out run'
    assert main(first.split()) == 0
    assert main('train --out run --resume --override iterations=2'.split()) == 0
    stored = json.loads((here/'run'/'config.json').read_text())
    assert (stored['iterations'], stored['lr'], stored['group_size']) == (2, 3e-4, 3)
    capsys.readouterr()
    assert main('train --out run --resume --lr 1e-4'.split()) == 2 and '--override lr=' in capsys.readouterr().err
    assert main('train --out run --resume --group_size 4'.split()) == 2 and 'group_size=3' in capsys.readouterr().err

def test_calibrate_then_train(here, mini, capsys):
    "A calibration is a file that a run loads and whose values its config records; another grid refuses it."
    common = f'--model {mini} --prompts prompts.txt --rewards shade:dark'
    assert main(f'calibrate {common} --T 4 --trajectories 2 --rounds 2 --out psi.json'.split()) == 0
    saved = json.loads((here/'psi.json').read_text())
    assert len(saved['values']) == 4 and saved['reward'] == 'shade:dark' and len(saved['positive_after']) == 4
    assert (here/'psi.png').exists()
    run = (f'train {common} --method dense_grpo --psi psi.json --group-size 2 --prompts-per-iteration 2 --iterations 1 '
           '--precision no').split()
    assert main([*run, '--T', '4', '--out', 'run']) == 0
    assert json.loads((here/'run'/'config.json').read_text())['method']['psi']['values'] == saved['values']
    for bad in ('--T 5 --out other', '--T 4 --form cps --out other', '--T 4 --psi run/config.json --out other'):
        assert main([*run, *bad.split()]) == 2
    for bad in ('--out psi.json', '--criterion signs --out b.json', '--rounds 0 --out b.json',
                '--eps2 0 --out b.json', '--start 0 --out b.json', '--rewards colour,ppocr6 --out b.json'):
        assert main(['calibrate', *common.split(), '--T', '4', *bad.split()]) == 2
    assert not (here/'other').exists() and not (here/'b.json').exists() and 'Traceback' not in capsys.readouterr().err

def test_fetch_and_convert_say_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('G2RPO_ASSETS', str(tmp_path/'assets'))
    for command in ('convert hps21 /nowhere', 'convert nothing /tmp', 'fetch nothing'):
        assert main(command.split()) == 2
    assert 'not one of hps21' in capsys.readouterr().err and not (tmp_path/'assets').exists()
    head = {f'layers.{key}': value for key, value in score_head(768).state_dict().items()}
    published = tmp_path/'sac+logos+ava1-l14-linearMSE.pth'
    for state, code in ((head | dict(more=torch.ones(2)), 2), (head, 0)):
        torch.save(state, published)
        assert main(['convert', 'aesthetic', str(tmp_path)]) == code
        assert (tmp_path/'assets'/'aesthetic'/'manifest.json').exists() == (code == 0)
    assert 'under more there is [2]' in capsys.readouterr().err

def rows_in(file): return file.read_text().count('\n') if file.exists() else 0

def test_ctrl_c_keeps_what_it_has(here, mini):
    command = f'-m g2rpo.cli train --model {mini} {SHORT} --iterations 10000 --out run'.split()
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(here)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen([sys.executable, *command], **pipes, env=env,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # else it may be ignored
    end, metrics = time.time() + 120, here/'run'/'metrics.jsonl'
    while time.time() < end and run.poll() is None and rows_in(metrics) < 2:
        time.sleep(.1)
    run.send_signal(signal.SIGINT)
    try:
        printed, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0, errors
    assert 'Stopped by SIGINT after' in printed and 'same command and --resume' in printed and 'Traceback' not in errors
    assert rows_in(metrics) >= 2 and any((here/'run'/'weights').iterdir())

def fastest(*args):
    "Seconds of the quickest of three runs."
    times = []
    for _ in range(3):
        begin = time.time()
        subprocess.run([sys.executable, *args], capture_output=True, check=True)
        times.append(time.time() - begin)
    return min(times)

def test_help_is_fast():
    "Neither the package nor its help imports torch."
    code = 'import sys, g2rpo, g2rpo.cli.flags as f; f.build_parser().format_help(); print("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'False'
    assert fastest('-c', 'import g2rpo') < .5 and fastest('-m', 'g2rpo.cli', '--help') < 1

def test_every_field_is_a_flag(capsys):
    "With its meaning and default; a field of Config or Method that is added has its flag at once."
    from dataclasses import fields
    from g2rpo import Config, Method
    with pytest.raises(SystemExit):
        main(['train', '--help'])
    text = capsys.readouterr().out
    for field in (*fields(Config), *fields(Method)):
        assert f'--{field.name.replace("_", "-")} ' in text, field.name
    assert 'in G²RPO (default: 8)' in ' '.join(text.split())

def test_dry_run_says_what_would_be_done_and_writes_nothing(here, mini, capsys):
    assert main(f'train --model {mini} {SHORT} --dry-run --out run'.split()) == 0
    printed = capsys.readouterr().out
    assert "rewards = ('shade:dark',)" in printed and 'method.eta = 0.7' in printed and '\nok    step' in printed
    assert main(f'train --model {mini} {SHORT} --prompts none.txt --dry-run --out run'.split()) == 1
    assert "What to do, in this order:\n  1. prompts: prompts='none.txt'" in capsys.readouterr().out
    assert not (here/'run').exists()

STOPPING = '''
import os, signal
from shade import dark
calls = []
def until(images, prompts):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return dark(images, prompts)
'''

SMALL = '--prompts prompts.txt --T 4 --group-size 4 --prompts-per-iteration 2 --precision no'.split()

def test_what_is_asked_of_a_stopped_run(here, mini):
    "Pictures drawn later are not of an iteration, and a card says after how many the weights were written."
    (here/'stopping.py').write_text(STOPPING)
    asked = ['--model', str(mini), '--rewards', 'stopping:until', '--iterations', '9', '--granularities', '1', *SMALL]
    assert main(['train', '--out', 'run', *asked]) == 0
    done = count_lines(here/'run'/'metrics.jsonl')
    assert 0 < done < 9 and main(['sample', 'run', '--n', '1', '--T', '4']) == 0 and main(['report', 'run']) == 0
    assert main(['export', 'run', 'shared']) == 0
    assert f'for {done} iterations on' in (here/'shared'/'README.md').read_text()

@pytest.mark.parametrize('text, code', [
    ('method: {name: branch_grpo, explore: chain, widths: [], credit: terminal}', 0), ('panel: []', 0),
    ('method: {name: v_grpo, 3: 4}', 2), ('method: {name: branch_grpo, widths: none}', 2)])
def test_lists_that_are_empty_and_keys_that_are_numbers(here, mini, capsys, text, code):
    (here/'c.yaml').write_text(text)
    asked = ['--config', 'c.yaml', '--model', str(mini), '--rewards', 'shade:dark', '--iterations', '1', *SMALL]
    assert main(['train', '--out', 'run', *asked]) == code
    assert code == 0 or capsys.readouterr().err.count('\n') == 1
