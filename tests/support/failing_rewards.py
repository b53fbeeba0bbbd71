"""Rewards that fail in the third iteration of a run of `support.runs.SMALL`, which asks for 16 images in batches of 4.

And one that tells no image from another.
"""

import torch
from torch import Tensor

calls = [0]


def score(images: Tensor, fails: int) -> Tensor:
    calls[0] += 1
    if calls[0] > fails:
        raise MemoryError  # which has no message
    return images.float().mean((1, 2, 3)) / 255


def alone(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    return score(images, fails=8)


def on_rank_1(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Of two ranks, which draw half of the batches each."""
    return score(images, fails=4 if torch.distributed.get_rank() == 1 else 1000)


def constant(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    return torch.full((len(images),), 0.5)
