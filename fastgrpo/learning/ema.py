"""Exponential moving averages of the trained weights.

    average <- d(n) average + (1 - d(n)) weights          n = updates so far

`warmed_up` is for the one with which one evaluates and which one ships, `lagging` for the old policy of DiffusionNFT.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Ema:
    """Works on `Engine.trained_state` and in float32, as a bfloat16 average would not move at all."""

    def __init__(self, state: dict[str, Tensor], decay: Callable[[int], float]) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: tensor.detach().float().clone() for name, tensor in state.items()}

    @torch.no_grad()
    def update(self, state: dict[str, Tensor]) -> None:
        decay = self.decay(self.updates)
        for name, average in self.weights.items():
            average.lerp_(state[name].float(), 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])


def warmed_up(decay: float) -> Callable[[int], float]:
    """min(decay, (1 + n) / (10 + n)): the first updates forget the start at once, and the average is not late."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay {decay} must be at least 0 and below 1 (published: 0.9)")
    return partial(_warmed_up, decay)


def lagging(rate: float, limit: float, start: int) -> Callable[[int], float]:
    """min(rate (n - start), limit) and never below 0: DiffusionNFT's eta (arXiv 2509.16117)."""
    if not (rate >= 0 and 0 <= limit < 1):
        raise ValueError(f"rate {rate} must be at least 0 and limit {limit} in [0, 1) (published: 0.001 and 0.5)")
    return partial(_lagging, rate, limit, start)


def _warmed_up(decay: float, updates: int) -> float:
    return min(decay, (1 + updates) / (10 + updates))


def _lagging(rate: float, limit: float, start: int, updates: int) -> float:
    return min(max(rate * (updates - start), 0.0), limit)
