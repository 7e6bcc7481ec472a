"Training as a user meets it: the first ratio, runs that stop themselves, refusals, Ctrl-C."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from g2rpo.errors import InputError, RunStopped
from g2rpo.cli.main import main
from g2rpo.core.rows import METHODS
from g2rpo.training.presets import tiny
from g2rpo.training.trainer import train

SMALL = dict(iterations=1, T=4, group_size=3, prompts_per_iteration=2, precision='no', method=replace(METHODS['g2rpo'], granularities=(1, 2)))

def left_of_right(images, prompts):
    "A reward without packages: how much darker the left half is."
    half = images.shape[-1]//2
    return images[..., half:].mean((1, 2, 3)) - images[..., :half].mean((1, 2, 3))

def words(n=8): return [f'a sign that says "{i:03d}" in red' for i in range(n)]

@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('update', ['per_step', 'accumulate'])
@pytest.mark.parametrize('rank', [0, 4])
def test_first_ratio_is_one_and_weights_move(policy, tmp_path, precision, update_policy, rank):
    before = {n: p.detach().clone() for n, p in policy.pipe.transformer.named_parameters()}
    cfg = tiny(**SMALL | dict(precision=precision, lora_rank=rank, method=replace(SMALL['method'], update=update_policy), grad_batch_size=1))
    row, = train(cfg, dict(r=left_of_right), words(), tmp_path/'run', policy=policy).metrics
    assert row['ratio_spread'][0] == 0. and row['ratio'][0] == 1.
    assert len(row['grad_norm']) == (2 if update_policy == 'per_step' else 1)
    after = dict(policy.pipe.transformer.named_parameters())
    same = [torch.equal(p, after[n.replace('.weight', '.base_layer.weight').replace('.bias', '.base_layer.bias') if n not in after else n]) for n, p in before.items()]
    assert all(same) if rank else not any(same[:4])
    assert json.loads((tmp_path/'run'/'metrics.jsonl').read_text()) == row
    assert (tmp_path/'run'/'weights').is_dir()

@pytest.mark.parametrize('name', METHODS)
def test_every_row_trains_from_a_ratio_of_one(policy, name):
    "Batches of three split members, steps and prompts unevenly; the trainer stops by itself if any ratio of the first optimiser step is off by a bit."
    row = METHODS[name]
    method = replace(row, window=row.window and replace(row.window, size=3 if not row.window.half else 2), starts=min(row.starts, 2))
    log = train(tiny(iterations=2, T=6, group_size=4, prompts_per_iteration=2, method=method, grad_batch_size=3), dict(r=left_of_right), words(), policy=policy).metrics
    for got in log:
        assert len(got['grad_norm']) == (len(got['steps']) if method.update == 'per_step' else method.updates) and all(norm > 0 for norm in got['grad_norm'])
        assert ('kl' in got) == bool(method.kl)
    if method.kl:
        assert log[0]['kl'][0] < log[1]['kl'][0]

def test_guidance_trains_and_costs_twice():
    from g2rpo.models.loading import load_policy
    logs = [train(tiny(**SMALL | dict(guidance_scale=scale)), dict(r=left_of_right), words(), policy=load_policy('tiny', 24, 48, 16, guidance_scale=scale)).metrics for scale in (1., 2.)]
    assert logs[1][0]['forwards'] == 2*logs[0][0]['forwards'] and logs[1][0]['grad_forwards'] == 2*logs[0][0]['grad_forwards']
    with pytest.raises(InputError, match='guidance_scale=2.0'):
        train(tiny(**SMALL | dict(guidance_scale=2.)), dict(r=left_of_right), words(), policy=load_policy('tiny', 24, 48, 16))

def test_kl_holds_the_policy_back():
    from g2rpo.models.loading import load_policy
    far = []
    for beta, rank in ((0., 0), (100., 0), (0., 4), (100., 4)):
        policy = load_policy('tiny', 24, 48, 16)
        method = replace(SMALL['method'], kl='exact', beta=max(beta, 1e-12))
        log = train(tiny(**SMALL | dict(iterations=4, method=method, lora_rank=rank, lr=1e-3)), dict(r=left_of_right), words(), policy=policy).metrics
        assert log[0]['kl'][0] == pytest.approx(0, abs=1e-8)
        far.append(sum(log[-1]['kl']))
    assert far[1] < far[0]/2 and far[3] < far[2]/2

def test_ema_is_kept(policy, tmp_path):
    "The weights that are kept lie between the base and the last ones; the decay follows Flow-GRPO's steps."
    from diffusers import FluxTransformer2DModel
    base = {n: p.detach().clone() for n, p in policy.pipe.transformer.named_parameters()}
    last = {}
    def watch(row): last.update({n: p.detach().clone() for n, p in policy.pipe.transformer.named_parameters()})
    train(tiny(**SMALL | dict(iterations=4, method=replace(SMALL['method'], ema=.9))), dict(r=left_of_right), words(), tmp_path/'run', policy=policy, on_iteration=watch)   # 8 optimiser steps
    kept = dict(FluxTransformer2DModel.from_pretrained(tmp_path/'run'/'weights').named_parameters())
    for name in list(base)[:6]:
        torch.testing.assert_close(kept[name], base[name] + 9/17*(last[name] - base[name]))   # one update, at step 7: decay 8/17

def test_masked_groups_leave_the_mean(policy):
    "With one of two groups constant, the masked gradient is twice the unmasked one."
    from accelerate import Accelerator
    from g2rpo.core.rollout import rollout
    from g2rpo.core.velocity import Ledger
    from g2rpo.training.update import TrainState, update_policy
    norms = []
    for mask in (False, True):
        cfg, params = tiny(**SMALL | dict(max_grad_norm=1e9, method=replace(SMALL['method'], update='accumulate', mask_constant=mask))), list(policy.pipe.transformer.requires_grad_(True).parameters())
        tuning = TrainState(cfg, params, torch.optim.SGD(params, lr=1e-20), Accelerator(cpu=True))
        roll = rollout(policy, cfg.method, words(2), cfg.T, cfg.group_size)
        advantage = torch.zeros(2, 2, 3)
        advantage[:, 0] = torch.tensor([1., -2., 1.])
        with pytest.raises(RunStopped) as stop:
            update_policy(policy, tuning, roll, advantage, Ledger())
        norms.append(float(str(stop.value).split('gradient norm ')[1].split(')')[0]))
    assert norms[1] == pytest.approx(2*norms[0], rel=1e-2)

def test_engine_equals_naive_loop_on_the_pipeline(policy):
    from g2rpo.core.naive import naive_rollout
    from g2rpo.core.rollout import rollout
    method, two = METHODS['g2rpo'], words(2)
    slow, fast = naive_rollout(policy, method, two, 6, 2), rollout(policy, method, two, 6, 2, batch_size=7)
    torch.testing.assert_close(fast.old_log_prob, slow.old_log_prob, rtol=0, atol=1e-4)
    for lam in method.granularities:
        torch.testing.assert_close(fast.x0[lam], slow.x0[lam], rtol=0, atol=1e-3)

def test_scores_belong_to_their_prompt_and_direction():
    "A latent says who it is, a reward reads that and its prompt: every entry of the table is where it should be."
    from g2rpo.core.rollout import Rollout
    from g2rpo.core.velocity import Ledger
    from g2rpo.training.update import score_rollout
    L, K, P, G = 2, 3, 4, 5
    who = torch.arange(L*K*P*G, dtype=torch.float32).reshape(L, K, P, G, 1, 1)
    class Plain:
        def decode(self, x): return x[:, None].expand(-1, 3, -1, -1)
    roll = Rollout(list('abcd'), None, None, None, None, None, {1: who[0], 3: who[1]}, [])
    table = score_rollout(Plain(), roll, dict(r=lambda images, prompts: images[:, 0, 0, 0]*10 + torch.tensor(['abcd'.index(p) for p in prompts])), 7, Ledger())['r']
    assert torch.equal(table, who[..., 0, 0]*10 + torch.arange(P)[:, None])

def test_silent_step_is_skipped_and_a_silent_iteration_stops(policy):
    "Groups that are constant at one step only: no optimiser step there, and no false alarm."
    from accelerate import Accelerator
    from g2rpo.core.rollout import rollout
    from g2rpo.core.velocity import Ledger
    from g2rpo.training.update import TrainState, update_policy
    cfg, params = tiny(**SMALL), list(policy.pipe.transformer.requires_grad_(True).parameters())
    tuning = TrainState(cfg, params, torch.optim.AdamW(params, lr=1e-4), Accelerator(cpu=True))
    roll = rollout(policy, cfg.method, words(2), cfg.T, cfg.group_size)
    advantage = torch.zeros(2, 2, 3)
    advantage[1, 0] = torch.tensor([1., -1., 0.])
    norms = update_policy(policy, tuning, roll, advantage, Ledger())['grad_norm']
    assert norms[0] == 0. and norms[1] > 0.
    roll = rollout(policy, cfg.method, words(2), cfg.T, cfg.group_size)
    with pytest.raises(RunStopped, match='no gradient'):
        update_policy(policy, tuning, roll, torch.zeros(2, 2, 3), Ledger())

@pytest.mark.parametrize('n', [2, 3, 15])
def test_demo_draws_any_number_of_prompts(n, tmp_path):
    from g2rpo.cli.demo import draw_grid
    show = words(min(16, n)//2*2)
    images = torch.rand(len(show), 3, 24, 48)
    draw_grid(show, images, images, ['000', '了'] + ['']*(len(show) - 2), ['']*len(show), tmp_path/'grid.png')
    assert (tmp_path/'grid.png').stat().st_size > 1000

def test_same_seed_same_run(tmp_path):
    "Bit for bit, LoRA's own initialisation included."
    from g2rpo.models.loading import load_policy
    logs = [train(tiny(**SMALL | dict(lora_rank=4)), dict(r=left_of_right), words(), policy=load_policy('tiny', 24, 48, 16)).metrics for _ in range(2)]
    for a, b in zip(*logs):
        assert {k: v for k, v in a.items() if k != 'seconds'} == {k: v for k, v in b.items() if k != 'seconds'}

def test_stopped_run_keeps_its_weights(policy, tmp_path):
    calls = []
    def sours(images, prompts):
        calls.append(len(images))
        return images.mean((1, 2, 3)) if len(calls) < 4 else torch.ones(len(images))
    with pytest.raises(RunStopped):
        train(tiny(**SMALL | dict(iterations=5)), dict(r=sours), words(), tmp_path/'run', policy=policy)
    assert (tmp_path/'run'/'metrics.jsonl').read_text().count('\n') >= 1 and any((tmp_path/'run'/'weights').iterdir())

def test_later_ratios_differ_with_per_step(policy):
    row, = train(tiny(**SMALL | dict(lr=1e-3)), dict(r=left_of_right), words(), policy=policy).metrics
    assert row['ratio_spread'][0] == 0. and row['ratio_spread'][1] > 0.

def test_training_raises_an_easy_reward(policy):
    "Brightness is easy: a few iterations must raise it."
    log = train(tiny(**SMALL | dict(iterations=6, lr=3e-4)), dict(r=lambda images, prompts: -images.mean((1, 2, 3))), words(), policy=policy).metrics
    rewards = [row['reward/r'] for row in log]
    assert sum(rewards[-2:]) > sum(rewards[:2])

@pytest.mark.parametrize('reward,why', [(lambda i, p: torch.ones(len(i)), 'same reward'), (lambda i, p: i.mean((1, 2, 3))/0, 'not finite'),
                                        (lambda i, p: i.mean(), 'must return')])
def test_bad_rewards_stop(policy, tmp_path, reward, why):
    with pytest.raises((InputError, RunStopped), match=why):
        train(tiny(**SMALL), dict(r=reward), words(), tmp_path/'run', policy=policy)

def test_step_that_moves_nothing_stops(policy):
    with pytest.raises(RunStopped, match='no parameter moved'):
        train(tiny(**SMALL | dict(lr=1e-30, weight_decay=0.)), dict(r=left_of_right), words(), policy=policy)

def test_non_finite_weights_stop(policy):
    next(policy.pipe.transformer.parameters()).data.fill_(float('nan'))
    with pytest.raises(RunStopped, match='not finite'):
        train(tiny(**SMALL), dict(r=left_of_right), words(), policy=policy)

BAD = ['--preset huge', '--prompts /nowhere.txt', '--prompts {empty}', '--prompts {unquoted}', '--granularities 0,1', '--granularities 1,1',
       '--granularities x', '--steps 0,10', '--steps 3,3', '--group-size 1', '--eta 0', '--eta -1', '--model {folder}', '--lr 0', '--T 0', '--iterations 0',
       '--rewards nonsense', '--rewards tests_no_such:f', '--rewards {module}:wrong_shape', '--rewards {module}:not_a_number',
       '--height 25', '--preset paper --prompts {good}', '--device tpu', '--prompts-per-iteration 5000', '--method dpo', '--prompts {latin}', '--T 1', '--form cps --eta 0.5 --steps 9', '--rewards :f', '--rewards {module}:nothing', '--precision int4', '--unknown 1',
       '--method dance_grpo --granularities 1,2', '--method mix_grpo --T 5', '--method dense_grpo --psi /nowhere.json', '--method dense_grpo --psi {good}', '--method g2rpo --completion 2',
       '--method tempflow_grpo --group-size 6', '--starts 0', '--guidance-scale 0.5', '--method dense_grpo --steps 3',
       '--rewards ppocr6,colour --weights 1', '--weights x', '--mix product', '--method dense_grpo --steps 7,8,9', '--starts 2', '--dtype bf16', '--shift 0', '--shift x', '--rewards hps21', '--attention magic']

@pytest.mark.parametrize('flags', BAD)
def test_bad_input_is_one_line_and_exit_2(flags, tmp_path, capsys, monkeypatch):
    (tmp_path/'empty.txt').write_text('\n\n')
    (tmp_path/'unquoted.txt').write_text('a sign\n')
    (tmp_path/'folder').mkdir()
    (tmp_path/'bad_rewards.py').write_text('def wrong_shape(i, p): return i.mean()\ndef nothing(i, p): return None\ndef not_a_number(i, p): return i.mean((1, 2, 3))*float("nan")\n')
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/'good.txt').write_text('a sign that says "1"\n')
    (tmp_path/'latin.txt').write_bytes(b'caf\xe9 "1"\n')
    flags = flags.format(good=tmp_path/'good.txt', latin=tmp_path/'latin.txt', empty=tmp_path/'empty.txt', unquoted=tmp_path/'unquoted.txt', folder=tmp_path/'folder', module='bad_rewards')
    try:
        code = main(['train', '--out', str(tmp_path/'run'), *flags.split()])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.strip()
    assert code == 2 and said.startswith('g2rpo') and '\n' not in said and 'Traceback' not in said
    assert not (tmp_path/'run').exists()

def test_train_then_evaluate(tmp_path, capsys, monkeypatch):
    "The two commands together, with a reward from a file beside which they are typed."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'shade.py').write_text('def dark(images, prompts): return 1 - images.mean((1, 2, 3))')
    (tmp_path/'words.txt').write_text('\n'.join(words(4)))
    small = '--T 4 --group-size 3 --prompts-per-iteration 2 --iterations 1 --granularities 1,2 --prompts words.txt --rewards shade:dark --out run'
    assert main(['train', *small.split()]) == 0
    assert json.loads((tmp_path/'run'/'config.json').read_text())['rewards'] == ['shade:dark']
    assert main('evaluate run --prompts words.txt --scorers shade:dark,colour --T 2 --seeds 0'.split()) == 0
    said = capsys.readouterr().out
    assert 'protocol' in said and 'shade:dark' in said and '→' in said
    assert main('evaluate run --prompts words.txt --scorers colour --T 2 --seeds 0 --height 48'.split()) == 0 and '48x48 pixels' in capsys.readouterr().out
    assert main('evaluate run --prompts words.txt --scorers colour --T 2 --seeds 0 --height 25'.split()) == 2
    for bad in ('nowhere', '.'):
        assert main(['evaluate', bad]) == 2
    assert main('evaluate run --prompts words.txt --scorers colour --T 0'.split()) == 2

def test_calibrate_then_train(tmp_path, capsys, monkeypatch):
    "A calibration is a file that a run loads and whose values its manifest records; another grid refuses it."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'shade.py').write_text('def dark(images, prompts): return 1 - images.mean((1, 2, 3))')
    (tmp_path/'words.txt').write_text('\n'.join(words(4)))
    common = '--prompts words.txt --rewards shade:dark'
    assert main(f'calibrate {common} --T 4 --trajectories 2 --rounds 2 --out psi.json'.split()) == 0
    saved = json.loads((tmp_path/'psi.json').read_text())
    assert len(saved['values']) == 4 and saved['reward'] == 'shade:dark' and len(saved['positive_after']) == 4 and (tmp_path/'psi.png').exists()
    run = f'train {common} --method dense_grpo --psi psi.json --group-size 2 --prompts-per-iteration 2 --iterations 1'
    assert main([*run.split(), '--T', '4', '--out', 'run']) == 0
    assert json.loads((tmp_path/'run'/'config.json').read_text())['method']['psi']['values'] == saved['values']
    for bad in (['--T', '5', '--out', 'other'], ['--T', '4', '--form', 'cps', '--out', 'other'], ['--T', '4', '--psi', 'run/config.json', '--out', 'other']):
        assert main([*run.split(), *bad]) == 2
    for bad in ('--T 4 --out psi.json', '--T 4 --criterion signs --out b.json', '--T 4 --rounds 0 --out b.json', '--T 4 --eps2 0 --out b.json', '--T 4 --start 0 --out b.json', '--T 4 --rewards colour,ppocr6 --out b.json'):
        assert main(['calibrate', *common.split(), *bad.split()]) == 2
    assert not (tmp_path/'other').exists() and not (tmp_path/'b.json').exists() and 'Traceback' not in capsys.readouterr().err

def test_fetch_and_convert_say_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('G2RPO_ASSETS', str(tmp_path/'assets'))
    for command in ('convert hps21 /nowhere', 'convert nothing /tmp', 'fetch nothing'):
        assert main(command.split()) == 2
    assert 'not one of hps21' in capsys.readouterr().err and not (tmp_path/'assets').exists()
    torch.save(dict(state_dict=dict(w=torch.ones(2))), tmp_path/'HPS_v2.1_compressed.pt')
    assert main(['convert', 'hps21', str(tmp_path)]) == 0 and (tmp_path/'assets'/'hps21'/'manifest.json').exists()

def test_out_in_use_is_refused(policy, tmp_path):
    (tmp_path/'metrics.jsonl').write_text('')
    with pytest.raises(InputError, match='already holds a run'):
        train(tiny(**SMALL), dict(r=left_of_right), words(), tmp_path, policy=policy)

def test_ctrl_c_keeps_what_it_has(tmp_path):
    out = tmp_path/'run'
    (tmp_path/'bright.py').write_text('def reward(images, prompts): return images.mean((1, 2, 3))')
    run = subprocess.Popen([sys.executable, '-m', 'g2rpo.cli', 'train', '--out', str(out), '--rewards', 'bright:reward', '--T', '4', '--prompts-per-iteration', '2',
                            '--iterations', '10000'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(tmp_path)},
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background inherits it ignored
    end = time.time() + 120
    while time.time() < end and run.poll() is None and not ((out/'metrics.jsonl').exists() and (out/'metrics.jsonl').read_text().count('\n') >= 2):
        time.sleep(.2)
    run.send_signal(signal.SIGINT)
    try:
        said, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0, errors
    assert 'Stopped by SIGINT after' in said and 'same command and --resume' in said and 'Traceback' not in errors
    assert len((out/'metrics.jsonl').read_text().splitlines()) >= 2 and any((out/'weights').iterdir())

def test_help_is_fast():
    "Neither the package nor its help imports torch."
    code = 'import sys, g2rpo, g2rpo.cli; g2rpo.cli.parser().format_help(); print("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'False'
    def fastest(*args):
        times = []
        for _ in range(3):
            begin = time.time()
            subprocess.run([sys.executable, *args], capture_output=True, check=True)
            times.append(time.time() - begin)
        return min(times)
    assert fastest('-c', 'import g2rpo') < .5 and fastest('-m', 'g2rpo.cli', '--help') < 1
