"""Advantages: how much better each sample is than the others of its prompt.

    A = clip((R - mean_group R) / (std R + eps), -adv_clip_max, adv_clip_max)

with the population std of the group or of the whole batch (Flow-GRPO, arXiv 2505.05470, and its code).
Unlike there, a group whose rewards are all equal is not dropped, which would change shapes: it gets weight 0.

Letters: N samples, G groups.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    values: Tensor  # (N,) float32
    weight: Tensor  # (N,) float32, 0 in a group that teaches nothing, else 1


def group_advantages(
    rewards: Tensor,  # (N,)
    group: Tensor,  # (N,) int64 in [0, G), in any order
    *,
    num_groups: int,
    std: Literal["group", "global"],
    adv_clip_max: float,
    eps: float = 1e-4,
) -> Advantages:
    """The advantages of the whole batch, on its device, in float64 inside and without a host sync.

    Sums run over sorted rewards, so a sample's advantage is the same bits whatever the order of arrival.
    A group is dead if max == min: the float std of equal rewards need not be 0, and / eps would amplify it.
    """
    if rewards.ndim != 1 or rewards.shape != group.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group {tuple(group.shape)} must both be (N,)")
    if std not in ("group", "global"):
        raise ValueError(f"std {std!r} is unknown; use 'group' or 'global'")
    if not adv_clip_max > 0:
        raise ValueError(f"adv_clip_max {adv_clip_max} must be above 0 (published: 5)")
    r = rewards.double()
    member = group == torch.arange(num_groups, device=group.device)[:, None]  # (G, N)
    count = member.sum(dim=1, keepdim=True)  # (G, 1)
    # Each row: the group's rewards in rising order, then padding that the sums do not see.
    ranked = torch.where(member, r, torch.inf).sort(dim=1).values  # (G, N)
    real = torch.arange(r.numel(), device=r.device) < count  # (G, N)
    mean = torch.where(real, ranked, 0.0).sum(dim=1, keepdim=True) / count  # (G, 1)
    if std == "group":
        variance = torch.where(real, (ranked - mean).square(), 0.0).sum(dim=1, keepdim=True) / count  # (G, 1)
    else:
        variance = r.sort().values.var(correction=0).expand_as(mean)  # (G, 1)
    live = ranked[:, :1] != ranked.gather(1, (count - 1).clamp(min=0))  # (G, 1) min and max

    mean, variance, live = (row[:, 0][group] for row in (mean, variance, live))  # (N,)
    values = ((r - mean) / (variance.sqrt() + eps)).clamp(-adv_clip_max, adv_clip_max)
    return Advantages(torch.where(live, values, 0.0).float(), live.float())
