"""Objectives on the forward process: nft, awm, dpo, sft. They need the final x0 of a rollout and no log-prob.

    x_t = (1 - t) x0 + t eps,    v* = eps - x0  the velocity to match,    t = `rows.s`

They are functions of the same three moments as a transition's: of the one with c_x = 0, c_v = 1 and x' = v*,

    e = v* - v_old    d = v - v_old    k = v - v_ref

    m0 = mean(e e)    m1 = mean(e d)    m2 = mean(d d)    m3 = mean(k k)

    mean (v - v*)^2 = m0 - 2 m1 + m2         of v_old it is m0
    log-ratio       = w (2 m1 - m2)          how much better v matches than v_old does, in place of a log-prob's
    KL              = kl_weight m3           the released codes': kl_weight 1
    drift           = m2

`ratio` is exp(log-ratio) also where an objective only reports it.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastgrpo.learning.objectives.loss import Loss, StepRows, TargetMoments, clipped_policy, live, log_ratio, weighted_loss


def nft(
    moments: TargetMoments,
    rows: StepRows,
    advantages: Tensor,  # (B,)
    weight: Tensor,  # (B,) 0 takes a sample out, exactly
    *,
    clip_range: float,
    beta: float,  # published: 1e-4
    mix: float = 1.0,
    adv_clip_max: float = 5.0,
) -> Loss:
    """DiffusionNFT (arXiv 2509.16117, theorem 3.2): towards v* as far as a sample is good, away as far as it is not.

        policy = adv_clip_max / mix [ r L(v_old + mix d) + (1 - r) L(v_old - mix d) ]
        r      = 1/2 + 1/2 clip(A / adv_clip_max, -1, 1)
        L(v)   = mean (x0hat - x0)^2 / sg(mean |x0hat - x0|),    x0hat = x_t - t v

    As x0hat - x0 = -t (v - v*) and v_old +- mix d - v* = -(e -+ mix d), all is moments. clip_range is not read;
    `clip_fraction` is the share whose A reaches +-adv_clip_max, where r is 0 or 1. v_old is of the policy that sampled:
    a slow average of v, without which the paper finds training unstable.

    mix: 1 for GenEval, PickScore and HPSv2, 0.1 for OCR and several rewards together.
    adv_clip_max: that of the advantages. The factors adv_clip_max / mix and the floor are of the released code.
    """
    m0, m1, m2, abs_plus, abs_minus = (
        live(m, weight) for m in (moments.m0, moments.m1, moments.m2, moments.abs_plus, moments.abs_minus)
    )
    t, a = rows.s.double(), advantages.double() / adv_clip_max
    r = 0.5 + 0.5 * a.clamp(-1, 1)
    even = m0 + mix**2 * m2
    plus = t.square() * (even - 2 * mix * m1) / (t * abs_plus).clamp(min=1e-5)
    minus = t.square() * (even + 2 * mix * m1) / (t * abs_minus).clamp(min=1e-5)
    policy = adv_clip_max / mix * (r * plus + (1 - r) * minus)
    ratio = log_ratio(moments, rows).exp()
    return weighted_loss(policy, moments, rows, weight, beta, ratio=ratio, clipped=a.abs() >= 1, drift=moments.m2.double())


def awm(
    moments: TargetMoments,
    rows: StepRows,
    advantages: Tensor,
    weight: Tensor,
    *,
    clip_range: float,  # published: 1, which clips only ratios above 2
    beta: float,  # published: 1e-3 GenEval, 3e-3 OCR, 1e-4 PickScore
    power: float = 0.25,
    time_power: float = 1.0,
    ema_beta: float = 1.0,
    advantage_scale: float = 0.2,
) -> Loss:
    """Advantage Weighted Matching (arXiv 2509.25050): PPO with the matching error for a negative log-prob,

        log p  = -w t^time_power mean((v - v*)^2)^power / power
        policy = max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)) + ema_beta mean (v - v_old)^2

    On-policy its gradient is that of A w(t) mean (v - v*)^2. The paper and the released code are not the same:
    - The paper matches plainly: power 1, time_power 0, by which log-ratio = w (2 m1 - m2). All released configurations
      have the `ghuber` of the defaults.
    - The code adds ema_beta mean (v - v_ema)^2, which Algorithm 1 lacks; without it or a tight clip_range training
      collapses. v_ema is a fast average of v, of decay at most 0.3 and once an iteration. Here it is v_old, as in the
      code's off_policy mode, where the average samples; its configurations sample with v, at one more forward pass.
    - The paper has beta 0.4. The code divides advantages, clipped to +-5, by 5: advantage_scale.
    """

    def log_r(m0: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
        old = m0.double()
        new = (old + (m2.double() - 2 * m1.double())).clamp(min=0)  # not below 0 by rounding: of no real power
        gain = (old + 1e-10).pow(power) - (new + 1e-10).pow(power)
        return rows.w.double() * rows.s.double().pow(time_power) * gain / power

    raw = (moments.m0, moments.m1, moments.m2)
    ratio = log_r(*(live(m, weight) for m in raw)).exp()
    scaled = advantage_scale * advantages.double()
    policy = clipped_policy(ratio, scaled, clip_range) + ema_beta * live(moments.m2, weight)
    moved = log_r(*(m.detach() for m in raw)).exp()
    clipped = (moved - 1).abs() > clip_range
    return weighted_loss(policy, moments, rows, weight, beta, ratio=moved, clipped=clipped, drift=moments.m2.double())


def dpo(
    moments: TargetMoments,
    rows: StepRows,
    advantages: Tensor,
    weight: Tensor,
    *,
    clip_range: float,
    beta: float,
    strength: float = 100.0,
) -> Loss:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14) on flow matching (Flow-DPO, 2501.13918); v_old is of the reference.

        policy = -log sigmoid( strength / 2 (log-ratio_chosen - log-ratio_rejected) )        for each of a pair

    Rows 2i are chosen and 2i + 1 rejected, with one t and one noise; advantages and clip_range are not read. The mean
    over the rows is that over pairs. A pair has the lower of its two weights, so either takes out both.

    strength: 100 in Flow-GRPO's comparison, whose errors are means over D like these; 2,000 in Flow-Factory.
    """
    if len(weight) % 2:
        raise ValueError(f"dpo was given {len(weight)} samples; a batch must hold whole pairs, so an even number")
    weight = weight.reshape(-1, 2).amin(dim=1).repeat_interleave(2)
    log_r = log_ratio(moments, rows)
    chosen, rejected = (strength / 2 * live(log_r, weight)).view(-1, 2).unbind(dim=1)
    policy = -logsigmoid(chosen - rejected).repeat_interleave(2)
    none = torch.zeros_like(weight, dtype=torch.bool)
    return weighted_loss(policy, moments, rows, weight, beta, ratio=log_r.exp(), clipped=none, drift=moments.m2.double())


def sft(
    moments: TargetMoments,
    rows: StepRows,
    advantages: Tensor,
    weight: Tensor,
    *,
    clip_range: float,
    beta: float,
    advantage: Literal["exp", "positive", "none"] = "exp",
    temperature: float = 1.0,
) -> Loss:
    """Flow matching on samples weighed by their advantage: policy = f(A) mean (v - v*)^2.

    exp: f = exp(A / temperature), reward-weighted regression (Flow-RWR, arXiv 2501.13918; ORW-CFM, 2502.06061, whose
        Wasserstein term is the KL here).
    positive: f = max(A, 0), of the good samples alone.
    none: f = 1, for a folder of images; and Flow-GRPO's comparison, with `weight` 0 for all but the best of each group.

    It asks for no policy that sampled: with v_old = 0, m0 - 2 m1 + m2 is the same and a forward pass is saved. There is
    then no ratio, no clip and no drift, which are reported as 1, 0 and 0. clip_range is not read.
    """
    a = advantages.double()
    factor = {"exp": (a / temperature).exp(), "positive": a.clamp(min=0), "none": torch.ones_like(a)}[advantage]
    policy = factor * (live(moments.m0, weight) - 2 * live(moments.m1, weight) + live(moments.m2, weight))
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return weighted_loss(policy, moments, rows, weight, beta, ratio=one, clipped=zero, drift=zero)
