"""Chosen and rejected: the pairs of a group, for objectives that compare two samples of a prompt.

The best sample of a group with its worst, the second best with the second worst, and so on. N samples, G groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    noise_id: Tensor  # (N,) int64: both of a pair are noised alike, with the noise of the chosen one
    sort_key: Tensor  # (N,) int64: sorted by it, pairs that teach come first, the chosen one before the rejected
    weight: Tensor  # (N,) float32, 0 for what is in no pair, or in one of equals

    def only(self, whole: Tensor | None) -> "Pairs":
        """With weight 0 where `whole` (N,) is False, which takes out the pair; None: as they are."""
        return self if whole is None else self._replace(weight=self.weight * whole)


def pairs_of_groups(values: Tensor, group_size: int, count: int) -> Pairs:
    """`count` pairs of each group by its samples' advantages (N,), group after group; ties go by the sample's number."""
    if not 1 <= count <= group_size // 2:
        raise ValueError(f"{count} pairs of a group of {group_size}: take 1 to {group_size // 2}")
    samples, device = values.numel(), values.device
    order = values.view(-1, group_size).argsort(dim=1, descending=True, stable=True)  # (G, group_size)
    first = torch.arange(0, samples, group_size, device=device)[:, None]
    chosen, rejected = order[:, :count] + first, order.flip(1)[:, :count] + first  # (G, count)
    differ = values[chosen] > values[rejected]
    noise_id = torch.arange(samples, device=device)
    noise_id[rejected.flatten()] = chosen.flatten()
    # Past the pairs that teach come those that do not, and then everything else: whole pairs only, as batches are even.
    number = torch.arange(chosen.numel(), device=device).view_as(chosen)
    pair = torch.where(differ, number, number + samples)
    sort_key = torch.full((samples,), 4 * samples, dtype=torch.int64, device=device)
    sort_key[chosen.flatten()], sort_key[rejected.flatten()] = 2 * pair.flatten(), 2 * pair.flatten() + 1
    weight = torch.zeros(samples, device=device)
    weight[chosen.flatten()] = weight[rejected.flatten()] = differ.flatten().float()
    return Pairs(noise_id, sort_key, weight)
