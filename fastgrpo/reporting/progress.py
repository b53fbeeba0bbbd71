"""What a run shows on the terminal: the end of the progress bar and a line of scores; and the watch for its phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastgrpo.reporting.text import score_text


class Stopwatch:
    """Adds up the seconds of each phase, `with stopwatch("rollout"): ...`.

    On a GPU a phase ends when its work there is done. That is a handful of waits an iteration, and none in a loop.
    """

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


def progress(metrics: dict[str, Any]) -> str:
    """The text at the end of the progress bar: the main metrics of an iteration and its seconds by phase."""
    times = " ".join(f"{phase} {seconds:.1f}s" for phase, seconds in metrics["seconds"].items())
    main = f"reward {metrics['reward']:.3f}" if "reward" in metrics else f"loss {metrics['loss']:.3f}"
    size = "x".join(str(metrics[side]) for side in ("height", "width", "num_frames") if side in metrics)
    return f"{size} {main}".lstrip() + f" kl {metrics['kl']:.1e} clip {metrics['clip_fraction']:.0%} | {times}"


def accuracy_line(row: dict[str, Any]) -> str:
    """The scores of an evaluation by category, on one line."""
    return "  ".join(f"{tag} {score_text(value, tag in row['percent'])}" for tag, value in row["accuracy"].items())
