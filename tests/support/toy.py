"""A network small enough to follow by hand."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgrpo.records import Prompted

SHAPE = (2, 3, 5)  # an odd number of elements
NUM_STEPS, SIZE = 6, 2


class Toy(NamedTuple):
    offset: Tensor  # (B, 1, 1, 1)


def toy_prompts(offset: Tensor, uncond: float | None = None) -> Prompted:
    """Conditionings that add `offset` (B, 1, 1, 1) to the velocity and, under guidance, `uncond` without the prompt."""
    return Prompted.of(Toy(offset), None if uncond is None else Toy(torch.full_like(offset, uncond)))


class ToyPolicy(nn.Module):
    """A velocity that depends on everything it is given, element by element."""

    latent_shape, size, dtype, guide = SHAPE, SHAPE[1:], torch.float32, None

    def prepared(self, conditioning: Toy) -> Toy:
        return conditioning

    def start(self, noise: Tensor, sigma: Tensor, prompted: Prompted) -> Tensor:
        return noise

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Toy) -> Tensor:
        return torch.tanh(x) * sigma.view(-1, 1, 1, 1) + conditioning.offset
