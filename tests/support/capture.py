"""A stand-in for the capture of a graph, which a machine without a GPU can run."""

from collections.abc import Callable

import torch

from fastgrpo.records import Trajectory
from fastgrpo.sampling.graph import CudaCapture
from support.helpers import DEVICE


class Rerun:
    """Like a graph: reads its inputs and writes its result by address, whatever the caller holds."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], Trajectory]) -> tuple[Trajectory, Callable[[], None]]:
        self.captures += 1
        result = run()

        def replay() -> None:
            self.replays += 1
            again = run()
            for name in ("latents", "v_old", "log_prob", "final"):
                getattr(result, name).copy_(getattr(again, name))

        return result, replay


def equal(a: Trajectory, b: Trajectory) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("latents", "v_old", "log_prob", "final"))


def capture() -> CudaCapture | Rerun:
    return CudaCapture() if DEVICE == "cuda" else Rerun()
