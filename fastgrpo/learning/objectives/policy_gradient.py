"""Objectives on stochastic transitions x -> x', whose log-prob is a Gaussian's: clip, guard, dppo.

With the residual e = x' - mu_old, d = mu - mu_old and k = mu - mu_ref, the means over the D elements of a sample are

    m1 = mean(e d)    m2 = mean(d d)    m3 = mean(k k)

    log-ratio = w (2 m1 - m2)    the difference of the two log-probs, formed before rounding; 0 if v = v_old
    KL        = kl_weight m3     m3 / (2 s^2), or the released code's form: see `fastgrpo.sampling.tables.kl_weights`
    drift     = m2 / (2 s^2)     the divergence D_KL from the policy that sampled

w is 1 / (2 s^2), and all log-probs are means over D, not sums, as in the released code.
"""

import torch
from torch import Tensor

from fastgrpo.learning.objectives.loss import Loss, Moments, StepRows, clipped_policy, live, log_ratio, weighted_loss


def clip(
    moments: Moments,
    rows: StepRows,
    advantages: Tensor,  # (B,)
    weight: Tensor,  # (B,) 0 takes a sample out, exactly
    *,
    clip_range: float,  # at this latent's size: see `effective_clip_range`
    beta: float,
) -> Loss:
    """PPO's clipped objective (Flow-GRPO, arXiv 2505.05470, eq. 4):

        policy = max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)),    r = exp(log-ratio)

    Its step weight, where there is one, is TempFlow-GRPO's (arXiv 2508.04324).
    """
    return _clip(log_ratio(moments, rows), moments, rows, advantages, weight, clip_range, beta)


def guard(
    moments: Moments,
    rows: StepRows,
    advantages: Tensor,
    weight: Tensor,
    *,
    clip_range: float,  # published: 2e-6, and 4e-6 for PickScore
    beta: float,
) -> Loss:
    """GRPO-Guard (arXiv 2510.22319): RatioNorm, r = exp((log-ratio + m2 / (2 s^2)) s), clipped as in `clip`.

    As w = 1 / (2 s^2), that is r = exp(2 w m1 s) = exp(m1 / s). log-ratio has the mean -m2 / (2 s^2), always below 0,
    by which the upper clip is seldom reached; added back, r centres on 1. Times s, log r has std rms(d) / sqrt(D) at
    every step, so that one clip_range means the same move of the mean at all of them.

    s = sigma_t sqrt|dt| is the standard deviation of the whole transition (train_sd3_GRPO_Guard.py:
    `sqrt_dt.mean() * sigma_t`). That code takes the mean of d^2 over the batch as well, where the paper, and its
    authors when asked (flow_grpo issue 244), take each sample's own, as here. Its step weight 1 / |dt| is
    `rows.loss_weight`.
    """
    normalised = 2 * rows.w.double() * moments.m1.double() * rows.s.double()
    return _clip(normalised, moments, rows, advantages, weight, clip_range, beta)


def dppo(
    moments: Moments,
    rows: StepRows,
    advantages: Tensor,
    weight: Tensor,
    *,
    clip_range: float,
    beta: float,
    delta: float = 1e-7,
) -> Loss:
    """Flow-DPPO (arXiv 2606.11025, eqs. 14 and 18): masked by the divergence, not clipped; clip_range is not read.

        policy = -A r M,    M = 0 if D_KL > delta and (A > 0, r > 1  or  A < 0, r < 1), else 1

    A sample is masked only where its gradient leads further away: what leads back is never stopped, without which
    training collapses. r is one noisy draw of the divergence; D_KL is the divergence itself.

    delta: published 1e-7 with an SDE and 1e-6 with CPS; the released recipe and its later ports have 1e-5.
    D_KL is eq. 14 over D, the mean (rms(d) / s)^2 / 2. It measures the move of one element and does not change with
    the size of the latent, and so neither must delta: that is the bound to which `effective_clip_range` brings the
    clip, whose ratio has a spread of 1 / sqrt(D). delta = 1e-7 is a move of rms(d) = 4.5e-4 s; a clip of 1e-5 at
    D = 65,536 is reached, within one standard deviation, at 2.6e-3 s.
    """
    log_r, divergence, a = log_ratio(moments, rows), _drift(moments, rows), advantages.double()
    moved = log_r.detach().exp()
    masked = (divergence > delta) & torch.where(a > 0, moved > 1, (a < 0) & (moved < 1))
    kept = (~masked).double()
    policy = -a * kept * live(log_r, weight * kept).exp()
    return weighted_loss(policy, moments, rows, weight, beta, ratio=moved, clipped=masked, drift=divergence)


def _clip(
    log_r: Tensor,  # (B,) linear in the moments
    moments: Moments,
    rows: StepRows,
    advantages: Tensor,
    weight: Tensor,
    clip_range: float,
    beta: float,
) -> Loss:
    policy = clipped_policy(live(log_r, weight).exp(), advantages, clip_range)
    moved = log_r.detach().exp()
    clipped = (moved - 1).abs() > clip_range
    return weighted_loss(policy, moments, rows, weight, beta, ratio=moved, clipped=clipped, drift=_drift(moments, rows))


def _drift(moments: Moments, rows: StepRows) -> Tensor:
    return torch.where(rows.s > 0, moments.m2.detach().double() / (2 * rows.s.double().square()), 0.0)
