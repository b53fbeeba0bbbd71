"""Complete or absent, and what was saved or set aside: a kill at every file operation, damage, full disks, several ranks."""

import errno
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.engine import checkpoint
from fastgrpo.engine.checkpoint import AVERAGES, STATE, Damaged, GivenUp, Snapshot, check_files, complete, load, write_part
from fastgrpo.engine.checkpoint_folders import MARKER, discard, is_complete, latest_checkpoint, prune
from fastgrpo.engine.ranks import OneRank
from fastgrpo.engine.saver import Saver
from fastgrpo.engine.shards import Shard
from fastgrpo.finite import NotFinite

ONE = OneRank()
PAIR = [OneRank(rank=rank, world_size=2) for rank in range(2)]


def snapshot(iteration: int, rank: int = 0, value: float = 0.0) -> Snapshot:
    """The first or the second half of a weight of four elements, whose values are those of the iteration."""
    half = torch.arange(2 * rank, 2 * rank + 2, dtype=torch.float32) + 10 * iteration + value
    shard = Shard({"master/w": half}, {"master/w": 2 * rank}, {"steps": iteration})
    return Snapshot(iteration, shard, {"ema/w": half / 2} if rank == 0 else {}, {"seconds": 1.5} if rank == 0 else {})


def save(root: Path, iteration: int, keep: int = 9) -> Path:
    """By two ranks, one after the other."""
    for rank in reversed(PAIR):
        write_part(snapshot(iteration, rank.rank), root, rank)
    folder = complete(root, iteration, PAIR[0], lambda: True)
    prune(root, keep)
    return folder


def loaded(root: Path) -> tuple[int, list[float]] | None:
    """The iteration, and the weight."""
    saved = load(root, ONE)
    return None if saved is None else (saved.iteration, saved.shards.read("master/w", 0, 4).tolist())


def of(iteration: int) -> tuple[int, list[float]]:
    return iteration, [10.0 * iteration + i for i in range(4)]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    root = tmp_path / "new"
    folder = save(root, 12)
    assert folder == root / "00012" and loaded(root) == of(12)
    saved = load(root, ONE)
    assert saved.state == {"seconds": 1.5} and saved.averages["ema/w"].tolist() == [60.0, 60.5]
    assert saved.shards.numbers == {"steps": 12}
    marker = json.loads((folder / MARKER).read_text())
    assert (marker["iteration"], marker["world_size"]) == (12, 2)
    assert marker["files"].keys() == {"rank_00000.safetensors", "rank_00001.safetensors", AVERAGES, STATE}
    assert names(folder) == sorted([*marker["files"], MARKER])
    check_files(folder)


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one", 3), save(tmp_path / "two", 3)
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {f.name: f.read_bytes() for f in two.iterdir()}


def test_nothing_there(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        assert latest_checkpoint(root) is None and load(root, ONE) is None


def killed_at(operation: int, act: Callable[[], Any]) -> bool:
    """Runs `act` in a fork that SIGKILL ends before its n-th file operation; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def hook(event: str, arguments: tuple) -> None:
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
            if (changes or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)) and next(count) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("first", [True, False])
def test_a_kill_at_any_file_operation_leaves_a_whole_one(first: bool, tmp_path: Path) -> None:
    seen = set()
    for operation in itertools.count():
        root = tmp_path / str(operation)
        if not first:
            save(root, 1)
        if not killed_at(operation, lambda root=root: save(root, 2, keep=1)):
            break
        found = loaded(root)
        assert found in ((None,) if first else (of(1),)) + (of(2),)
        seen.add(str(found))
        assert not list(root.glob("*.partial")) and not list(root.glob("*.removed")) if root.is_dir() else True
        save(root, 2, keep=1)
        assert loaded(root) == of(2) and names(root) == ["00002"]
    # Without an older one nothing comes after the rename.
    assert operation > 12 and len(seen) == (1 if first else 2)


def test_a_kill_while_an_iteration_is_saved_again_leaves_it_once(tmp_path: Path) -> None:
    """It is the only checkpoint there is."""
    for operation in itertools.count():
        root = tmp_path / str(operation)
        save(root, 2)
        if not killed_at(operation, lambda root=root: save(root, 2, keep=1)):
            break
        assert loaded(root) == of(2) and names(root) == ["00002"]
    assert operation > 12


def flip(file: Path, where: float) -> None:
    """One bit of a file, that far into it."""
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.safetensors", AVERAGES, STATE, MARKER])
def test_a_flipped_bit_sets_a_checkpoint_aside_and_the_older_one_is_taken(
    name: str, where: float, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / name, where)
    if name == MARKER and loaded(tmp_path) == of(2):
        return  # a bit of what is not read: the world size, or white space
    assert loaded(tmp_path) == of(1) and names(tmp_path) == ["00001", "00002.damaged"]
    if name != MARKER:
        said = capsys.readouterr().out
        assert f"a damaged checkpoint was set aside as {tmp_path / '00002.damaged'}: " in said and name in said
    # Again: the name is taken.
    flip(save(tmp_path, 2) / AVERAGES, 0.5)
    assert loaded(tmp_path) == of(1) and names(tmp_path) == ["00001", "00002.damaged", "00002.damaged2"]


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda folder: (folder / AVERAGES).write_bytes((folder / AVERAGES).read_bytes()[:-4]),
    "missing": lambda folder: (folder / "rank_00001.safetensors").unlink(),
    "empty marker": lambda folder: (folder / MARKER).write_text(""),
    "list": lambda folder: (folder / MARKER).write_text("[1]"),
    "deep": lambda folder: (folder / MARKER).write_text("[" * 100_000),
    "no UTF-8": lambda folder: (folder / MARKER).write_bytes(b"\xff{}"),
    "lies": lambda folder: (folder / MARKER).write_text('{"format": 2, "iteration": 2, "world_size": 0, "files": {}}'),
    "files of another kind": lambda folder: (folder / MARKER).write_text(
        '{"format": 2, "iteration": 2, "world_size": 1, "files": [1]}'
    ),
    "huge": lambda folder: (folder / MARKER).write_text('{"format": 2, "iteration": 2, "world_size": 1e400, "files": {}}'),
    "endless": lambda folder: (folder / MARKER).write_text(
        '{"format": 2, "iteration": 2, "world_size": 1000000000000000, "files": {}}'
    ),
    "many digits": lambda folder: (folder / MARKER).write_text('{"format": %s, "files": {}}' % ("9" * 5000)),
    "a key of an earlier release": lambda folder: (folder / MARKER).write_text(
        (folder / MARKER).read_text().replace("format", "fgrmat")
    ),
    "without marker": lambda folder: (folder / MARKER).unlink(),
    "renamed": lambda folder: folder.rename(folder.parent / "99999"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_of_every_kind_is_no_error_while_there_is_an_older_one(how: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    DAMAGE[how](save(tmp_path, 2))
    assert loaded(tmp_path) == of(1)


def test_a_file_that_was_put_beside_is_no_part_of_the_state(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    shutil.copy(folder / "rank_00000.safetensors", folder / "rank_00002.safetensors")
    flip(folder / "rank_00002.safetensors", 0.5)
    assert loaded(tmp_path) == of(2)


def test_where_none_is_whole_no_run_begins_afresh_beside_them(tmp_path: Path) -> None:
    flip(save(tmp_path, 2) / STATE, 0.5)
    for _ in range(2):
        with pytest.raises(ValueError, match="holds no checkpoint that is whole, only 00002.damaged; restore one, or"):
            load(tmp_path, ONE)
    shutil.rmtree(tmp_path / "00002.damaged")
    assert load(tmp_path, ONE) is None


def test_one_of_an_earlier_release_is_named(tmp_path: Path) -> None:
    (tmp_path / "00002").mkdir()
    (tmp_path / "00002" / MARKER).write_text('{"iteration": 2, "world_size": 1, "files": {"state.pt": 3}}')
    with pytest.raises(ValueError, match="00002 was written by an earlier release") as caught:
        load(tmp_path, ONE)
    assert not isinstance(caught.value, Damaged) and names(tmp_path) == ["00002"]


def test_latest_is_the_highest_complete(tmp_path: Path) -> None:
    for iteration in (99_999, 100_000, 2):
        save(tmp_path, iteration)
    for name in ("100001", "100002.partial", "notes", "100003.removed", "7"):
        (tmp_path / name).mkdir()
    for name in ("100002.partial", "100003.removed", "7"):
        (tmp_path / name / MARKER).write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "100000" and loaded(tmp_path) == of(100_000)
    # A folder gets its number when it is complete: one without the marker has lost it.
    assert names(tmp_path) == ["00002", "100000", "100001.damaged", "7", "99999", "notes"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_last_and_those_that_are_asked_for(keep: int, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for iteration in range(1, 6):
        save(tmp_path, iteration)
        prune(tmp_path, keep, but=[2])
    assert names(tmp_path) == [f"{i:05d}" for i in sorted({2, *range(6 - keep, 6)})] + ["notes"]


def test_the_same_iteration_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write_part(snapshot(1, value=5), tmp_path, ONE)
    complete(tmp_path, 1, ONE, lambda: True)
    assert load(tmp_path, ONE).averages["ema/w"].tolist() == [7.5, 8.0] and names(tmp_path) == ["00001"]


def test_without_a_part_nothing_is_complete(tmp_path: Path) -> None:
    write_part(snapshot(3), tmp_path, PAIR[0])
    with pytest.raises(GivenUp, match="rank 1 did not save its part of the state after iteration 3"):
        complete(tmp_path, 3, PAIR[0], lambda: True)
    assert names(tmp_path) == ["00003.partial"] and not is_complete(tmp_path, 3)
    discard(tmp_path, 3)
    assert names(tmp_path) == []


def test_the_parts_may_come_in_any_order_and_late(tmp_path: Path) -> None:
    savers = [Saver(tmp_path, rank, lambda snapshot: done.append(snapshot.iteration)) for rank in PAIR]
    done: list[int] = []
    savers[0].begin(snapshot(4))
    assert not savers[0].wait(0.0) or savers[0].busy
    threading.Timer(0.3, lambda: savers[1].begin(snapshot(4, rank=1))).start()
    assert savers[0].wait(None) and savers[0].error is None and done == [4]
    assert loaded(tmp_path) == of(4)


def test_a_rank_that_fails_lets_the_other_go_on(tmp_path: Path) -> None:
    saver = Saver(tmp_path, PAIR[0], lambda _: None)
    saver.begin(snapshot(4))
    saver.give_up()  # as when rank 1 has said that it could not
    assert isinstance(saver.error, GivenUp) and names(tmp_path) == []
    saver.begin(snapshot(5))
    write_part(snapshot(5, rank=1), tmp_path, PAIR[1])
    assert saver.wait(None) and saver.error is None and loaded(tmp_path) == of(5)


def test_the_last_one_waits_for_the_other_ranks_until_the_deadline(tmp_path: Path) -> None:
    savers = [Saver(tmp_path, rank, lambda _: None) for rank in PAIR]
    with pytest.raises(GivenUp, match="rank 0 did not complete"):
        savers[1].last(snapshot(6, rank=1), deadline=0.0)
    savers[0].last(snapshot(6), deadline=0.0)
    savers[1].last(snapshot(6, rank=1), deadline=0.0)  # it is there
    assert loaded(tmp_path) == of(6)


@pytest.mark.parametrize("where", ["shard", "averages", "record", "marker", "rename"])
def test_a_full_disk_is_told_and_leaves_the_older_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        if where == "marker":
            write_text = Path.write_text
            fails = lambda path, *a, **k: full() if path.name == MARKER else write_text(path, *a, **k)  # noqa: E731
            patch.setattr(Path, "write_text", fails)
        else:
            name = {"shard": "write_shard", "averages": "save_file", "record": "write_atomically"}.get(
                where, "move_into_place"
            )
            patch.setattr(checkpoint, name, full)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / '00002'}'"):
            save(tmp_path, 2)
        discard(tmp_path, 2)
    assert names(tmp_path) == ["00001"] and loaded(tmp_path) == of(1)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    for part in ("shard", "averages"):
        bad = snapshot(2)
        (bad.shard.tensors if part == "shard" else bad.averages)[{"shard": "master/w", "averages": "ema/w"}[part]][0] = (
            torch.nan
        )
        with pytest.raises(NotFinite, match="the state of (master|ema)/w is not finite in 1 of 2"):
            write_part(bad, tmp_path, ONE)
    assert names(tmp_path) == []
