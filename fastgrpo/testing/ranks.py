"""One of several ranks, without the others.

OneRank()                        the only process of a run, without a process group
OneRank(rank=1, world_size=4)    the second of four
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastgrpo.engine.ranks import Ranks


@dataclass(frozen=True)
class OneRank(Ranks):
    """`Ranks` in one process: every other rank is taken to hold and to say just what this one does."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor.detach()] * self.world_size)

    def all_reduce(self, tensor: Tensor, op: Literal["mean", "sum", "min", "max"] = "mean") -> Tensor:
        return tensor.detach() * self.world_size if op == "sum" else tensor.detach().clone()

    def broadcast_object(self, value: Any = None) -> Any:
        return value

    @contextmanager
    def together(self, exception_type: type[Exception]) -> Iterator[None]:
        yield

    def barrier(self) -> None:
        pass
