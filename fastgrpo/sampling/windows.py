"""Which steps of a rollout are stochastic and trained: a window of consecutive ones, the others follow the ODE.

    all_but_last    every step but the last (Flow-GRPO, arXiv 2505.05470)
    fixed           always the same ones
    random          drawn for each group (Flow-GRPO-Fast), or with `shared` once an iteration for all (MixGRPO's random)
    progressive     slides from the first steps to the last (MixGRPO, 2507.21802); with `decay` ever faster:

        iterations at the window from step l on = ceil(every exp(-decay max(0, l - decay_from)))

Letters: T steps, G groups, S trained steps.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config.keys import Window


def all_but_last(window: Window, num_steps: int, iteration: int, groups: Tensor, seed: int) -> Tensor:
    """Flow-GRPO: all steps are trained but the last, whose Gaussian degenerates."""
    return torch.zeros_like(groups)


def fixed(window: Window, num_steps: int, iteration: int, groups: Tensor, seed: int) -> Tensor:
    """The same steps in every iteration (MixGRPO's frozen window)."""
    return torch.full_like(groups, window.start)


def random(window: Window, num_steps: int, iteration: int, groups: Tensor, seed: int) -> Tensor:
    """Flow-GRPO-Fast: uniform in [lo, hi - S], so that the window lies in [lo, hi), as in the released code.

    Addressed by (seed, iteration, group id): each rank draws the same for a group, and so does a resumed run.
    A shared window is that of group 0.
    """
    lo, hi = _bounds(window, num_steps)
    choices = hi - lo - window_size(window, num_steps) + 1
    drawn = torch.zeros_like(groups) if window.shared else groups
    # numpy promises SeedSequence's words across its versions, but not what Generator.integers makes of them.
    # What a seed has beyond 32 bits comes last: where it is 0 the words are the same without it.
    low, high = seed % (1 << 32), seed >> 32
    words = [np.random.SeedSequence([low, iteration, g, high]).generate_state(1)[0] for g in drawn.tolist()]
    return torch.tensor([lo + int(word) % choices for word in words], dtype=torch.int64)


def progressive(window: Window, num_steps: int, iteration: int, groups: Tensor, seed: int) -> Tensor:
    """MixGRPO: slides by `stride` when its iterations are over, `every` or with `decay` fewer, and stays at the end."""
    start, hi = _bounds(window, num_steps)
    last = hi - window_size(window, num_steps)
    while start < last and iteration >= (held := _iterations_at(window, start)):
        iteration, start = iteration - held, start + window.stride
    return torch.full_like(groups, min(start, last))


def _iterations_at(window: Window, start: int) -> int:
    return math.ceil(window.every * math.exp(-window.decay * max(0, start - window.decay_from)))


WINDOWS: dict[str, Callable[[Window, int, int, Tensor, int], Tensor]] = {
    "all_but_last": all_but_last,
    "fixed": fixed,
    "random": random,
    "progressive": progressive,
}


def window_size(window: Window, num_steps: int) -> int:
    """S, the number of trained steps: static over a run."""
    if window.kind == "all_but_last":
        if window.size not in (None, num_steps - 1):
            raise ValueError(f"window.size {window.size} contradicts 'all_but_last'; leave it out")
        return num_steps - 1
    if window.size is None:
        raise ValueError(f"window.kind {window.kind!r} needs window.size (published: 2 to 4)")
    return window.size


def trainable_steps(window: Window, num_steps: int) -> range:
    """The steps among which the window lies, whatever the iteration."""
    if window.kind == "fixed":
        return range(window.start, window.start + window_size(window, num_steps))
    return range(*_bounds(window, num_steps))


def differ_by_group(window: Window) -> bool:
    """Whether the groups of one iteration may have windows of their own."""
    return window.kind == "random" and not window.shared


def trained_steps(starts: Tensor, size: int, num_steps: int) -> Tensor:
    """The trained steps of each group, (G, T) bool on the CPU; starts: (G,) int64, from `window_starts`."""
    for start in starts.tolist():
        _check_window(start, size, num_steps)
    step, first = torch.arange(num_steps), starts.cpu()[:, None]
    return (first <= step) & (step < first + size)


def window_starts(
    window: Window,
    num_steps: int,
    iteration: int,
    groups: Tensor,  # (G,) int64, ids that are the same on every rank
    seed: int,
) -> Tensor:
    """The first trained step of each group, (G,) int64 on the CPU; refuses what could reach the last step."""
    if window.kind not in WINDOWS:
        raise ValueError(f"window.kind {window.kind!r} is unknown; use one of {', '.join(WINDOWS)}")
    if window.stride < 1 or window.every < 1:
        raise ValueError(f"window.stride {window.stride} and window.every {window.every} must be at least 1")
    if not 0 <= window.decay < math.inf:
        raise ValueError(f"window.decay {window.decay} must be finite and at least 0 (published: 0.1)")
    size = window_size(window, num_steps)
    if window.kind in ("random", "progressive"):
        lo, hi = _bounds(window, num_steps)
        if lo + size > hi:
            raise ValueError(f"window.size {size} does not fit into window.range [{lo}, {hi}); widen it")
        _check_window(hi - size, size, num_steps)
    else:
        lo = window.start if window.kind == "fixed" else 0
    _check_window(lo, size, num_steps)
    return WINDOWS[window.kind](window, num_steps, iteration, groups.cpu(), seed)


def _bounds(window: Window, num_steps: int) -> tuple[int, int]:
    return window.range or (0, num_steps - 1)


def _check_window(start: int, size: int, num_steps: int) -> None:
    if size < 1 or start < 0 or start + size > num_steps - 1:
        raise ValueError(
            f"a window of {size} steps from step {start}: it must hold at least one and lie in "
            f"[0, {num_steps - 1}), as the last of {num_steps} steps is never trained"
        )
