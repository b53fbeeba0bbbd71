"""Advantages: how much better each sample is than the others of its prompt.

    scores (N, R) -> combine -> [win rate] -> normalise -> clip -> [select]

    norm(r) = (r - mean_group r) / (std r + eps)      with the population std of the group or of the whole batch

    combine "sum"     A = norm(sum_k w_k r_k)                                    Flow-GRPO (arXiv 2505.05470)
    combine "each"    S = sum_k w_k norm(r_k),  A = S / (std_batch S + eps)      GDPO (arXiv 2601.05242, eqs. 4, 7, 6)
    pairwise          r = (wins + ties / 2) / rivals in its group, before norm   Pref-GRPO (arXiv 2508.20751)
    keep              train the keep / 2 best and the keep / 2 worst of a group  DanceGRPO (arXiv 2505.07818, sec. 3.2)

GDPO as published takes the group's std. Its eq. 6 also subtracts the mean of S over the batch, which is 0 here: each
group's is. Its sample std differs from the population's by a factor common to groups of one size: eq. 6 divides it out.

Unlike in the released codes nothing is dropped, which would change shapes: a group that teaches nothing, and a sample
that is not selected, get weight 0, and the loss is still divided by the number of all samples.

Letters: N samples, R rewards, G groups.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgrpo.learning.pairs import Pairs


class Advantages(NamedTuple):
    values: Tensor  # (N,) float32
    weight: Tensor  # (N,) float32, 0 in a group that teaches nothing and where not selected, else 1

    def spread(self, number: Tensor, samples: int) -> "Advantages":
        """Those of all `samples`, with 0 for the others, where these are of the samples `number` (N,) alone."""
        return Advantages(*(torch.zeros(samples, device=v.device).index_copy(0, number, v) for v in self))

    def only(self, whole: Tensor | None) -> "Advantages":
        """With 0 where `whole` (N,) is False; None: as they are."""
        return self if whole is None else Advantages(self.values * whole, self.weight * whole)


def group_advantages(
    scores: Tensor,  # (N,) or (N, R)
    group: Tensor,  # (N,) int64 in [0, G), in any order
    *,
    num_groups: int,
    std: Literal["group", "global"],
    adv_clip_max: float,
    weights: Sequence[float] = (1.0,),  # R of them
    combine: Literal["sum", "each"] = "sum",
    pairwise: bool = False,
    keep: int | None = None,
    sample_id: Tensor | None = None,  # (N,) int64, all different: decides between equal advantages; None: the position
    eps: float = 1e-4,
) -> Advantages:
    """The advantages of the whole batch, on its device, in float64 inside and without a host sync.

    Sums run over sorted rewards, so a sample's advantage is the same bits whatever the order of arrival.
    """
    scores = scores[:, None] if scores.ndim == 1 else scores
    _check(scores, group, weights, std, adv_clip_max, combine, keep)
    columns: Sequence[Tensor] = scores.double().unbind(dim=1)
    if combine == "sum":
        # In the scores' own precision: sums that differ by what float64 rounds off are equal rewards.
        columns, weights = [_weighted_sum(columns, weights).to(scores.dtype).double()], [1.0]
    if pairwise:
        columns = [win_rate(column, group) for column in columns]
    normalised, alive = zip(*(_normalise(column, group, num_groups, std, eps) for column in columns), strict=True)
    values = _weighted_sum(normalised, weights)
    if combine == "each":
        values = values / (batch_std(values) + eps)
    # A reward of weight 0 is only watched: that it varies teaches nothing.
    live = torch.stack([one & (weight != 0) for one, weight in zip(alive, weights, strict=True)]).any(dim=0)
    # Before the clip, which makes equal what is not.
    taught = live if keep is None else live & best_and_worst(values, group, keep, sample_id)
    values = values.clamp(-adv_clip_max, adv_clip_max)
    return Advantages(torch.where(taught, values, 0.0).float(), taught.float())


def offline_advantages(samples: int, keys: Sequence[str], device: torch.device) -> tuple[Advantages, Pairs | None]:
    """Advantages and pairs of an offline run, which has no reward: every image is wanted, or the first of each two."""
    ones = torch.ones(samples, device=device)
    if len(keys) == 1:
        return Advantages(ones, ones), None
    number = torch.arange(samples, device=device)
    return Advantages(1.0 - 2.0 * (number % 2), ones), Pairs(noise_id=number - number % 2, sort_key=number, weight=ones)


def win_rate(rewards: Tensor, group: Tensor) -> Tensor:
    """The share of the others of its group that each sample beats, a tie counting half, (N,) float64.

    Small gaps in reward then no longer become large advantages when all rewards of a group are close.
    """
    rival = group[:, None] == group  # (N, N) bool, itself included
    wins = (rival & (rewards[:, None] > rewards)).sum(dim=1)
    ties = (rival & (rewards[:, None] == rewards)).sum(dim=1) - 1
    others = (rival.sum(dim=1) - 1).clamp(min=1)
    rate = (2 * wins + ties).double() / (2 * others)
    return torch.where(rewards.isnan(), rewards.double(), rate)  # a comparison would hide it


def best_and_worst(values: Tensor, group: Tensor, keep: int, sample_id: Tensor | None = None) -> Tensor:
    """Whether a sample is among the keep / 2 highest or the keep / 2 lowest of its group, (N,) bool.

    Of equal values the one with the greater sample_id counts as higher. A smaller group is kept whole.
    """
    index = torch.arange(len(values), device=values.device) if sample_id is None else sample_id
    rival = group[:, None] == group  # (N, N) bool, itself included
    higher = (values[:, None] > values) | ((values[:, None] == values) & (index[:, None] > index))
    below = (rival & higher).sum(dim=1)
    above = rival.sum(dim=1) - 1 - below
    return (below < keep // 2) | (above < keep // 2)


def _normalise(rewards: Tensor, group: Tensor, num_groups: int, std: str, eps: float) -> tuple[Tensor, Tensor]:
    """norm(r), (N,), and whether a sample's group is alive, (N,) bool; 0 where it is not.

    A group is dead if max == min: the float std of equal rewards need not be 0, and / eps would amplify it.
    """
    member = group == torch.arange(num_groups, device=group.device)[:, None]  # (G, N)
    count = member.sum(dim=1, keepdim=True)  # (G, 1)
    # Each row: the group's rewards in rising order, then padding that the sums do not see.
    ranked = torch.where(member, rewards, torch.inf).sort(dim=1).values  # (G, N)
    real = torch.arange(rewards.numel(), device=rewards.device) < count  # (G, N)
    mean = torch.where(real, ranked, 0.0).sum(dim=1, keepdim=True) / count  # (G, 1)
    if std == "group":
        variance = torch.where(real, (ranked - mean).square(), 0.0).sum(dim=1, keepdim=True) / count  # (G, 1)
        scale = variance.sqrt()
    else:
        scale = batch_std(rewards).expand_as(mean)  # (G, 1)
    alive = ranked[:, :1] != ranked.gather(1, (count - 1).clamp(min=0))  # (G, 1) min and max

    mean, scale, alive = (row[:, 0][group] for row in (mean, scale, alive))  # (N,)
    return torch.where(alive, (rewards - mean) / (scale + eps), 0.0), alive


def batch_std(values: Tensor) -> Tensor:
    return values.sort().values.std(correction=0)


def _weighted_sum(columns: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    # One after the other: at the end of a tensor torch.sum adds in another order than within, which depends on N.
    total = torch.zeros_like(columns[0])
    for column, weight in zip(columns, weights, strict=True):
        total = total + weight * column
    return total


def _check(
    scores: Tensor, group: Tensor, weights: Sequence[float], std: str, clip: float, combine: str, keep: int | None
) -> None:
    if scores.ndim != 2 or scores.shape[:1] != group.shape:
        raise ValueError(f"scores {tuple(scores.shape)} must be (N,) or (N, R), and group {tuple(group.shape)} (N,)")
    if scores.shape[1] != len(weights):
        raise ValueError(f"{len(weights)} weights {tuple(weights)} for {scores.shape[1]} rewards: give one for each")
    if std not in ("group", "global"):
        raise ValueError(f"std {std!r} is unknown; use 'group' or 'global'")
    if combine not in ("sum", "each"):
        raise ValueError(f"combine {combine!r} is unknown; use 'sum' or 'each'")
    if not clip > 0:
        raise ValueError(f"adv_clip_max {clip} must be above 0 (published: 5)")
    if keep is not None and (keep < 2 or keep % 2):
        raise ValueError(f"keep {keep}: half are the best, half the worst, so take an even number, at least 2, or None")
