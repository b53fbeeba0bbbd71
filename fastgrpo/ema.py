"""The exponential moving average of the trained weights, with which one evaluates and which one ships.

    average <- d average + (1 - d) weights,   d = min(decay, (1 + n) / (10 + n)),   n = updates so far

so that the first updates forget the start at once and the average is not late.
"""

from typing import Any

import torch
from torch import Tensor


class Ema:
    """Works on `Engine.trained_state` and in float32, as a bfloat16 average would not move at all."""

    def __init__(self, state: dict[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} must be at least 0 and below 1 (published: 0.9)")
        self.decay, self.updates = decay, 0
        self.weights = {name: tensor.detach().float().clone() for name, tensor in state.items()}

    @torch.no_grad()
    def update(self, state: dict[str, Tensor]) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.weights.items():
            average.lerp_(state[name].float(), 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])
