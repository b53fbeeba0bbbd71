"""The records that every objective takes and returns, and the sum that they share.

    loss = 1/B sum_b weight_b (loss_weight_b policy_b + beta kl_weight_b m3_b)

Divided by B and not by sum(weight): a sample then counts the same in whichever micro-batch or rank it falls,
nothing is divided by 0 when all are out, and a dead group adds the zero gradient that A = 0 stands for. For the
mean over live samples, as released, scale `weight` by N / N_live of the whole batch.

Only the policy term is weighed by step, as in the released GRPO-Guard; the KL has its own weight for each step.
(B,) numbers are float64: they cost nothing, and float32's rounding next to 1, 6e-8, is 3% of a clip of 2e-6.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

REFERENCE_ELEMENTS = 65_536  # 16 x 64 x 64: SD3.5 at 512 px, at which the published clip ranges are quoted


class Moments(Protocol):
    """The moments that `fastgrpo_kernels.transition` returns."""

    @property
    def m1(self) -> Tensor: ...  # (B,) mean(e d)
    @property
    def m2(self) -> Tensor: ...  # (B,) mean(d d)
    @property
    def m3(self) -> Tensor: ...  # (B,) mean(k k)


class TargetMoments(NamedTuple):
    """The moments that objectives on the forward process are given: e = v* - v_old, d = v - v_old, k = v - v_ref."""

    m1: Tensor  # (B,) mean(e d)
    m2: Tensor  # (B,) mean(d d)
    m3: Tensor  # (B,) mean(k k)
    m0: Tensor  # (B,) mean(e e), without gradient like the two below
    abs_plus: Tensor  # (B,) mean|e - mix d|
    abs_minus: Tensor  # (B,) mean|e + mix d|


class StepRows(NamedTuple):
    """Each sample's rows of the tables of its steps."""

    s: Tensor  # (B,) standard deviation of the transition; on the forward process sigma, the noise level of x_t
    w: Tensor  # (B,) weight of the log-ratio
    kl_weight: Tensor  # (B,) weight of m3 in the KL
    loss_weight: Tensor  # (B,) weight of the policy term


class Loss(NamedTuple):
    """The loss and its metrics: scalars on the device, of which only `loss` has a gradient."""

    loss: Tensor  # float32, policy + beta kl
    policy: Tensor
    kl: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    clip_fraction: Tensor  # share of samples at which the objective's bound is reached: clipped, or masked
    drift: Tensor  # how far the policy is from the one that sampled

    @staticmethod
    def over(losses: "Sequence[Loss]", total: float) -> dict[str, Tensor]:
        """The metrics of one optimiser step from those of its forward passes, by name; bad_losses is a count of passes.

        total: how many passes the loss is a mean over; more than there are where passes of weight 0 were left out.
        """
        metrics = {"bad_losses": torch.stack([~loss.loss.detach().isfinite() for loss in losses]).sum()}
        for name in Loss._fields:
            values = torch.stack([getattr(loss, name).detach() for loss in losses])
            if name == "ratio_min":
                metrics[name] = values.amin()
            elif name == "ratio_max":
                metrics[name] = values.amax()
            else:  # weighted ones are means over all samples, the rest over those that were run
                metrics[name] = values.sum() / (total if name in ("loss", "policy", "kl") else len(losses))
        return metrics


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


def log_ratio(moments: Moments, rows: StepRows) -> Tensor:
    """w (2 m1 - m2), (B,)."""
    return rows.w.double() * (2 * moments.m1.double() - moments.m2.double())


def live(values: Tensor, weight: Tensor) -> Tensor:
    """`values` (B,) in float64, and 0 for the samples that `weight` takes out.

    Applied before anything that is not linear: 0 * inf of a sample that is out would be nan, in the gradient too.
    """
    return torch.where(weight > 0, values.double(), 0.0)


def clipped_policy(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)), (B,)."""
    a = advantages.double()
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip_range, 1 + clip_range))


def weighted_loss(
    policy: Tensor,  # (B,) float64, finite also where weight is 0
    moments: Moments,
    rows: StepRows,
    weight: Tensor,  # (B,)
    beta: float,
    *,
    ratio: Tensor,  # (B,) of every sample: that of a dead group moves with the policy like any other
    clipped: Tensor,  # (B,) bool
    drift: Tensor,  # (B,)
) -> Loss:
    """The loss of the module's first line, with its metrics."""
    policy = (weight * rows.loss_weight.double() * policy).mean()
    kl = (weight * live(rows.kl_weight.double() * moments.m3.double(), weight)).mean()
    ratio = ratio.detach()
    return Loss(
        loss=(policy + beta * kl).float(),
        policy=policy.detach(),
        kl=kl.detach(),
        ratio_mean=ratio.mean(),
        ratio_min=ratio.amin(),
        ratio_max=ratio.amax(),
        clip_fraction=clipped.double().mean(),
        drift=drift.detach().mean(),
    )
