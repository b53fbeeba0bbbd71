"""What a run says of itself while it runs: seconds by phase, the end of the progress bar, a line of scores."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgrpo.reporting.text import are_shares, score_text


class Stopwatch:
    """Seconds by phase. On a GPU a phase ends when its work is done: a handful of waits an iteration, none in a loop."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def progress(metrics: dict) -> str:
    """The end of the progress bar."""
    times = " ".join(f"{phase} {seconds:.1f}s" for phase, seconds in metrics["seconds"].items())
    told = f"reward {metrics['reward']:.3f}" if "reward" in metrics else f"loss {metrics['loss']:.3f}"
    return f"{told} kl {metrics['kl']:.1e} clip {metrics['clip_fraction']:.0%} | {times}"


def accuracy_line(accuracy: dict[str, float]) -> str:
    shares = are_shares(accuracy.values())
    return "  ".join(f"{tag} {score_text(value, shares)}" for tag, value in accuracy.items())
