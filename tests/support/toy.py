"""A network small enough to follow by hand."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

SHAPE = (2, 3, 5)  # an odd number of elements
NUM_STEPS, SIZE = 6, 2


class Toy(NamedTuple):
    offset: Tensor  # (B, 1, 1, 1)


class ToyPolicy(nn.Module):
    """A velocity that depends on everything it is given, element by element."""

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Toy) -> Tensor:
        return torch.tanh(x) * sigma.view(-1, 1, 1, 1) + conditioning.offset
