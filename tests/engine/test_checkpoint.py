"""Complete or absent: a crash at every point, damage, pruning. With a real engine: see test_engine.py."""

import errno
import json
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.engine.checkpoint import (
    MARKER,
    check_files,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fastgrpo.engine.ranks import OneRank

STATE = {
    "ema": {"w": torch.arange(3.0)},
    "position": [7, 2],
    "name": "x",
    "random": np.random.default_rng(3).bit_generator.state,
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it or has a `finally` for it."""


@dataclass(frozen=True)
class DyingRank(OneRank):
    """A rank that is gone at the barrier `dies` names."""

    dies: str = ""
    barriers: list[int] = field(default_factory=list)  # one entry for each that was passed

    def barrier(self) -> None:
        self.barriers.append(1)
        if (self.dies, len(self.barriers)) in (("before the shards", 1), ("after the shards", 2)):
            raise Killed


class FakeEngine:
    """The engine of one of the ranks; `dies` names the point at which the process is gone."""

    def __init__(self, rank: int = 0, dies: str = "") -> None:
        self.ranks = DyingRank(rank=rank, dies=dies)
        self.dies, self.loaded = dies, None

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "shard0").write_bytes(b"0123")
        if self.dies == "in the shards":
            raise Killed
        (folder / "shard1").write_bytes(b"4567")

    def load(self, folder: Path) -> None:
        self.loaded = (folder / "shard0").read_bytes() + (folder / "shard1").read_bytes()


def dying(*args: Any, **kwargs: Any) -> None:
    raise Killed


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    assert save_checkpoint(FakeEngine(), tmp_path / "new", 12, STATE) == tmp_path / "new" / "00012"
    engine = FakeEngine()
    iteration, state = load_checkpoint(engine, tmp_path / "new")
    assert iteration == 12 and engine.loaded == b"01234567"
    assert torch.equal(state["ema"].pop("w"), STATE["ema"]["w"])
    assert state == STATE | {"ema": {}}
    record = json.loads((tmp_path / "new" / "00012" / MARKER).read_text())
    assert record["world_size"] == 1
    assert record["files"].keys() == {"state.pt", "engine/shard0", "engine/shard1"}


def test_nothing_there(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        assert latest_checkpoint(root) is None and load_checkpoint(FakeEngine(), root) is None


POINTS = ("before the shards", "in the shards", "after the shards", "before the marker", "before the rename")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("point", POINTS)
def test_a_crash_is_never_picked_up(point: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not first:
        save_checkpoint(FakeEngine(), tmp_path, 1, STATE)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if point == "before the marker":
            patch.setattr(json, "dumps", dying)
        if point == "before the rename":
            patch.setattr(os, "replace", dying)
        save_checkpoint(FakeEngine(dies=point), tmp_path, 2, STATE)
    assert "00002.partial" in names(tmp_path)
    found = load_checkpoint(FakeEngine(), tmp_path)
    assert found is None if first else found[0] == 1
    save_checkpoint(FakeEngine(), tmp_path, 2, STATE)
    assert names(tmp_path) == (["00002"] if first else ["00001", "00002"])
    assert load_checkpoint(FakeEngine(), tmp_path)[0] == 2


@pytest.mark.parametrize("point", ["rename", "delete"])
def test_a_crash_while_pruning(point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one is complete, and no old one is left half deleted under its name."""
    for iteration in (1, 2):
        save_checkpoint(FakeEngine(), tmp_path, iteration, STATE)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if point == "delete":
            patch.setattr(shutil, "rmtree", lambda folder: (Path(folder) / "state.pt").unlink() or dying())
        else:
            rename = os.replace
            patch.setattr(os, "replace", lambda old, new: dying() if "removed" in str(new) else rename(old, new))
        save_checkpoint(FakeEngine(), tmp_path, 3, STATE)
    assert [check_files(path) for path in complete_checkpoints(tmp_path)] == ([2, 3] if point == "delete" else [1, 2, 3])
    save_checkpoint(FakeEngine(), tmp_path, 4, STATE)
    assert names(tmp_path) == ["00003", "00004"]


@pytest.mark.parametrize("where", ["state", "shards", "marker"])
def test_a_full_disk_is_told_and_leaves_the_older_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullEngine(FakeEngine):
        def save(self, folder: Path) -> None:
            super().save(folder)
            if where == "shards":
                full()

    save_checkpoint(FakeEngine(), tmp_path, 1, STATE)
    with monkeypatch.context() as patch:
        if where == "state":
            patch.setattr(torch, "save", full)
        if where == "marker":
            patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / '00002'}'"):
            save_checkpoint(FullEngine(), tmp_path, 2, STATE)
    assert names(tmp_path) == ["00001"] and load_checkpoint(FakeEngine(), tmp_path)[0] == 1


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """The same with a real process that ends without a word, before the rename."""
    save_checkpoint(FakeEngine(), tmp_path, 1, STATE)
    child = os.fork()
    if child == 0:
        try:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            save_checkpoint(FakeEngine(), tmp_path, 2, STATE)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert names(tmp_path) == ["00001", "00002.partial"]
    assert (tmp_path / "00002.partial" / MARKER).exists()
    assert load_checkpoint(FakeEngine(), tmp_path)[0] == 1


def test_damage_is_named(tmp_path: Path) -> None:
    save_checkpoint(FakeEngine(), tmp_path, 1, STATE)
    folder = save_checkpoint(FakeEngine(), tmp_path, 2, STATE)
    shard = folder / "engine" / "shard1"
    shard.write_bytes(b"45")
    message = f"{shard} has 2 bytes, it was saved with 4; restore it, or remove {folder}"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(FakeEngine(), tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing from a complete checkpoint"):
        load_checkpoint(FakeEngine(), tmp_path)
    for content in ("", "{}", "[1]"):
        (folder / MARKER).write_text(content)
        with pytest.raises(ValueError, match=f"{folder / MARKER} cannot be read"):
            load_checkpoint(FakeEngine(), tmp_path)
    (folder / MARKER).unlink()
    assert load_checkpoint(FakeEngine(), tmp_path)[0] == 1


def test_latest_is_the_highest_complete(tmp_path: Path) -> None:
    for iteration in (99_999, 100_000, 2):
        save_checkpoint(FakeEngine(), tmp_path, iteration, STATE, keep=9)
    for name in ("100001", "100002.partial", "notes", "100003.removed", "7"):
        (tmp_path / name).mkdir()
    for name in ("100002.partial", "100003.removed", "7"):
        (tmp_path / name / MARKER).write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "100000"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_last(keep: int, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for iteration in range(1, 6):
        save_checkpoint(FakeEngine(), tmp_path, iteration, STATE, keep=keep)
    assert names(tmp_path) == [f"{i:05d}" for i in range(6 - keep, 6)] + ["notes"]


def test_the_same_iteration_again(tmp_path: Path) -> None:
    save_checkpoint(FakeEngine(), tmp_path, 1, {"run": "old"})
    save_checkpoint(FakeEngine(), tmp_path, 1, {"run": "new"})
    assert load_checkpoint(FakeEngine(), tmp_path) == (1, {"run": "new"}) and names(tmp_path) == ["00001"]


def test_another_rank_writes_only_its_part(tmp_path: Path) -> None:
    (tmp_path / "00003.partial").mkdir()
    engine = FakeEngine(rank=1)
    save_checkpoint(engine, tmp_path, 3, STATE)
    assert names(tmp_path) == ["00003.partial"] and names(tmp_path / "00003.partial") == ["engine"]
    assert len(engine.ranks.barriers) == 3
    save_checkpoint(FakeEngine(), tmp_path, 4, STATE)
    assert load_checkpoint(engine, tmp_path) is None  # what rank 0 sent, not what this one sees


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="the state holds .*Path; use tensors, numbers"):
        save_checkpoint(FakeEngine(), tmp_path, 1, {"folder": tmp_path})
    with pytest.raises(ValueError, match="keep 0 must be at least 1"):
        save_checkpoint(FakeEngine(), tmp_path, 1, STATE, keep=0)
    assert latest_checkpoint(tmp_path) is None
