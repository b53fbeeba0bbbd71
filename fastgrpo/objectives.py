"""Policy objectives: pure functions of a few moments of one transition.

A stored transition x -> x' has the residual e = x' - mu_old. With d = mu - mu_old and k = mu - mu_ref, the
means over the D elements of a sample, which the fused kernel returns, are its moments:

    m1 = mean(e d)    m2 = mean(d d)    m3 = mean(k k)

    log-ratio = w (2 m1 - m2)    the difference of the two log-probs, formed before rounding; 0 if v = v_old
    KL        = kl_weight m3     m3 / (2 s^2), or the released code's form: see `fastgrpo.sde.kl_weights`
    drift     = m2 / (2 s^2)     the divergence from the behaviour policy

Letters: B samples, D elements a sample.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

REFERENCE_ELEMENTS = 65_536  # 16 x 64 x 64: SD3.5 at 512 px, at which the published clip ranges are quoted


class Moments(Protocol):
    """What `fastgrpo_kernels.transition` returns."""

    m1: Tensor  # (B,)
    m2: Tensor  # (B,)
    m3: Tensor  # (B,)


class StepRows(NamedTuple):
    """Each sample's rows of the tables of `fastgrpo.sde`."""

    s: Tensor  # (B,) standard deviation of the transition
    w: Tensor  # (B,) weight of the log-ratio
    kl_weight: Tensor  # (B,) weight of m3 in the KL
    loss_weight: Tensor  # (B,) weight of the step's policy loss: see `fastgrpo.sde.step_weights`


class Loss(NamedTuple):
    """The loss and its metrics: scalars on the device, of which only `loss` has a gradient."""

    loss: Tensor  # float32, policy + beta kl
    policy: Tensor
    kl: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    clip_fraction: Tensor  # share of samples with |ratio - 1| > clip_range
    drift: Tensor


def effective_clip_range(clip_range: float, num_elements: int) -> float:
    """clip_range sqrt(65536 / D): the clip range quoted at D = 65,536, for a latent of D elements.

    With x' = mu_old + s eps the exact log-ratio is mean(eps d) / s - mean(d^2) / (2 s^2). Its first term has
    std delta / sqrt(D), where delta = rms(d) / s is how far the policy moved: log-probs are means over D, so
    the same move spreads the ratio less in a larger latent, and the clip must shrink with it. The second
    term, -delta^2 / 2, does not shrink and takes a growing share of the clip; GRPO-Guard adds it back.
    """
    if not clip_range > 0 or num_elements < 1:
        raise ValueError(f"clip_range {clip_range} must be above 0, num_elements {num_elements} at least 1")
    return clip_range * math.sqrt(REFERENCE_ELEMENTS / num_elements)


def grpo_clip(
    moments: Moments,
    step: StepRows,
    advantages: Tensor,  # (B,)
    weight: Tensor,  # (B,) 0 takes a sample out, exactly
    *,
    clip_range: float,  # at this latent's size: see `effective_clip_range`
    beta: float,
) -> Loss:
    """PPO's clipped objective with a KL to the reference model (Flow-GRPO, arXiv 2505.05470, eq. 4):

        loss = 1/B sum_b weight_b [ loss_weight_b max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)) + beta KL ]

    Divided by B and not by sum(weight): a sample then counts the same in whichever micro-batch or rank it
    falls, nothing is divided by 0 when all are out, and a dead group adds the zero gradient that A = 0 stands
    for. For the mean over live samples, as released, scale `weight` by N / N_live of the whole batch.
    """
    # float64: (B,) numbers cost nothing, and float32's rounding next to 1, 6e-8, is 3% of a clip of 2e-6.
    log_ratio = step.w.double() * (2 * moments.m1.double() - moments.m2.double())
    live = weight > 0
    # Masked before exp and not after: 0 * inf of a sample that is out would be nan, in the gradient too.
    ratio = torch.where(live, log_ratio, 0.0).exp()
    a = advantages.double()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy = (weight * step.loss_weight * torch.maximum(-a * ratio, -a * clipped)).mean()
    kl = (weight * torch.where(live, step.kl_weight.double() * moments.m3.double(), 0.0)).mean()
    # The trust region is every sample's: the ratio of a dead group moves with the policy like any other.
    moved = log_ratio.detach().exp()
    drift = torch.where(step.s > 0, moments.m2.detach().double() / (2 * step.s.double().square()), 0.0)
    return Loss(
        loss=(policy + beta * kl).float(),
        policy=policy.detach(),
        kl=kl.detach(),
        ratio_mean=moved.mean(),
        ratio_min=moved.amin(),
        ratio_max=moved.amax(),
        clip_fraction=((moved - 1).abs() > clip_range).double().mean(),
        drift=drift.mean(),
    )


OBJECTIVES: dict[str, Callable[..., Loss]] = {"grpo_clip": grpo_clip}
