"""Samplers as coefficient tables, and what weighs a step in the loss.

Every denoising transition of Flow-GRPO and its successors is affine in what the network returned:

    x' = c_x[i] x + c_v[i] v + s[i] eps            i = step, eps ~ N(0, I), v = noise - data

so a sampler is a pure function `(sigmas, noise_level) -> (c_x, c_v, s)` of three numbers a step. `sampler_steps`
computes them once; the table that kernels read, the weight of a step's KL and the weight of its loss are views of
them. Sigma falls from at most 1 to 0, dt = sigma_next - sigma < 0, and x0 = x - sigma v, x1 = x + (1 - sigma) v are the
predicted data and noise (Flow-GRPO, arXiv 2505.05470, eq. 9; DanceGRPO, 2505.07818; Flow-CPS, 2509.05952):

    flow_sde    mu = x + [v + g^2 / (2 sigma) x1] dt,  s = g sqrt(-dt),  g = a sqrt(sigma / (1 - sigma))
    dance_sde   the same with g = eta
    wan_sde     the same with g = a sigmas[1] sigma
    cps         mu = (1 - sigma_next) x0 + sigma_next cos(eta pi/2) x1,  s = sigma_next sin(eta pi/2)
    ode         mu = x + v dt,  s = 0

The SDEs have the ODE's marginals in the limit of many steps, by their score term. cps instead keeps the
scheduled amount of noise at any number of steps. Its marginals are the ODE's only as eta -> 0 or for data of
no spread: at a fixed eta each step redraws a fixed share of the noise, which contracts the data's spread.

Letters: T steps, G groups, S trained steps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.config.keys import KLForm, LogProbWeight, StepWeight
from fastgrpo.sampling.windows import trained_steps


class SamplerSteps(NamedTuple):
    """A sampler on a schedule: what each step does, in float64 on the CPU. See `sampler_steps`."""

    sampler: str
    sigmas: Tensor  # (T + 1,)
    noise_level: float
    coefficients: Tensor  # (T, 3), columns c_x, c_v, s

    @property
    def s(self) -> Tensor:
        """The standard deviation of each transition, (T,)."""
        return self.coefficients[:, 2]


def flow_sde(sigmas: Tensor, noise_level: float) -> Tensor:
    """Flow-GRPO: g = a sqrt(sigma / (1 - sigma)). (T + 1,) -> (T, 3)."""
    sigma = sigmas[:-1]
    # g diverges at sigma = 1: the released code puts the next sigma there, inside (1 - sigma) only.
    guarded = torch.where(sigma == 1, sigmas[1], sigma)
    return _euler_maruyama(sigmas, noise_level * (sigma / (1 - guarded)).sqrt())


def dance_sde(sigmas: Tensor, noise_level: float) -> Tensor:
    """DanceGRPO: g = eta; score -(x - (1 - sigma) x0) / sigma^2 = -x1 / sigma. (T + 1,) -> (T, 3)."""
    return _euler_maruyama(sigmas, torch.full_like(sigmas[:-1], noise_level))


def wan_sde(sigmas: Tensor, noise_level: float) -> Tensor:
    """Flow-GRPO's script for Wan 2.1: g = a sigmas[1] sigma, where the released a is 1. (T + 1,) -> (T, 3).

    Its `std_dev_t` is sigma_min + (sigma_max - sigma_min) sigma, with the last and the second level of the schedule as
    sigma_min = 0 and sigma_max (yifan123/flow_grpo, wan_pipeline_with_logprob.py). It is bounded at sigma = 1, where
    flow_sde's g diverges: at 20 steps of shift 3 the first s is 0.13 and not 0.7.
    """
    return _euler_maruyama(sigmas, noise_level * sigmas[1] * sigmas[:-1])


def cps(sigmas: Tensor, noise_level: float) -> Tensor:
    """Flow-CPS: splits the scheduled noise in kept and new, r^2 + s^2 = sigma_next^2. (T + 1,) -> (T, 3)."""
    if noise_level > 1:
        raise ValueError(
            f"noise_level {noise_level} with sampler 'cps': sin(noise_level pi/2) falls again above 1, "
            "so it would give the noise of a lower level; use 0 to 1 (published: 0.8)"
        )
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    s = sigma_next * math.sin(noise_level * math.pi / 2)
    r = sigma_next * math.cos(noise_level * math.pi / 2)
    c_x = (1 - sigma_next) + r
    c_v = r * (1 - sigma) - (1 - sigma_next) * sigma
    return torch.stack([c_x, c_v, s], dim=-1)


def ode(sigmas: Tensor, noise_level: float = 0.0) -> Tensor:
    """The Euler step of the probability-flow ODE; `noise_level` has no effect. (T + 1,) -> (T, 3)."""
    dt = sigmas.diff()
    return torch.stack([torch.ones_like(dt), dt, torch.zeros_like(dt)], dim=-1)


def _euler_maruyama(sigmas: Tensor, g: Tensor) -> Tensor:
    """The step of dx = [v + g^2 / (2 sigma) (x + (1 - sigma) v)] dt + g dw; g is (T,). Returns (T, 3)."""
    sigma, dt = sigmas[:-1], sigmas.diff()
    correction = g.square() / (2 * sigma)
    c_x = 1 + correction * dt
    c_v = (1 + correction * (1 - sigma)) * dt
    return torch.stack([c_x, c_v, g * (-dt).sqrt()], dim=-1)


SAMPLERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "wan_sde": wan_sde,
    "cps": cps,
    "ode": ode,
}


def sampler_steps(
    sampler: str,
    sigmas: Tensor,  # (T + 1,) falling from at most 1 to 0
    noise_level: float,
) -> SamplerSteps:
    """The sampler's steps on these sigmas; refuses what is no schedule, no sampler or no noise level of it."""
    sigmas = _checked_sigmas(sigmas)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; use one of {', '.join(SAMPLERS)}")
    if not 0 <= noise_level < math.inf:
        raise ValueError(f"noise_level {noise_level} must be finite and at least 0 (published: 0.3 to 1.5)")
    return SamplerSteps(sampler, sigmas, noise_level, SAMPLERS[sampler](sigmas, noise_level))


def coefficient_table(
    steps: SamplerSteps,
    window_mask: Tensor | None = None,  # (..., T) bool, True where the step is stochastic and trained
    log_prob_weight: LogProbWeight = "exact",
) -> Tensor:
    """The columns c_x, c_v, s, w of each step, (..., T, 4) float64; outside the window the ODE's.

    w weighs the log-ratio w (2 m1 - m2). `exact` is the Gaussian's 1 / (2 s^2). `cps_reference` is w = 1, of
    the released Flow-CPS code, which drops the variance: an implicit weight 2 s^2 a step. w = 0 where s = 0.
    Without a mask every step is the sampler's own, the last one too: for sampling, not for training.
    """
    w = _log_ratio_weights(steps, log_prob_weight)
    table = torch.cat([steps.coefficients, w[:, None]], dim=-1)
    if window_mask is None:
        return table
    _check_mask(steps, window_mask)
    outside = torch.cat([ode(steps.sigmas), torch.zeros_like(w)[:, None]], dim=-1)
    return torch.where(window_mask[..., None], table, outside)


def window_tables(
    steps: SamplerSteps,
    starts: Tensor,  # (G,) int64, from `window_starts`
    size: int,
    log_prob_weight: LogProbWeight = "exact",
) -> Tensor:
    """One table a group, (G, T, 4) float32: steps [start, start + size) stochastic, the others ODE."""
    mask = trained_steps(starts, size, len(steps.s))  # (G, T)
    return coefficient_table(steps, mask, log_prob_weight).float()


def kl_weights(steps: SamplerSteps, kl: KLForm = "paper") -> Tensor:
    """The factor of m3 = mean((mu - mu_ref)^2) in the KL of each step, (T,) float64; 0 where s = 0.

    `paper`: 1 / (2 s^2), the KL of the two Gaussians (Flow-GRPO eq. 5), as a mean over elements.
    `reference`: 1 / (2 g^2), of the released code. It divides by its `std_dev_t`, without dt in the SDEs,
    g^2 = s^2 / (-dt), and s itself in cps, where the two forms agree. The published beta = 0.04 was tuned
    with `reference`, which is 4 to 25 times smaller than `paper` over the trained steps of SD3.5 at T = 10.
    """
    if kl == "paper":
        return _half_inverse_square(steps.s)
    if kl == "reference":
        return _half_inverse_square(steps.s if steps.sampler == "cps" else steps.s / (-steps.sigmas.diff()).sqrt())
    raise ValueError(f"kl {kl!r} is unknown; use 'paper' or 'reference'")


def step_weights(
    steps: SamplerSteps,
    trained: Tensor,  # (..., T) bool, see `fastgrpo.sampling.windows.trained_steps`
    step_weight: StepWeight = "uniform",
) -> Tensor:
    """The factor of each step's policy loss, not of its KL, as in the released codes: (..., T) float64; 0 outside.

    `tempflow`: s over its mean in the window (TempFlow-GRPO, arXiv 2508.04324): what a step explores, it also
    learns. Over all steps but the last of SD3.5 at T = 10 that is the released code's 2.25 s.
    `guard`: 1 / |dt| (GRPO-Guard, 2510.22319), which goes with its normalised ratio; not rescaled, as released.
    """
    s = steps.s
    if step_weight == "uniform":
        weights = torch.ones_like(s)
    elif step_weight == "tempflow":
        weights = s / ((s * trained).sum(-1, keepdim=True) / trained.sum(-1, keepdim=True))
    elif step_weight == "guard":
        weights = -1 / steps.sigmas.diff()
    else:
        raise ValueError(f"step_weight {step_weight!r} is unknown; use 'uniform', 'tempflow' or 'guard'")
    return torch.where(trained, weights, 0.0)


def _log_ratio_weights(steps: SamplerSteps, log_prob_weight: LogProbWeight) -> Tensor:
    if log_prob_weight == "exact":
        return _half_inverse_square(steps.s)
    if log_prob_weight != "cps_reference":
        raise ValueError(f"log_prob_weight {log_prob_weight!r} is unknown; use 'exact' or 'cps_reference'")
    if steps.sampler != "cps":
        raise ValueError(f"log_prob_weight 'cps_reference' belongs to sampler 'cps', not {steps.sampler!r}; use 'exact'")
    return (steps.s > 0).to(steps.s)


def _half_inverse_square(s: Tensor) -> Tensor:
    return torch.where(s > 0, 0.5 / s.square(), 0.0)


def _checked_sigmas(sigmas: Tensor) -> Tensor:
    sigmas = sigmas.detach().to("cpu", torch.float64)
    if sigmas.ndim != 1 or sigmas.numel() < 2:
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}; it must be (T + 1,) with T >= 1 steps")
    if not (sigmas.diff() < 0).all() or sigmas[0] > 1 or sigmas[-1] != 0:
        raise ValueError(f"sigmas {sigmas.tolist()} must fall strictly from at most 1 to exactly 0")
    if 1 - 1e-6 < sigmas[0] < 1:
        # flow_sde's guard asks for exactly 1; a rounded 1 would slip past it, with a g of several hundred.
        raise ValueError(f"sigmas[0] = {sigmas[0].item()} is a rounded 1; pass exactly 1.0")
    return sigmas


def _check_mask(steps: SamplerSteps, mask: Tensor) -> None:
    s = steps.s
    if mask.dtype != torch.bool or mask.shape[-1:] != s.shape:
        raise ValueError(f"window_mask is {mask.dtype} {tuple(mask.shape)}; use bool (..., {s.numel()})")
    if mask[..., -1].any():
        raise ValueError(
            f"the window holds the last step, {s.numel() - 1}: as sigma -> 0 its Gaussian degenerates, "
            f"so it may not be trained; end the window at step {s.numel() - 2}"
        )
    if (mask & (s == 0)).any():
        raise ValueError(
            f"sampler {steps.sampler!r} with noise_level {steps.noise_level} has no noise inside the window, "
            "so no log-prob to train; use a stochastic sampler and a noise_level above 0"
        )
