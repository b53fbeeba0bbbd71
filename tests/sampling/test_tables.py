"""Coefficient tables against the published steps, the marginals they must preserve, and the weights of steps.

Letters: T steps, G groups, N samples.
"""

import math

import pytest
import torch
from support.schedules import MU, SD3, SPREAD, marginal, schedule, velocity

from fastgrpo.sampling.tables import (
    SAMPLERS,
    coefficient_table,
    kl_weights,
    sampler_steps,
    step_weights,
    window_tables,
)
from fastgrpo.sampling.windows import trained_steps

NOISE = {"flow_sde": 0.7, "dance_sde": 0.3, "wan_sde": 1.0, "cps": 0.8, "ode": 0.0}


def published_step(sampler, x, v, sigmas, i, noise_level):
    """Mean and std of step i, written as the released code of each paper writes them."""
    sigma, sigma_prev = sigmas[i], sigmas[i + 1]
    dt = sigma_prev - sigma
    if sampler == "flow_sde":
        std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * noise_level
        mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt)
        mean = mean + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, std_dev_t * torch.sqrt(-1 * dt)
    if sampler == "dance_sde":
        x0 = x - sigma * v
        score = -(x - x0 * (1 - sigma)) / sigma**2
        return x + dt * v - 0.5 * noise_level**2 * score * dt, noise_level * torch.sqrt(-dt)
    if sampler == "wan_sde":
        sigma_max, sigma_min = sigmas[1].item(), sigmas[-1].item()
        std_dev_t = noise_level * (sigma_min + (sigma_max - sigma_min) * sigma)
        mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, std_dev_t * torch.sqrt(-1 * dt)
    if sampler == "cps":
        std_dev_t = sigma_prev * math.sin(noise_level * math.pi / 2)
        x0, x1 = x - sigma * v, x + v * (1 - sigma)
        return x0 * (1 - sigma_prev) + x1 * torch.sqrt(sigma_prev**2 - std_dev_t**2), std_dev_t
    return x + dt * v, torch.zeros_like(sigma)


@pytest.mark.parametrize("sigmas", [SD3, schedule(7), schedule(1), schedule(10, 3.0)[1:]], ids=len)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_table_is_the_published_step(sampler, sigmas):
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 33, generator=generator, dtype=torch.float64)
    table = coefficient_table(sampler_steps(sampler, sigmas, NOISE[sampler]))
    assert table.shape == (sigmas.numel() - 1, 4) and table.dtype == torch.float64
    for i, (c_x, c_v, s, w) in enumerate(table):
        mean, std = published_step(sampler, x, v, sigmas, i, NOISE[sampler])
        torch.testing.assert_close(c_x * x + c_v * v, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s, std, rtol=1e-12, atol=0)
        assert w == (1 / (2 * s**2) if s > 0 else 0)


def test_sd3_coefficients():
    """The numbers of Flow-GRPO's own setting: SD3.5, shift 3, T = 10, a = 0.7; and CPS 0.8 beside it."""
    table = coefficient_table(sampler_steps("flow_sde", SD3, 0.7))
    expected = {  # sigma, s, c_x, c_v
        0: (1.000, 0.700, 0.755, -0.040),
        1: (0.960, 0.743, 0.713, -0.058),
        4: (0.790, 0.392, 0.903, -0.103),
        7: (0.465, 0.282, 0.914, -0.233),
        8: (0.278, 0.225, 0.909, -0.335),
        9: (0.009, 0.006, 0.998, -0.011),
    }
    for i, (sigma, s, c_x, c_v) in expected.items():
        got = torch.cat([SD3[i : i + 1], table[i, [2, 0, 1]]])
        assert (got - torch.tensor([sigma, s, c_x, c_v])).abs().max() < 6e-4, (i, got)
    assert table[0, 2].item() == pytest.approx(0.7, abs=1e-12)
    cps_std = coefficient_table(sampler_steps("cps", SD3, 0.8))[[0, 1, 4, 7, 8, 9], 2]
    assert (cps_std - torch.tensor([0.913, 0.869, 0.673, 0.264, 0.008, 0.0])).abs().max() < 6e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_noise_every_sampler_is_the_ode(sampler):
    torch.testing.assert_close(
        coefficient_table(sampler_steps(sampler, SD3, 0.0)), coefficient_table(sampler_steps("ode", SD3, 0.0))
    )


# The marginals. For data N(MU, SPREAD^2) the exact velocity E[x1 - x0 | x_t] is affine in x_t, so each step
# maps a Gaussian to a Gaussian, and the mean and std of what is sampled follow without Monte-Carlo error.
STEPS = 400
# What is left is the error of the Euler step, O(1 / T), and of the first steps of flow_sde: g diverges at
# sigma = 1, so s[0] = a whatever T is, and the excess of std there dies out only as about 1 / sqrt(T).
# Measured at T = 400, sigma <= 0.75: 0.0081 flow_sde, 0.0024 dance_sde, 0.0020 wan_sde, 0.0032 cps, 0.0026 ode.
TOLERANCE = {"flow_sde": 0.01, "dance_sde": 0.004, "wan_sde": 0.004, "cps": 0.004, "ode": 0.004}
# cps preserves marginals as its level goes to 0. Over 400 steps this one still draws new noise of 1.6 sigma.
MARGINAL_NOISE = NOISE | {"cps": 0.05}


def sampled_moments(table, sigmas, mu=MU, spread=SPREAD):
    """Mean and std after every step, each (T,), of what the table samples from N(0, 1)."""
    mean, std = sigmas.new_zeros(()), sigmas.new_ones(())
    history = []
    for (c_x, c_v, s), sigma in zip(table[:, :3], sigmas[:-1], strict=True):
        offset = velocity(sigmas.new_zeros(()), sigma, mu, spread)
        slope = velocity(sigmas.new_ones(()), sigma, mu, spread) - offset
        mean = (c_x + c_v * slope) * mean + c_v * offset
        std = torch.sqrt(((c_x + c_v * slope) * std) ** 2 + s**2)
        history.append(torch.stack([mean, std]))
    return torch.stack(history).unbind(dim=1)


def marginal_error(table, sigmas):
    """The largest error of mean or std over the steps that end at sigma <= 0.75."""
    mean, std = sampled_moments(table, sigmas)
    true_mean, true_std = marginal(sigmas[1:])
    late = sigmas[1:] <= 0.75
    return torch.maximum((mean - true_mean).abs(), (std - true_std).abs())[late].max().item()


def flip_score_of_v(table, sigmas):
    table[:, 1] = 2 * sigmas.diff() - table[:, 1]


def flip_score_of_x(table, sigmas):
    table[:, 0] = 2 - table[:, 0]


def more_noise(table, sigmas):
    table[:, 2] *= 1.2


def no_noise(table, sigmas):
    table[:, 2] = 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_marginals_are_preserved(sampler):
    sigmas = schedule(STEPS)
    table = coefficient_table(sampler_steps(sampler, sigmas, MARGINAL_NOISE[sampler]))
    assert marginal_error(table, sigmas) < TOLERANCE[sampler]


@pytest.mark.parametrize("damage", [flip_score_of_v, flip_score_of_x, more_noise, no_noise])
@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "wan_sde", "cps"])
def test_a_wrong_table_does_not_preserve_them(sampler, damage):
    sigmas = schedule(STEPS)
    table = coefficient_table(sampler_steps(sampler, sigmas, MARGINAL_NOISE[sampler]))
    damage(table, sigmas)
    assert marginal_error(table, sigmas) > 2 * TOLERANCE[sampler]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_have_the_marginals_of_data_with_two_modes(sampler):
    """Monte-Carlo, not Gaussian: half the data around -1 and half around 1.5, with its shares and spreads."""
    n, spread, modes = 20_000, 0.3, torch.tensor([-1.0, 1.5], dtype=torch.float64)
    sigmas = schedule(STEPS)
    table = coefficient_table(sampler_steps(sampler, sigmas, MARGINAL_NOISE[sampler]))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    for (c_x, c_v, s), sigma in zip(table[:, :3], sigmas[:-1], strict=True):
        mean, std = marginal(sigma, modes, spread)  # (2,), ()
        posterior = (-0.5 * ((x[:, None] - mean) / std) ** 2).softmax(dim=1)  # (N, 2)
        v = (posterior * velocity(x[:, None], sigma, modes, spread)).sum(dim=1)
        x = c_x * x + c_v * v + s * torch.randn(n, generator=generator, dtype=torch.float64)
    # 5 standard errors: std / sqrt(n) of the mean is 0.009, of a share 0.0035; discretisation adds 0.01.
    true_std = math.sqrt(spread**2 + 1.25**2)
    assert abs(x.mean() - 0.25) < 0.055
    assert abs(x.std() - true_std) < 0.03
    assert abs((x > 0.25).double().mean() - 0.5) < 0.025
    assert abs(x[x > 0.25].std() - spread) < 0.02


@pytest.mark.parametrize("noise_level", [0.0, 0.5, 0.8, 1.0])
def test_cps_keeps_the_noise_schedule_at_few_steps(noise_level):
    """Data at one point: x_t is (1 - t) mu + t x1, and after every step the noise is exactly sigma_next."""
    mean, std = sampled_moments(coefficient_table(sampler_steps("cps", SD3, noise_level)), SD3, spread=0.0)
    torch.testing.assert_close(mean, (1 - SD3[1:]) * MU, rtol=0, atol=1e-12)
    torch.testing.assert_close(std, SD3[1:], rtol=0, atol=1e-12)


def test_flow_sde_leaves_excess_noise_at_few_steps():
    """What cps repairs. With data at 0, x = sigma x1 and v = x1 become (c_x sigma + c_v) x1 + s eps."""
    c_x, c_v, s, _ = coefficient_table(sampler_steps("flow_sde", SD3, 0.7)).T
    noise = torch.hypot(c_x * SD3[:-1] + c_v, s)[[0, 1, 4, 7, 8, 9]]
    assert (noise - torch.tensor([1.001, 0.971, 0.725, 0.341, 0.240, 0.007])).abs().max() < 1e-3
    assert noise[4] > 25 * SD3[9]  # 0.240 where 0.009 is scheduled


def test_cps_at_a_fixed_level_contracts_data_that_has_spread():
    """Its marginals are not the ODE's, with many steps either: each redraws a fixed share of the noise."""
    for num_steps in (10, 400):
        sigmas = schedule(num_steps)
        _, std = sampled_moments(coefficient_table(sampler_steps("cps", sigmas, 0.8)), sigmas)
        _, ode_std = sampled_moments(coefficient_table(sampler_steps("ode", sigmas, 0.0)), sigmas)
        assert std[-1] < 0.85 * ode_std[-1]


# Columns and windows.


def test_outside_the_window_the_step_is_the_ode():
    mask = torch.zeros(10, dtype=torch.bool)
    mask[2:5] = True
    table = coefficient_table(sampler_steps("cps", SD3, 0.8), mask)
    torch.testing.assert_close(table[mask], coefficient_table(sampler_steps("cps", SD3, 0.8))[mask], rtol=0, atol=0)
    torch.testing.assert_close(table[~mask], coefficient_table(sampler_steps("ode", SD3, 0.0))[~mask], rtol=0, atol=0)
    assert (table[~mask][:, 2:] == 0).all()


def test_log_prob_weight_of_the_released_cps_code():
    w = coefficient_table(sampler_steps("cps", SD3, 0.8), log_prob_weight="cps_reference")[:, 3]
    assert w.tolist() == [1.0] * 9 + [0.0]
    with pytest.raises(ValueError, match="'cps_reference' belongs to sampler 'cps', not 'flow_sde'"):
        coefficient_table(sampler_steps("flow_sde", SD3, 0.7), log_prob_weight="cps_reference")
    with pytest.raises(ValueError, match="'other' is unknown"):
        coefficient_table(sampler_steps("cps", SD3, 0.8), log_prob_weight="other")


@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "wan_sde", "cps"])
def test_kl_weights(sampler):
    s, dt = coefficient_table(sampler_steps(sampler, SD3, NOISE[sampler]))[:9, 2], SD3.diff()[:9]
    paper, reference = (kl_weights(sampler_steps(sampler, SD3, NOISE[sampler]), kl)[:9] for kl in ("paper", "reference"))
    torch.testing.assert_close(paper, 1 / (2 * s**2))
    std_dev_t = {  # of the released code, which the reference form divides by
        "flow_sde": 0.7 * torch.sqrt(SD3[:9] / (1 - torch.where(SD3[:9] == 1, SD3[1], SD3[:9]))),
        "dance_sde": torch.full_like(s, 0.3),
        "wan_sde": SD3[1] * SD3[:9],
        "cps": s,
    }[sampler]
    torch.testing.assert_close(reference, 1 / (2 * std_dev_t**2))
    torch.testing.assert_close(reference, paper if sampler == "cps" else paper * -dt)
    assert kl_weights(sampler_steps("cps", SD3, 0.8))[9] == 0 and kl_weights(sampler_steps("ode", SD3, 0.0)).eq(0).all()
    with pytest.raises(ValueError, match="kl 'both' is unknown"):
        kl_weights(sampler_steps(sampler, SD3, NOISE[sampler]), "both")


WINDOWS = trained_steps(torch.tensor([0, 4]), 3, 10)


def test_tempflow_weights() -> None:
    """TempFlow-GRPO's released SD3.5 script multiplies the loss by 2.25 std: over the mean of the 9 trained steps."""
    s = coefficient_table(sampler_steps("flow_sde", SD3, 0.7))[:, 2]
    whole = step_weights(sampler_steps("flow_sde", SD3, 0.7), torch.arange(10) < 9, "tempflow")
    torch.testing.assert_close(whole[:9], 2.25 * s[:9], rtol=2e-3, atol=0)
    assert whole[9] == 0
    weights = step_weights(sampler_steps("flow_sde", SD3, 0.7), WINDOWS, "tempflow")
    assert weights.shape == (2, 10) and weights.dtype == torch.float64
    for row, first in zip(weights, (0, 4), strict=True):
        window = slice(first, first + 3)
        torch.testing.assert_close(row[window].mean().item(), 1.0)
        torch.testing.assert_close(row[window] / row[first], s[window] / s[first])
        assert row.count_nonzero() == 3


@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "wan_sde", "cps"])
def test_guard_and_uniform_weights(sampler) -> None:
    guard = step_weights(sampler_steps(sampler, SD3, 0.5), WINDOWS, "guard")
    torch.testing.assert_close(guard[WINDOWS], (1 / (SD3[:-1] - SD3[1:])).expand(2, -1)[WINDOWS])
    assert guard[~WINDOWS].eq(0).all()
    assert torch.equal(step_weights(sampler_steps(sampler, SD3, 0.5), WINDOWS, "uniform"), WINDOWS.double())
    with pytest.raises(ValueError, match="step_weight 'noise' is unknown; use 'uniform', 'tempflow' or 'guard'"):
        step_weights(sampler_steps(sampler, SD3, 0.5), WINDOWS, "noise")


@pytest.mark.parametrize(
    ("sampler", "sigmas", "noise_level", "message"),
    [
        ("ddim", SD3, 0.7, "'ddim' is unknown; use one of flow_sde"),
        ("flow_sde", SD3, -0.1, "noise_level -0.1 must be"),
        ("flow_sde", SD3, math.nan, "noise_level nan must be"),
        ("cps", SD3, 1.2, r"noise_level 1.2 with sampler 'cps'.*use 0 to 1"),
        ("flow_sde", SD3.flip(0), 0.7, "fall strictly"),
        ("flow_sde", SD3[:-1], 0.7, "to exactly 0"),
        ("flow_sde", SD3 * 1000, 0.7, "from at most 1"),
        ("flow_sde", SD3[None], 0.7, r"shape \(1, 11\)"),
        ("flow_sde", torch.tensor([1 - 6e-8, 0.5, 0.0]), 0.7, "is a rounded 1"),
    ],
)
def test_bad_tables_are_refused(sampler, sigmas, noise_level, message):
    with pytest.raises(ValueError, match=message):
        coefficient_table(sampler_steps(sampler, sigmas, noise_level))


def test_bad_masks_are_refused():
    mask = torch.zeros(10, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"use bool \(..., 10\)"):
        coefficient_table(sampler_steps("cps", SD3, 0.8), mask.long())
    with pytest.raises(ValueError, match=r"use bool \(..., 10\)"):
        coefficient_table(sampler_steps("cps", SD3, 0.8), mask[:9])
    with pytest.raises(ValueError, match="no noise inside the window"):
        coefficient_table(sampler_steps("ode", SD3, 0.0), ~mask.index_fill(0, torch.tensor([9]), True))
    with pytest.raises(ValueError, match="holds the last step, 9.*end the window at step 8"):
        coefficient_table(sampler_steps("flow_sde", SD3, 0.7), ~mask)


def test_window_tables():
    start = torch.tensor([0, 2, 6])
    tables = window_tables(sampler_steps("flow_sde", SD3, 0.7), start, 3)
    assert tables.shape == (3, 10, 4) and tables.dtype == torch.float32
    for first, table in zip(start.tolist(), tables, strict=True):
        assert table[:, 2].nonzero()[:, 0].tolist() == [first, first + 1, first + 2]
        expected = coefficient_table(sampler_steps("flow_sde", SD3, 0.7), table[:, 2] > 0).float()
        torch.testing.assert_close(table, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="3 steps from step 7"):
        window_tables(sampler_steps("flow_sde", SD3, 0.7), torch.tensor([0, 7]), 3)
