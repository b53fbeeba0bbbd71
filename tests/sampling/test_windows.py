"""Windows: where they lie, that all ranks agree on them, and what is refused."""

import math

import pytest
import torch

from fastgrpo.config.keys import Window
from fastgrpo.sampling.windows import WINDOWS, differ_by_group, trained_steps, window_size, window_starts

GROUPS = torch.arange(40)


def starts(window, iteration=0, groups=GROUPS, seed=0):
    return window_starts(window, 10, iteration, groups, seed)


def test_window_kinds():
    assert set(starts(Window()).tolist()) == {0} and window_size(Window(), 10) == 9
    assert set(starts(Window(kind="fixed", size=3, start=2)).tolist()) == {2}
    assert window_size(Window(kind="fixed", size=3, start=2), 10) == 3
    sliding = Window(kind="progressive", size=4, stride=2, every=25)
    assert [starts(sliding, i)[7].item() for i in (0, 24, 25, 50, 75, 10_000)] == [0, 0, 2, 4, 5, 5]
    ranged = Window(kind="progressive", size=2, every=1, range=(1, 5))
    assert [starts(ranged, i)[0].item() for i in range(6)] == [1, 2, 3, 3, 3, 3]
    for kind in WINDOWS:
        start = starts(Window(kind=kind, size=None if kind == "all_but_last" else 3))
        assert start.shape == (40,) and start.dtype == torch.int64


def test_random_windows_fill_their_range_evenly():
    """`3 in [0, 5)` of the released configs bounds the window, not its start: 0, 1 and 2, never 3."""
    draws = torch.cat([starts(Window(kind="random", size=3, range=(0, 5)), i) for i in range(100)])
    counts = draws.bincount()
    assert counts.numel() == 3
    assert (counts - 4000 / 3).abs().max() < 5 * math.sqrt(4000 * 2 / 9)
    assert set(starts(Window(kind="random", size=3, range=(0, 3))).tolist()) == {0}


def test_random_windows_are_the_same_on_every_rank():
    window = Window(kind="random", size=2)
    whole = starts(window, iteration=3, seed=11)
    torch.manual_seed(5)  # the global generator of a rank has no say
    parts = [starts(window, iteration=3, groups=GROUPS[rank::4], seed=11) for rank in range(4)]
    for rank, part in enumerate(parts):
        assert part.tolist() == whole[rank::4].tolist()
    assert whole.tolist() != starts(window, iteration=4, seed=11).tolist()
    assert whole.tolist() != starts(window, iteration=3, seed=12).tolist()
    # Drawn once and written down: a later version that draws otherwise would not resume a run of this one.
    assert whole[:8].tolist() == [1, 5, 2, 0, 0, 1, 4, 2]


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window(kind="fixed", size=3, start=7), r"3 steps from step 7.*\[0, 9\).*never trained"),
        (Window(kind="fixed", size=0), "0 steps from step 0: it must hold at least one"),
        (Window(kind="fixed", size=2, start=-1), "from step -1"),
        (Window(kind="fixed"), "needs window.size"),
        (Window(kind="random", size=3, range=(0, 10)), r"\[0, 9\)"),
        (Window(kind="random", size=3, range=(4, 6)), r"3 does not fit into window.range \[4, 6\)"),
        (Window(kind="random", size=0), "must hold at least one"),
        (Window(kind="progressive", size=10), r"10 does not fit into window.range \[0, 9\)"),
        (Window(kind="progressive", size=2, range=(-1, 5)), "from step -1"),
        (Window(kind="progressive", size=2, every=0), "window.every 0 must be at least 1"),
        (Window(kind="progressive", size=2, decay=-0.1), "window.decay -0.1 must be finite and at least 0"),
        (Window(kind="progressive", size=2, decay=math.nan), "window.decay nan"),
        (Window(size=3), "window.size 3 contradicts 'all_but_last'"),
        (Window(kind="decay", size=3), "'decay' is unknown; use one of all_but_last"),
    ],
)
def test_bad_windows_are_refused(window, message):
    with pytest.raises(ValueError, match=message):
        starts(window)


def test_one_random_window_for_all() -> None:
    """The paper's: drawn once an iteration, in the same range, and the draws without `shared` stay what they were."""
    window = Window(kind="random", size=3, range=(1, 7), shared=True)
    drawn = [starts(window, i).unique().tolist() for i in range(60)]
    assert all(len(found) == 1 for found in drawn)
    assert {start for (start,) in drawn} == {1, 2, 3, 4}
    assert starts(window, 5, groups=torch.tensor([17])).tolist() == drawn[5]
    assert [differ_by_group(Window(kind=kind, size=2)) for kind in WINDOWS] == [kind == "random" for kind in WINDOWS]
    assert not differ_by_group(window)


def released_decay(iterations: int, every: int, k: float, threshold: int, stride: int, last: int) -> list[int]:
    """The window of each iteration as MixGRPO's released `exp_decay` counts it, one iteration after the other."""
    position, inside, found = 0, 0, []
    for _ in range(iterations):
        found.append(position)
        inside += 1
        if inside >= math.ceil(every * math.exp(-k * max(0, position - threshold))):
            inside, position = 0, min(position + stride, last)
    return found


@pytest.mark.parametrize(
    ("every", "decay", "decay_from", "stride"), [(20, 0.1, 2, 1), (7, 0.5, 0, 1), (3, 2.0, 1, 2), (5, 0.0, 0, 1)]
)
def test_windows_that_slide_ever_faster(every: int, decay: float, decay_from: int, stride: int) -> None:
    window = Window(kind="progressive", size=2, every=every, decay=decay, decay_from=decay_from, stride=stride)
    found = [starts(window, i, groups=torch.tensor([0])).item() for i in range(200)]
    assert found == released_decay(200, every, decay, decay_from, stride, last=7)
    assert found[-1] == 7


def test_published_decay() -> None:
    """tau_0 = 20, k = 0.1, threshold 13 of 25 steps: how long each window is held."""
    window = Window(kind="progressive", size=4, every=20, decay=0.1, decay_from=13)
    found = torch.tensor([window_starts(window, 25, i, torch.tensor([0]), 0).item() for i in range(400)])
    assert found.bincount().tolist()[:18] == [20] * 14 + [19, 17, 15, 14]


def test_trained_steps() -> None:
    mask = trained_steps(torch.tensor([0, 4]), 3, 8)
    assert mask.tolist() == [[True] * 3 + [False] * 5, [False] * 4 + [True] * 3 + [False]]
    with pytest.raises(ValueError, match="3 steps from step 5"):
        trained_steps(torch.tensor([0, 5]), 3, 8)
