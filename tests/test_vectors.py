"Formulas against float64 reference values, in double and in single precision."
import pytest
import torch
from g2rpo import sampler, schedule
from g2rpo.advantage import fuse
from g2rpo.method import METHODS, Method
from g2rpo.rollout import Ledger, naive_rollout, rollout
from g2rpo.trainer import surrogate

TYPES = [(torch.float64, 1e-10), (torch.float32, 1e-6)]

def close(got, want, tol):
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(got, dtype=torch.float64), want, rtol=tol, atol=tol)

def f64(values): return torch.tensor(values, dtype=torch.float64)

def inputs(vectors, dtype): return [torch.tensor(vectors[f'input/{n}'], dtype=dtype) for n in ('x', 'v', 'eps', 'v_new')]

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
        close(mean, want['mean'], tol); close(std.flatten()[0], want['std'], tol); close(y, want['y'], tol)
        close(sampler.log_prob(form, y, mean, std), want['logp'], tol)
        if 'x0' in want: close(sampler.clean(x, v, grid[i]), want['x0'], tol)
        if 'sigma_t' in want: close(levels[i], want['sigma_t'], 1e-10)
        if 'logp_new' in want:
            new, _ = sampler.kernel(form, x, v_new, grid[i], grid[i + 1], levels[i])
            close(sampler.log_prob(form, y, new, std), want['logp_new'], tol)

@pytest.mark.parametrize('dtype,tol', TYPES)
def test_constant_level_on_sd3_grid(vectors, dtype, tol):
    "DenseGRPO after calibration: the level itself is ψ."
    x, v, eps, _ = inputs(vectors, dtype)
    grid, want = schedule.sd3_grid(10), vectors['dense_psi_sde/sd3_T10/i3/psi0.9']
    mean, std = sampler.sde_kernel(x, v, grid[3], grid[4], .9)
    close(mean, want['mean'], tol); close(std.flatten()[0], want['std'], tol)
    close(sampler.log_prob('flow', mean + std*eps, mean, std), want['logp'], tol)

def test_euler_is_first_order_dpm_solver(vectors):
    x, v, *_ = inputs(vectors, torch.float64)
    grid = schedule.shift_grid(16)
    close(sampler.ode_step(x, v, grid[8], grid[9]), vectors['dpmpp2m/T16/i8_first'], 1e-10)

def test_step_stds(vectors):
    for grid, eta, key in ((schedule.sd3_grid(10), .7, 'tempflow/sd3_std_T10_eta0.7'),
                           (schedule.dynamic_grid(10, schedule.dynamic_mu(4096)), .9, 'tempflow/flux1024_std_T10_eta0.9')):
        close(schedule.noise_levels(grid, eta)*(grid[:-1] - grid[1:]).sqrt(), vectors[key], 1e-10)

def test_coefficients_and_residual_noise(vectors):
    "Coefficients of x and v, and the noise that one step leaves behind."
    for grid, eta, key in ((schedule.shift_grid(16), .7, 'residual_noise/shift3_T16_eta0.7'),
                           (schedule.dynamic_grid(6, schedule.dynamic_mu(1024)), .9, 'residual_noise/flux512_T6_eta0.9')):
        levels, one = schedule.noise_levels(grid, eta), torch.ones(1, 1, dtype=torch.float64)
        for i, s, t, left in vectors[key]:
            mean, std = sampler.sde_kernel(grid[i]*one, one, grid[i], grid[i + 1], levels[i])
            close((mean**2 + std**2).sqrt().item(), left, 1e-10)
    grid, levels, one = schedule.shift_grid(16), schedule.noise_levels(schedule.shift_grid(16), .7), torch.ones(1, 1, dtype=torch.float64)
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
    close(fuse({'r': torch.stack(lams)}), f64(vectors['adv/g2rpo_sum']).T, 1e-6)
    gains = f64(vectors['dense/deltaR']).T
    close(fuse({'r': gains[None]}), f64(vectors['dense/adv_ddof1_eps1e-8']).T, 1e-6)

def test_surrogate(vectors):
    want = vectors['ppo/clip1e-4']
    new = torch.tensor(want['lp_new'], dtype=torch.float64, requires_grad=True)
    loss = surrogate(new, f64(want['lp_old']), f64(want['adv']).clamp(-5, 5), 1e-4).mean()
    loss.backward()
    close(loss.item(), want['loss'], 1e-10)
    assert (new.grad != 0).tolist() == want['grad_flows']

@pytest.mark.parametrize('lams', [(1,), (1, 2), (1, 2, 3)])
def test_forward_counts(vectors, lams):
    want = vectors['nfe'][str(lams)]
    class Still:
        latent_shape, device = (1, 1), 'cpu'
        def grid(self, T): return schedule.shift_grid(T)
        def encode(self, prompts):
            from g2rpo.policy import Condition
            return Condition(torch.zeros(len(prompts), 1, 1), torch.zeros(len(prompts), 1))
        def velocity(self, x, sigma, cond): return x
    for run, count in ((naive_rollout, want['code']), (rollout, want['trunc_anchor'])):
        ledger = Ledger()
        result = run(Still(), Method('m', granularities=lams), ['p'], 16, 12, ledger=ledger)
        assert ledger.forwards == count
        assert sum(x.shape[:3].numel() for x in result.x0.values()) == want['decodes']

def test_rows_are_the_papers():
    assert METHODS['g2rpo'].granularities == (1, 2, 3) and METHODS['g2rpo'].noisy_steps(16) == tuple(range(8))
    assert METHODS['g2rpo_no_mgai'].granularities == (1,)
