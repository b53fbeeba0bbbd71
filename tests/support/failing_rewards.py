"""Rewards that fail in the third iteration of a run of `support.runs.SMALL`, which asks for 16 images in batches of 4.

And one that tells no image from another.
"""

import sys
import time
from typing import Any

import torch
from torch import Tensor

FAILURES = {
    "nan": lambda good: good.index_fill(0, torch.tensor([1]), float("nan")),
    "infinite": lambda good: good + float("inf"),
    "none": lambda good: None,
    "strings": lambda good: ["0.5"] * len(good),
    "few": lambda good: good[:-1],
    "error": lambda good: 1 / 0,
    "memory": lambda good: torch.empty(2**60),
    "exit": lambda good: sys.exit(0),
    "hang": lambda good: time.sleep(1000),
}


class Failing:
    """Scores by brightness, until it fails. rank: that it fails on alone, if there are several."""

    def __init__(self, *, kind: str, rank: int | None = None, calls: int = 8) -> None:
        self.kind, self.rank, self.calls = kind, rank, calls

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Any:
        self.calls -= 1
        good = images.float().mean((1, 2, 3)) / 255
        mine = self.rank is None or torch.distributed.get_rank() == self.rank
        return FAILURES[self.kind](good) if self.calls < 0 and mine else good


def constant(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    return torch.full((len(images),), 0.5)
