"""The soak's verdicts, on series of which is known what they are."""

import sys
from pathlib import Path

import numpy as np
import pytest
from support.helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from soak import BLOCK, QUANTITIES, size, thinned, verdict

BLOCKS = np.arange(100.0)
NOISE = np.random.default_rng(0).normal(size=100)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("memory", 700 + NOISE, "flat"),
        ("memory", 700 + 0.3 * BLOCKS, "not flat"),  # 15 kB an iteration
        ("memory", np.where(BLOCKS < 20, 500, 700) + NOISE, "flat"),  # it grows while the run warms up
        ("descriptors", 32 + (BLOCKS % 2), "flat"),
        ("descriptors", 32 + BLOCKS // 20, "not flat"),  # one in 400 iterations
        ("threads", np.full(100, 17.0), "flat"),
        ("processor_seconds", 0.1 + 0.01 * NOISE, "flat"),
        ("processor_seconds", 0.1 + 0.0005 * BLOCKS, "not flat"),
        ("processor_seconds", 0.2 - 0.001 * BLOCKS, "flat"),  # what falls takes nothing more
        ("folder", 3 + 0.05 * BLOCKS, "linear"),
        ("folder", 3 + 0.05 * BLOCKS**2, "not linear"),
        ("folder", np.full(100, 3.0), "not linear"),
    ],
)
def test_a_series_is_called_what_it_is(name: str, values: np.ndarray, said: str) -> None:
    found = verdict(QUANTITIES[name], values)
    assert found["verdict"] == said
    assert found["slope_per_1000"] == pytest.approx(1000 / BLOCK * np.polyfit(BLOCKS[25:], values[25:], 1)[0], abs=1e-9)


def test_a_block_has_the_mean_of_its_seconds_and_the_highest_of_the_rest() -> None:
    rows = np.zeros((2 * BLOCK, len(QUANTITIES)))
    rows[3] = 10.0
    found = thinned(rows)
    assert found["memory"].tolist() == [10, 0] and found["seconds"].tolist() == [10 / BLOCK, 0]


def test_the_size_of_a_folder_is_that_of_all_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(300))
    (tmp_path / "c").write_bytes(bytes(7))
    assert size(tmp_path) == 307
