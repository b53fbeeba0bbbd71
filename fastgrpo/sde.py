"""Samplers as coefficient tables, and the windows of steps that are stochastic and trained.

Every denoising transition of Flow-GRPO and its successors is affine in what the network returned:

    x' = c_x[i] x + c_v[i] v + s[i] eps            i = step, eps ~ N(0, I), v = noise - data

so a sampler is a pure function `(sigmas, noise_level) -> table` of three numbers a step. Sigma falls from
1 to 0, dt = sigma_next - sigma < 0, and x0 = x - sigma v, x1 = x + (1 - sigma) v are the predicted data and
noise (Flow-GRPO, arXiv 2505.05470, eq. 9; DanceGRPO, 2505.07818; Flow-CPS, 2509.05952):

    flow_sde    mu = x + [v + g^2 / (2 sigma) x1] dt,  s = g sqrt(-dt),  g = a sqrt(sigma / (1 - sigma))
    dance_sde   the same with g = eta
    cps         mu = (1 - sigma_next) x0 + sigma_next cos(eta pi/2) x1,  s = sigma_next sin(eta pi/2)
    ode         mu = x + v dt,  s = 0

The SDEs have the ODE's marginals in the limit of many steps, by their score term. cps instead keeps the
scheduled amount of noise at any number of steps. Its marginals are the ODE's only as eta -> 0 or for data of
no spread: at a fixed eta each step redraws a fixed share of the noise, which contracts the data's spread.

Letters: T steps, G groups, S trained steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

LogProbWeight = Literal["exact", "cps_reference"]
KLForm = Literal["paper", "reference"]


def flow_sde(sigmas: Tensor, noise_level: float) -> Tensor:
    """Flow-GRPO: g = a sqrt(sigma / (1 - sigma)). (T + 1,) -> (T, 3)."""
    sigma = sigmas[:-1]
    # g diverges at sigma = 1: the released code puts the next sigma there, inside (1 - sigma) only.
    guarded = torch.where(sigma == 1, sigmas[1], sigma)
    return _euler_maruyama(sigmas, noise_level * (sigma / (1 - guarded)).sqrt())


def dance_sde(sigmas: Tensor, noise_level: float) -> Tensor:
    """DanceGRPO: g = eta; score -(x - (1 - sigma) x0) / sigma^2 = -x1 / sigma. (T + 1,) -> (T, 3)."""
    return _euler_maruyama(sigmas, torch.full_like(sigmas[:-1], noise_level))


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
    "cps": cps,
    "ode": ode,
}


def coefficient_table(
    sampler: str,
    sigmas: Tensor,  # (T + 1,) falling from 1 to 0
    noise_level: float,
    window_mask: Tensor | None = None,  # (..., T) bool, True where the step is stochastic and trained
    log_prob_weight: LogProbWeight = "exact",
) -> Tensor:
    """The columns c_x, c_v, s, w of each step, (..., T, 4) float64; outside the window the ODE's.

    w weighs the log-ratio w (2 m1 - m2). `exact` is the Gaussian's 1 / (2 s^2). `cps_reference` is w = 1, of
    the released Flow-CPS code, which drops the variance: an implicit weight 2 s^2 a step. w = 0 where s = 0.
    Without a mask every step is the sampler's own, the last one too: for sampling, not for training.
    """
    sigmas = _checked_sigmas(sigmas)
    steps = _sampler_steps(sampler, sigmas, noise_level)  # (T, 3)
    s = steps[:, 2]
    w = _log_ratio_weights(sampler, s, log_prob_weight)
    table = torch.cat([steps, w[:, None]], dim=-1)
    if window_mask is None:
        return table
    _check_mask(sampler, noise_level, window_mask, s)
    outside = torch.cat([ode(sigmas), torch.zeros_like(w)[:, None]], dim=-1)
    return torch.where(window_mask[..., None], table, outside)


def window_tables(
    sampler: str,
    sigmas: Tensor,  # (T + 1,)
    noise_level: float,
    starts: Tensor,  # (G,) int64, from `window_starts`
    size: int,
    log_prob_weight: LogProbWeight = "exact",
) -> Tensor:
    """One table a group, (G, T, 4) float32: steps [start, start + size) stochastic, the others ODE."""
    num_steps = sigmas.numel() - 1
    for start in starts.tolist():
        _check_window(start, size, num_steps)
    step, first = torch.arange(num_steps), starts.cpu()[:, None]
    mask = (first <= step) & (step < first + size)  # (G, T)
    return coefficient_table(sampler, sigmas, noise_level, mask, log_prob_weight).float()


def kl_weights(sampler: str, sigmas: Tensor, noise_level: float, kl: KLForm = "paper") -> Tensor:
    """What multiplies m3 = mean((mu - mu_ref)^2) in the KL of each step, (T,) float64; 0 where s = 0.

    `paper`: 1 / (2 s^2), the KL of the two Gaussians (Flow-GRPO eq. 5), as a mean over elements.
    `reference`: 1 / (2 g^2), of the released code. It divides by its `std_dev_t`, without dt in the SDEs,
    g^2 = s^2 / (-dt), and s itself in cps, where the two forms agree. The published beta = 0.04 was tuned
    with `reference`, which is 4 to 25 times smaller than `paper` over the trained steps of SD3.5 at T = 10.
    """
    sigmas = _checked_sigmas(sigmas)
    s = _sampler_steps(sampler, sigmas, noise_level)[:, 2]
    if kl == "paper":
        return _half_inverse_square(s)
    if kl == "reference":
        return _half_inverse_square(s if sampler == "cps" else s / (-sigmas.diff()).sqrt())
    raise ValueError(f"kl {kl!r} is unknown; use 'paper' or 'reference'")


def _log_ratio_weights(sampler: str, s: Tensor, log_prob_weight: LogProbWeight) -> Tensor:
    if log_prob_weight == "exact":
        return _half_inverse_square(s)
    if log_prob_weight != "cps_reference":
        raise ValueError(f"log_prob_weight {log_prob_weight!r} is unknown; use 'exact' or 'cps_reference'")
    if sampler != "cps":
        raise ValueError(f"log_prob_weight 'cps_reference' is of sampler 'cps', not {sampler!r}; use 'exact'")
    return (s > 0).to(s)


def _half_inverse_square(s: Tensor) -> Tensor:
    return torch.where(s > 0, 0.5 / s.square(), 0.0)


def _sampler_steps(sampler: str, sigmas: Tensor, noise_level: float) -> Tensor:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; use one of {', '.join(SAMPLERS)}")
    if not 0 <= noise_level < math.inf:
        raise ValueError(f"noise_level {noise_level} must be finite and at least 0 (published: 0.3 to 1.5)")
    return SAMPLERS[sampler](sigmas, noise_level)


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


def _check_mask(sampler: str, noise_level: float, mask: Tensor, s: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape[-1:] != s.shape:
        raise ValueError(f"window_mask is {mask.dtype} {tuple(mask.shape)}; use bool (..., {s.numel()})")
    if mask[..., -1].any():
        raise ValueError(
            f"the window holds the last step, {s.numel() - 1}: as sigma -> 0 its Gaussian degenerates, "
            f"so it may not be trained; end the window at step {s.numel() - 2}"
        )
    if (mask & (s == 0)).any():
        raise ValueError(
            f"sampler {sampler!r} with noise_level {noise_level} has no noise inside the window, "
            "so no log-prob to train; use a stochastic sampler and a noise_level above 0"
        )


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which steps of a rollout are stochastic and trained: S consecutive ones, the same for a whole group.

    One window a group and not one a sample: noise that differs within a group is mistaken for advantage.
    """

    kind: Literal["all_but_last", "fixed", "random", "progressive"] = "all_but_last"
    """Every step but the last; always at `start`; drawn anew for each group; sliding (MixGRPO)."""
    size: int | None = None
    """S, the number of trained steps; left out for `all_but_last`."""
    start: int = 0
    """First trained step of `fixed`."""
    range: tuple[int, int] | None = None
    """[lo, hi): where `random` and `progressive` windows lie, whole; None is every step but the last."""
    stride: int = 1
    """How many steps `progressive` slides at once."""
    every: int = 25
    """After how many iterations `progressive` slides (MixGRPO's tau)."""


def all_but_last(window: Window, num_steps: int, iteration: int, groups: Tensor, seed: int) -> Tensor:
    """Flow-GRPO: all steps are trained but the last, whose Gaussian degenerates."""
    return torch.zeros_like(groups)


def fixed(window: Window, num_steps: int, iteration: int, groups: Tensor, seed: int) -> Tensor:
    """The same steps in every iteration (MixGRPO's frozen window)."""
    return torch.full_like(groups, window.start)


def random(window: Window, num_steps: int, iteration: int, groups: Tensor, seed: int) -> Tensor:
    """Flow-GRPO-Fast: uniform in [lo, hi - S], so that the window lies in [lo, hi), as in the released code.

    Addressed by (seed, iteration, group id): each rank draws the same for a group, and so does a resumed run.
    """
    lo, hi = _bounds(window, num_steps)
    choices = hi - lo - window_size(window, num_steps) + 1
    # numpy promises SeedSequence's words across its versions, but not what Generator.integers makes of them.
    words = [np.random.SeedSequence([seed, iteration, g]).generate_state(1)[0] for g in groups.tolist()]
    return torch.tensor([lo + int(word) % choices for word in words], dtype=torch.int64)


def progressive(window: Window, num_steps: int, iteration: int, groups: Tensor, seed: int) -> Tensor:
    """MixGRPO (arXiv 2507.21802): slides by `stride` every `every` iterations and stays at the end."""
    lo, hi = _bounds(window, num_steps)
    start = lo + window.stride * (iteration // window.every)
    return torch.full_like(groups, min(start, hi - window_size(window, num_steps)))


WINDOWS: dict[str, Callable[[Window, int, int, Tensor, int], Tensor]] = {
    "all_but_last": all_but_last,
    "fixed": fixed,
    "random": random,
    "progressive": progressive,
}


def window_size(window: Window, num_steps: int) -> int:
    """S, the number of trained steps: static over a run."""
    if window.kind == "all_but_last":
        if window.size not in (None, num_steps - 1):
            raise ValueError(f"window.size {window.size} contradicts 'all_but_last'; leave it out")
        return num_steps - 1
    if window.size is None:
        raise ValueError(f"window.kind {window.kind!r} needs window.size (published: 2 to 4)")
    return window.size


def window_starts(
    window: Window,
    num_steps: int,
    iteration: int,
    groups: Tensor,  # (G,) int64, ids that are the same on every rank
    seed: int,
) -> Tensor:
    """The first trained step of each group, (G,) int64 on the CPU; refuses what could reach the last step."""
    if window.kind not in WINDOWS:
        raise ValueError(f"window.kind {window.kind!r} is unknown; use one of {', '.join(WINDOWS)}")
    if window.stride < 1 or window.every < 1:
        raise ValueError(f"window.stride {window.stride} and window.every {window.every} must be at least 1")
    size = window_size(window, num_steps)
    if window.kind in ("random", "progressive"):
        lo, hi = _bounds(window, num_steps)
        if lo + size > hi:
            raise ValueError(f"window.size {size} does not fit into window.range [{lo}, {hi}); widen it")
        _check_window(hi - size, size, num_steps)
    else:
        lo = window.start if window.kind == "fixed" else 0
    _check_window(lo, size, num_steps)
    return WINDOWS[window.kind](window, num_steps, iteration, groups.cpu(), seed)


def _bounds(window: Window, num_steps: int) -> tuple[int, int]:
    return window.range or (0, num_steps - 1)


def _check_window(start: int, size: int, num_steps: int) -> None:
    if size < 1 or start < 0 or start + size > num_steps - 1:
        raise ValueError(
            f"a window of {size} steps from step {start}: it must hold at least one and lie in "
            f"[0, {num_steps - 1}), as the last of {num_steps} steps is never trained"
        )
