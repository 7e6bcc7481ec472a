"Formulas against float64 reference values, in double and in single precision."
import math
from dataclasses import replace

import pytest
import torch
from g2rpo.core import sampler, schedule
from g2rpo.core.batches import used_steps
from g2rpo.core.advantage import compute_advantages, fuse_advantages, group_advantage
from g2rpo.core.loss import clipped_surrogate, contrast_loss, divergence_surrogate, step_kl
from g2rpo.core.method import Method
from g2rpo.core.rows import METHODS
from g2rpo.core.window import Window
from g2rpo.errors import InputError
from g2rpo.models.policy import Condition
from g2rpo.core.naive import naive_rollout
from g2rpo.core.rollout import rollout
from g2rpo.core.velocity import Ledger
from g2rpo.core.credit import CREDITS, step_credit
from g2rpo.core.psi import is_balanced

TYPES = [(torch.float64, 1e-10), (torch.float32, 1e-6)]

def close(got, want, tol):
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(got, dtype=torch.float64), want, rtol=tol, atol=tol)

def f64(values): return torch.tensor(values, dtype=torch.float64)

def inputs(vectors, dtype):
    return [torch.tensor(vectors[f'input/{n}'], dtype=dtype) for n in ('x', 'v', 'eps', 'v_new')]

def test_schedules(vectors):
    close(schedule.shift_grid(16), vectors['schedule/shift3_T16'], 1e-12)
    close(schedule.sd3_grid(10), vectors['schedule/sd3_T10'], 1e-12)
    close(schedule.dynamic_mu(45*45), vectors['schedule/flux720_T16_mu'], 1e-12)
    for pixels, tokens, T in ((512, 1024, 6), (1024, 4096, 10)):
        mu = schedule.dynamic_mu(tokens)
        close(mu, vectors[f'schedule/flux{pixels}_T{T}_mu'], 1e-12)
        close(schedule.dynamic_grid(T, mu), vectors[f'schedule/flux{pixels}_T{T}'], 1e-12)

@pytest.mark.parametrize('dtype,tol', TYPES)
@pytest.mark.parametrize('form,prefix,eta', [('flow', 'flow_sde', .7), ('dance', 'dance_sde', .3), ('cps', 'cps', .8)])
def test_stochastic_steps(vectors, form, prefix, eta, dtype, tol):
    x, v, eps, v_new = inputs(vectors, dtype)
    grid = schedule.shift_grid(16)
    levels = schedule.noise_levels(grid, eta, form)
    cases = {int(k.split('/i')[1]): val for k, val in vectors.items() if k.startswith(f'{prefix}/T16/')}
    assert len(cases) >= 2
    for i, want in cases.items():
        mean, std = sampler.kernel(form, x, v, grid[i], grid[i + 1], levels[i])
        y = mean + std*eps
        close(mean, want['mean'], tol)
        close(std.flatten()[0], want['std'], tol)
        close(y, want['y'], tol)
        close(sampler.log_prob(form, y, mean, std), want['logp'], tol)
        if 'x0' in want:
            close(sampler.predict_x0(x, v, grid[i]), want['x0'], tol)
        if 'sigma_t' in want:
            close(levels[i], want['sigma_t'], 1e-10)
        if 'logp_new' in want:
            new, _ = sampler.kernel(form, x, v_new, grid[i], grid[i + 1], levels[i])
            close(sampler.log_prob(form, y, new, std), want['logp_new'], tol)

@pytest.mark.parametrize('dtype,tol', TYPES)
def test_constant_level_on_sd3_grid(vectors, dtype, tol):
    "DenseGRPO after calibration: the level itself is ψ."
    x, v, eps, _ = inputs(vectors, dtype)
    grid, want = schedule.sd3_grid(10), vectors['dense_psi_sde/sd3_T10/i3/psi0.9']
    mean, std = sampler.sde_kernel(x, v, grid[3], grid[4], .9)
    close(mean, want['mean'], tol)
    close(std.flatten()[0], want['std'], tol)
    close(sampler.log_prob('flow', mean + std*eps, mean, std), want['logp'], tol)

def test_euler_is_first_order_dpm_solver(vectors):
    x, v, *_ = inputs(vectors, torch.float64)
    grid = schedule.shift_grid(16)
    close(sampler.ode_step(x, v, grid[8], grid[9]), vectors['dpmpp2m/T16/i8_first'], 1e-10)

def test_step_stds(vectors):
    flux = schedule.dynamic_grid(10, schedule.dynamic_mu(4096))
    for grid, eta, key in ((schedule.sd3_grid(10), .7, 'tempflow/sd3_std_T10_eta0.7'),
                           (flux, .9, 'tempflow/flux1024_std_T10_eta0.9')):
        close(schedule.noise_levels(grid, eta)*(grid[:-1] - grid[1:]).sqrt(), vectors[key], 1e-10)

def test_coefficients_and_residual_noise(vectors):
    "Coefficients of x and v, and the noise that one step leaves behind."
    flux = schedule.dynamic_grid(6, schedule.dynamic_mu(1024))
    for grid, eta, key in ((schedule.shift_grid(16), .7, 'residual_noise/shift3_T16_eta0.7'),
                           (flux, .9, 'residual_noise/flux512_T6_eta0.9')):
        levels, one = schedule.noise_levels(grid, eta), torch.ones(1, 1, dtype=torch.float64)
        for i, s, t, left in vectors[key]:
            mean, std = sampler.sde_kernel(grid[i]*one, one, grid[i], grid[i + 1], levels[i])
            close((mean**2 + std**2).sqrt().item(), left, 1e-10)
    grid, one = schedule.shift_grid(16), torch.ones(1, 1, dtype=torch.float64)
    levels = schedule.noise_levels(grid, .7)
    for i, sigma, level, std, of_x, of_v, *_ in vectors['flow_sde/table_T16_eta0.7']:
        close(levels[i], level, 1e-10)
        close(sampler.sde_kernel(one, 0*one, grid[i], grid[i + 1], levels[i])[0].item(), of_x, 1e-10)
        close(sampler.sde_kernel(0*one, one, grid[i], grid[i + 1], levels[i])[0].item(), of_v, 1e-10)

def test_completion_nodes(vectors):
    cases = {k: v for k, v in vectors.items() if k.startswith('mgai/T16/')}
    assert len(cases) > 15
    for key, nodes in cases.items():
        k, lam = (int(part.lstrip('klam')) for part in key.split('/')[2:])
        assert schedule.completion_nodes(16, k, lam) == nodes

def test_advantages(vectors):
    lams = [f64(vectors[f'adv/g2rpo_r_lam{n}']).T for n in (1, 2)]
    close(fuse_advantages({'r': torch.stack(lams)}), f64(vectors['adv/g2rpo_sum']).T, 1e-6)
    gains = f64(vectors['dense/deltaR']).T
    close(fuse_advantages({'r': gains[None]}), f64(vectors['dense/adv_ddof1_eps1e-8']).T, 1e-6)

def test_surrogate(vectors):
    want = vectors['ppo/clip1e-4']
    new = torch.tensor(want['lp_new'], dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(new, f64(want['lp_old']), f64(want['adv']).clamp(-5, 5), 1e-4).mean()
    loss.backward()
    close(loss.item(), want['loss'], 1e-10)
    assert (new.grad != 0).tolist() == want['grad_flows']

def test_dense_gains_and_both_normalisations(vectors):
    rewards = f64(vectors['dense/R_T_to_R_0']).T[None, :, None]                          # (Λ, V, P, G)
    gains = CREDITS['gain'](rewards, 3)
    close(gains[0, :, 0].T, vectors['dense/deltaR'], 1e-10)
    close(gains.sum(1), rewards[:, -1] - rewards[:, 0], 1e-12)
    close(group_advantage(gains[0, :, 0], 1e-4, ddof=0).T, vectors['dense/adv_ddof0_eps1e-4'], 1e-10)
    row = replace(METHODS['dense_grpo'], last_noisy=False)
    credited = compute_advantages(row, row.plan(schedule.sd3_grid(4)), {'r': rewards})
    close(credited[:, 0].T, vectors['dense/adv_ddof0_eps1e-4'], 1e-10)
    close(CREDITS['value'](rewards, 3)[0, :, 0].T, f64(vectors['dense/R_T_to_R_0'])[:, 1:], 1e-12)

def test_both_kls(vectors):
    x, v, _, v_new = inputs(vectors, torch.float64)
    grid = schedule.sd3_grid(10)
    levels, dt = schedule.noise_levels(grid, .7), float(grid[3] - grid[4])
    (mean, std), (new, _) = (sampler.kernel('flow', x, u, grid[3], grid[4], levels[3]) for u in (v, v_new))
    close(step_kl(new, mean, std, dt, 'exact'), vectors['kl/sd3_i3']['paper_with_dt'], 1e-10)
    close(step_kl(new, mean, std, dt, 'flow_grpo'), vectors['kl/sd3_i3']['code_without_dt'], 1e-10)

def test_tempflow_weights(vectors):
    "Ours have mean 1 exactly; the scripts' constant 2.25 is 0.1 % off that."
    std = f64(vectors['tempflow/sd3_std_T10_eta0.7'])[:9]
    close(schedule.noise_weights(std)*std.mean()*2.25, vectors['tempflow/sd3_weight_2.25std'], 1e-10)
    assert 1/std.mean() == pytest.approx(2.25, rel=2e-3)
    plan = METHODS['tempflow_grpo'].plan(schedule.sd3_grid(10))
    close(torch.stack([plan.std(k) for k in plan.trained]), std, 1e-10)

def test_calibration_rule(vectors):
    "How often the paper's count raises a step with fair signs, by enumeration of all draws."
    from math import comb
    for n, want in vectors['dense/alg1_P(|pos-neg|<2)_fair_signs'].items():
        n = int(n)
        gains = torch.tensor([[1.]*k + [-1.]*(n - k) for k in range(n + 1)])
        raised = is_balanced(gains, 'count')
        close(sum(comb(n, k) for k in range(n + 1) if raised[k])/2**n, want, 1e-10)

class Still:
    "A policy that moves nothing and counts nothing but what the ledger counts."
    latent_shape, device, passes = (1, 1), 'cpu', 1
    def grid(self, T): return schedule.shift_grid(T)
    def encode(self, prompts): return Condition(torch.zeros(len(prompts), 1, 1), torch.zeros(len(prompts), 1))
    def velocity(self, x, sigma, cond): return x

def spent(run, method, T, group_size):
    "(forwards, images, states with gradient) of one prompt."
    ledger = Ledger()
    roll = run(Still(), method, ['p'], T, group_size, ledger=ledger)
    images = sum(x.shape[:3].numel() for x in roll.x0.values())
    return ledger.forwards, images, sum(len(rows) for step in roll.updates for _, rows in step)

@pytest.mark.parametrize('lams', [(1,), (1, 2), (1, 2, 3)])
def test_g2rpo_forward_counts(vectors, lams):
    want, method = vectors['nfe'][str(lams)], Method('m', granularities=lams)
    assert spent(naive_rollout, method, 16, 12)[:2] == (want['code'], want['decodes'])
    assert spent(rollout, method, 16, 12) == (want['trunc_anchor'], want['decodes'], want['grad_forwards_batch1'])

def test_forward_counts_of_the_other_rows(vectors):
    nfe, dense = vectors['nfe'], METHODS['dense_grpo']
    for run in (naive_rollout, rollout):
        assert spent(run, METHODS['dance_grpo'], 16, 12)[0] == nfe['DanceGRPO T16 f0.6']['rollout']
        assert spent(run, METHODS['mix_grpo'], 25, 12)[0] == nfe['MixGRPO T25 w4']['rollout']
    assert spent(rollout, METHODS['dance_grpo'], 16, 12)[2] == nfe['DanceGRPO T16 f0.6']['grad']
    assert spent(rollout, METHODS['mix_grpo'], 25, 12)[2] == nfe['MixGRPO T25 w4']['grad']
    assert spent(naive_rollout, dense, 10, 24)[0] == nfe['DenseGRPO T10 n=t']['naive_rollout']
    for n, key in ((None, 't'), (1, '1'), (2, '2')):
        want = nfe[f'DenseGRPO T10 n={key}']
        assert spent(rollout, replace(dense, completion=n), 10, 24) == (want['shared_first_eval'], want['rewards'], 216)
    turning = nfe['TP-GRPO T10 window 9']
    assert spent(naive_rollout, METHODS['tp_grpo'], 10, 24)[0] == 24*(turning['per_traj'] + turning['baseline_ode'])
    # the published count walks four trunks to their end, of which only nine steps are needed,
    # and takes a gradient pass for each of 24 branches, where the six of a start share one
    want = nfe['TempFlow T10 K6 S4 (steps 0..8 branched)']
    assert spent(rollout, METHODS['tempflow_grpo'], 10, 24) == (want['rollout'] - 4, 216, want['grad']//6)

def test_rows_are_the_papers():
    assert METHODS['g2rpo'].granularities == (1, 2, 3) and METHODS['g2rpo'].noisy_steps(16) == tuple(range(8))
    assert METHODS['g2rpo_no_mgai'].granularities == (1,)
    chains = ('flow_grpo', 'grpo_guard', 'dance_grpo', 'slas', 'dense_grpo', 'dense_value', 'stepwise_grpo', 'tp_grpo',
              'stepwise_grpo_ddim', 'tp_grpo_released')
    plain = {name: row for name, row in METHODS.items() if row.explore == 'chain' and not row.window}
    assert {name: row.noisy_steps(10) for name, row in plain.items()} == dict.fromkeys(chains, tuple(range(9)))
    assert METHODS['flow_grpo'].plan(schedule.sd3_grid(10)).noisy == tuple(range(10))
    mix = METHODS['mix_grpo']
    assert mix.noisy_steps(25, 0, 0) == (0, 1, 2, 3) and mix.noisy_steps(25, 0, 299) == (11, 12, 13, 14)
    assert {replace(mix, window=Window(4, 'random')).noisy_steps(25, 0, i)[0] for i in range(500)} == set(range(20))

def test_a_divergence_in_place_of_the_clip():
    "Flow-DPPO's rule written out: without gradient is what is at or beyond the limit and has gone where A wants it."
    draw = torch.Generator().manual_seed(0)
    new, advantage = (torch.randn(200, generator=draw, dtype=torch.float64) for _ in 'ab')
    divergence = 2e-5*torch.rand(200, generator=draw, dtype=torch.float64)
    loss, taken_out = divergence_surrogate(new.requires_grad_(), torch.zeros(200), advantage, divergence, 1e-5)
    for n, a, d, found in zip(new.tolist(), advantage.tolist(), divergence.tolist(), loss.tolist()):
        over = (n > 0 and a > 0 or n < 0 and a < 0) and d >= 1e-5
        assert found == (0. if over else pytest.approx(-a*math.exp(n), rel=1e-12))
    assert torch.equal(taken_out, loss == 0)
    loss.sum().backward()
    assert torch.equal(new.grad, loss.detach())         # d(−A eⁿ)/dn = −A eⁿ
    row = METHODS['flow_dppo']
    assert row.kl_mask == 1e-5 and {len(row.noisy_steps(10, 0, i)) for i in range(20)} == {3}

def test_a_power_of_the_advantage():
    "SLAS: the std of the batch, then sign(A)|A|², then the clamp; a power of 1 changes no bit."
    rewards = dict(r=torch.randn(1, 1, 4, 6, generator=torch.Generator().manual_seed(1)))
    row = METHODS['slas']
    plan = row.plan(schedule.shift_grid(10))
    centred = rewards['r'][0, 0] - rewards['r'][0, 0].mean(-1, keepdim=True)
    scaled = centred/(rewards['r'].flatten().std() + row.eps)
    wanted = (scaled.sign()*scaled**2).clamp(-5, 5).expand(9, 4, 6)
    torch.testing.assert_close(compute_advantages(row, plan, rewards), wanted)
    plain = replace(row, adv_power=1.)
    normalised = scaled.clamp(-5, 5).expand(9, 4, 6)
    torch.testing.assert_close(compute_advantages(plain, plan, rewards), normalised)

def images_noised_again(n=50):
    "Images, noise, times, and the velocities of two policies there."
    draw = torch.Generator().manual_seed(2)
    x0, eps, old, off = torch.randn(4, n, 3, 2, generator=draw, dtype=torch.float64)
    return x0, eps, .02 + .97*torch.rand(n, 1, 1, generator=draw, dtype=torch.float64), eps - x0 + .5*old, .1*off

@pytest.mark.parametrize('beta', [.1, 1.])
def test_two_policies_in_place_of_a_ratio(beta):
    "DiffusionNFT's loss against clean estimates of both policies, image by image (train_nft_sd3.py@24af555)."
    x0, eps, sigma, old, off = images_noised_again()
    advantage = torch.linspace(-5, 5, len(x0), dtype=torch.float64)
    loss = contrast_loss(old + off, old, eps - x0, sigma, advantage, beta, 5.)
    for i, found in enumerate(loss.tolist()):
        x = sampler.noise_image(x0[i], eps[i], sigma[i])
        good, want = advantage[i].item()/10 + .5, 0.
        for share, v in ((good, beta*(old + off) + (1 - beta)*old), (1 - good, (1 + beta)*old - beta*(old + off))):
            error = x - sigma[i]*v[i] - x0[i]
            want += share*((error**2)/max(error.abs().mean().item(), 1e-5)).mean().item()*5/beta
        assert found == pytest.approx(want, rel=1e-10)

def test_a_matching_loss_as_log_probability():
    "The matching loss, and AWM's power of it, written out (train_sd3_awm.py@be51372, ghuber)."
    x0, eps, sigma, v, _ = images_noised_again()
    for i in range(len(x0)):
        loss, t = ((v[i] - (eps[i] - x0[i]))**2).mean().item(), sigma[i].item()
        one = (eps - x0)[i:i + 1], v[i:i + 1], sigma[i:i + 1]
        found = [sampler.matching_log_prob(*one, power).item() for power in (0., .25)]
        assert found == pytest.approx([-loss, -t*((loss + 1e-10)**.25 - (1e-10)**.25)/.25], rel=1e-12)

def test_an_error_in_units_of_its_size():
    "V-GRPO's surrogate, written out: the squared error of the clean image over its mean absolute error."
    x0, eps, sigma, v, _ = images_noised_again()
    x = sampler.noise_image(x0, eps, sigma)
    for i in range(len(x0)):
        error = x[i] - sigma[i]*v[i] - x0[i]
        found = sampler.clean_log_prob((eps - x0)[i:i + 1], v[i:i + 1], sigma[i:i + 1]).item()
        assert found == pytest.approx(-((error**2).mean()/error.abs().mean()).item(), rel=1e-10)
    right = eps - x0
    assert torch.equal(sampler.clean_log_prob(right, right, sigma), torch.zeros(len(x0), dtype=x0.dtype))

@pytest.mark.parametrize('changes,word', [
    (dict(strata=9), 'each part needs a step'), (dict(timestep_fraction=.5), 'which steps are used'),
    (dict(update='per_step'), 'no optimiser step'), (dict(huber=.25), 'what the loss is'),
    (dict(contrast=1., clip_range=1e-4), 'what the loss is'), (dict(strata=-1), 'at least'),
    (dict(soft_clip=-1.), 'at least'), (dict(explore='chain'), 'noised again')])
def test_what_shared_times_refuse(changes, word):
    with pytest.raises(InputError, match=word):
        replace(METHODS['v_grpo'], **changes).plan(schedule.shift_grid(8))

def test_a_group_draws_a_step_of_each_part():
    "Every step is drawn at times, alike by all members, and each prompt draws its own."
    row, seen = METHODS['v_grpo'], set()
    for iteration in range(40):
        used = torch.stack(used_steps(row, ['a', 'b'], [6]*10, 0, iteration))                       # (K, P, S)
        assert torch.equal(used, used[..., :1].expand_as(used))
        assert all((part.sum(0) == 1).all() for part in used[..., 0].tensor_split(4))
        seen |= {(j, p) for j, p in used[..., 0].nonzero().tolist()}
    assert seen == {(j, p) for j in range(10) for p in range(2)}

@pytest.mark.parametrize('changes,word', [
    (dict(eta=.3), 'noisy steps'), (dict(window=Window()), 'stretch of a chain'), (dict(guard=True), 'noisy steps'),
    (dict(granularities=(1, 2)), 'several strides'), (dict(starts=1), 'starts=1'), (dict(credit='gain'), 'one reward'),
    (dict(kl='exact'), 'velocity'), (dict(contrast=1.), 'what the loss is'), (dict(contrast=1., huber=0.), 'no ratio'),
    (dict(explore='chain'), 'noised again')])
def test_what_the_forward_process_refuses(changes, word):
    with pytest.raises(InputError, match=word):
        replace(METHODS['awm'], **changes)

def test_both_versions_of_a_method_are_rows():
    "What two published versions of one method have in common, and where they part."
    def parts(one, other):
        a, b = vars(METHODS[one]), vars(METHODS[other])
        return {name for name in a if a[name] != b[name]} - {'name'}
    assert parts('g2rpo', 'g2rpo_accumulate') == {'update'}
    assert parts('e_grpo', 'e_grpo_script') == {'merge_min_std', 'steps', 'spans'}
    assert parts('tempflow_grpo', 'tempflow_grpo_script') == {'mask_constant', 'mask_whole', 'shuffle'}
    assert parts('flow_grpo_fast', 'flow_grpo_fast_script') == {'window', 'shuffle'}
    assert parts('tp_grpo', 'tp_grpo_released') == {
        'first_turn', 'consistent_turns', 'balanced_turns', 'mask_whole', 'shuffle', 'kl', 'beta'}
    assert METHODS['flow_grpo_fast_script'].window.size == 3 and METHODS['flow_grpo_fast_script'].form == 'cps'

def script_spans(sigma, k, span, eta=.7):
    "Mean coefficients and noise of `_flow_grpo_step` in flux_sampler.py@809e8f7, written out: σ from k to k+span."
    now, then, g2 = sigma[k], sigma[k + span], eta**2*sigma[k]/(1 - (sigma[1] if k == 0 else sigma[k]))
    dt = then - now
    return 1 + g2/(2*now)*dt, (1 + g2*(1 - now)/(2*now))*dt, (g2*-dt)**.5

def test_spans_of_the_e_grpo_script():
    grid, row = schedule.shift_grid(16), METHODS['e_grpo_script']
    plan, one = row.plan(grid), torch.ones(1, 1, dtype=torch.float64)
    assert plan.after == {0: 1, 1: 2, 2: 4, 4: 7}
    for k, span in zip(row.steps, row.spans):
        of_x, of_v, std = script_spans(grid, k, span)
        close(sampler.kernel('flow', one, 0*one, grid[k], grid[k + span], plan.levels[k])[0].item(), of_x, 1e-12)
        close(sampler.kernel('flow', 0*one, one, grid[k], grid[k + span], plan.levels[k])[0].item(), of_v, 1e-12)
        close(plan.std(k), std, 1e-12)

def test_one_step_for_all_k_averages_over_k():
    "train_g2rpo_hps_clip.py@0e69799: the mean over K of each step's mean over G is one mean over all transitions."
    roll = rollout(Still(), METHODS['g2rpo_accumulate'], ['p'], 16, 12)
    assert [j for j, _ in roll.updates[0]] == list(range(8)) and len(roll.updates) == 1
    losses = torch.rand(8, 12, dtype=torch.float64)
    close(sum(losses[k].mean()/8 for k in range(8)), losses.mean(), 1e-12)

def test_the_window_of_the_mixgrpo_trainer():
    "Its loop, written out, for the decay that its scripts pass: at most 10 iterations, at least 1."
    start, held, want = 0, 0, []
    for _ in range(300):
        want.append(tuple(range(start, min(start + 4, 23))))
        held += 1
        if held >= max(1, int(10*(1 - start/23) + start/23)):
            start, held = start + 1, 0
        if start > 22:          # the trainer goes on to 23, an empty window, for one iteration more
            break
    window = Window(4, 'decay', every=10, least=1)
    assert [window.steps(25, 0, i) for i in range(len(want))] == want and len(want) > 100

def script_turning_credit(paths):
    "TP-GRPO's rule as its scripts run it, trajectory by trajectory: R_0 ... R_K of each member of one group, (G, K+1)."
    gains = [[b - a for a, b in zip(path, path[1:])] for path in paths]
    whole = [path[-1] - path[0] for path in paths]
    turns = []
    for g, path in enumerate(paths):
        for t, d in enumerate(gains[g]):
            onward = d*(path[-1] - path[t + 1]) > 0
            turned = t == 0 or (gains[g][t - 1]*whole[g] < 0 and d*whole[g] > 0)
            if onward and turned:
                turns.append((-abs(whole[g]), t, g))          # of equal size the earlier step first
    up, down = [x for x in sorted(turns) if whole[x[2]] > 0], [x for x in sorted(turns) if whole[x[2]] < 0]
    if up and down:
        turns = up[:min(len(up), len(down))] + down[:min(len(up), len(down))]
    credit = [list(row) for row in gains]
    for _, t, g in turns:
        credit[g][t] = paths[g][-1] - paths[g][t]
    return credit

def test_turning_points_as_released():
    "Many random groups, among them some where all turn the same way."
    gen, row, changed = torch.Generator().manual_seed(0), METHODS['tp_grpo_released'], 0
    for group_size in (1, 2, 6, 24):
        for _ in range(20):
            paths = torch.randn(group_size, 10, generator=gen, dtype=torch.float64).cumsum(-1)
            rewards = paths.T[None, :, None]                                             # (Λ, K+1, P, G)
            got = step_credit(row, rewards, 9)[0, :, 0].T
            close(got, script_turning_credit(paths.tolist()), 1e-12)
            changed += (got != step_credit(METHODS['tp_grpo'], rewards, 9)[0, :, 0].T).sum().item()
    assert changed > 0

def test_groups_are_balanced_one_by_one():
    "Two prompts side by side get what each gets alone."
    row = METHODS['tp_grpo_released']
    rewards = torch.randn(1, 10, 2, 12, generator=torch.Generator().manual_seed(1)).cumsum(1)
    for p in range(2):
        assert torch.equal(step_credit(row, rewards, 9)[:, :, p:p + 1], step_credit(row, rewards[:, :, p:p + 1], 9))

@pytest.mark.parametrize('changes,word', [
    (dict(updates=2), 'one optimiser step'), (dict(update='per_step'), 'one optimiser step'),
    (dict(huber=.25), 'huber'), (dict(timestep_fraction=.5), 'weighed whole'),
    (dict(kl=None, beta=0.), 'before training')])
def test_what_a_weighed_group_refuses(changes, word):
    with pytest.raises(InputError, match=word):
        replace(METHODS['dgpo'], **changes)

@pytest.mark.parametrize('changes', [dict(guard=True), dict(noise_weighted=True), dict(form='cps')])
def test_a_step_is_weighed_once(changes):
    with pytest.raises(InputError, match='gradient_weighted'):
        replace(METHODS['flash_grpo'], **changes)
