"""A run that is killed at its files ends as one that nothing disturbed, and what compares them sees every difference."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.helpers import ROOT
from support.runs import ForkServer

sys.path.insert(0, str(ROOT / "benchmarks"))

from kills import Kill, Trial, table
from run_differences import contents, differences

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def runs(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of both runs, and what differs."""
    root = tmp_path_factory.mktemp("kills")
    printed = fork_server.run(str(root), program="support.kill_worker:main")
    return root, json.loads(printed.splitlines()[-1])


def test_a_run_that_is_killed_four_times_ends_as_an_undisturbed_one(runs: tuple[Path, list[str]]) -> None:
    """Between pictures and the line of their evaluation, before a rename, before pruning: nothing is lost or left over."""
    root, found = runs
    assert found == []
    compared = contents(root / "killed")
    assert {"samples/00000/001.png", "checkpoints/00003/rank_00000.safetensors", "metrics.jsonl"} <= compared.keys()
    assert len(compared["metrics.jsonl"]) == 3 and "checkpoints/00002" not in compared


def append(file: Path, line: str) -> None:
    file.write_text(file.read_text() + line)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "samples/00000/001.png is missing": lambda run: (run / "samples" / "00000" / "001.png").unlink(),
    "pytorch_lora_weights.safetensors has another content": lambda run: flip(run / "pytorch_lora_weights.safetensors"),
    "checkpoints/00003/averages.safetensors has another content": lambda run: flip(
        run / "checkpoints" / "00003" / "averages.safetensors"
    ),
    "metrics.jsonl has another content": lambda run: append(run / "metrics.jsonl", '{"iteration": 4}\n'),
    "lock.json is left over": lambda run: (run / "lock.json").write_text("{}"),
    "trained.partial is left over": lambda run: (run / "trained.partial").mkdir(),
    "report.html is not up to date": lambda run: append(run / "report.html", " "),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_every_difference_is_found(said: str, runs: tuple[Path, list[str]], tmp_path: Path) -> None:
    undisturbed = runs[0] / "undisturbed"
    run = shutil.copytree(undisturbed, tmp_path / "undisturbed")  # its name stands in its report
    assert differences(run, undisturbed) == []
    DAMAGE[said](run)
    assert said in differences(run, undisturbed)


def test_the_table_counts_kills_and_the_runs_that_differ() -> None:
    moment, alone = Kill("moment", 1.5), Kill("operation", 3, rank=1, alone=True)
    done = [Trial(1, [moment, moment], []), Trial(1, [moment], ["x is missing"]), Trial(2, [alone], [])]
    lines = table(done).splitlines()
    assert lines[1].split() == ["1", "ranks,", "moment", "3", "2", "1"]
    assert lines[2].split() == ["2", "ranks,", "operation,", "one", "alone", "1", "1", "0"]
    assert len(lines) == 4 and lines[3].endswith("x is missing")
