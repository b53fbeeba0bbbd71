"""Whole or not at all: writers that fail, and writers that are killed at every step."""

import errno
import json
import math
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrpo.files import (
    atomic_file,
    json_text,
    json_value,
    move_into_place,
    remove_partial,
    write_atomically,
    writing_to,
)


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("old", "n\u00e9w"):
        write_atomically(path, text)
        assert path.read_bytes() == text.encode("utf-8") and only(tmp_path) == ["a.json"]


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(KeyError), atomic_file(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and only(tmp_path) == ["a.json"]


def test_what_the_system_refuses_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match=f"No space left on device: '{path}'") as caught, atomic_file(path) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")  # as `write` raises it, without a name
    assert caught.value.errno == errno.ENOSPC and only(tmp_path) == []


def full(*_: object, **__: object) -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_of_other_errors_the_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's error of a full disk says neither; where there is room it is none of the system's."""
    path = tmp_path / "not" / "there" / "a.pt"
    with pytest.raises(RuntimeError, match="unexpected pos 128 vs 0"), writing_to(path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=f"Disk quota exceeded: '{path}'"), writing_to(path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0")


def test_json_has_no_word_for_what_is_not_finite() -> None:
    value = {"norm": math.inf, "rows": [1, (math.nan, -math.inf)], "nested": {"a": 0.5, "b": True, "c": None, "d": "NaN"}}
    expected = {"norm": None, "rows": [1, [None, None]], "nested": {"a": 0.5, "b": True, "c": None, "d": "NaN"}}
    assert json.loads(json_text(value), parse_constant=pytest.fail) == expected


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(path: Path) -> None:
    with atomic_file(path) as partial:
        partial.write_text("half")
        kill()


def die_before(function: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        setattr(os, function, kill)
        write_atomically(path, "new")

    return write


@pytest.mark.parametrize("write", [die_while_writing, die_before("fsync"), die_before("replace")])
def test_a_killed_writer_leaves_what_was_there(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    child = os.fork()
    if child == 0:
        try:
            write(path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_text() == "old"
    left = [name for name in only(tmp_path) if name != "a.json"]
    assert len(left) == 1 and left[0].endswith(".partial")
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "file").touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "of another.partial").touch()
    remove_partial(tmp_path, tmp_path / "absent")
    assert only(tmp_path) == ["a.json", "below"] and only(tmp_path / "below") == ["of another.partial"]


def test_rows_that_are_read_share_their_keys() -> None:
    rows = [json_value('{"reward": 0.5, "seconds": {"update": 1}, "reward": 1}') for _ in range(2)]
    assert rows[0] == {"reward": 1, "seconds": {"update": 1}}
    assert all(one is other for one, other in zip(*rows, strict=True))


def test_everything_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder of a tree is flushed, then the tree renamed, then the list that holds its name flushed."""
    partial, final = tmp_path / "a.partial", tmp_path / "a"
    (partial / "deep" / "deeper").mkdir(parents=True)
    (partial / "deep" / "deeper" / "file").write_text("x")
    inodes = {path.stat().st_ino for path in (partial, *partial.rglob("*"))}
    events: list[int | str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: events.append("rename") or rename(*names))
    move_into_place(partial, final)
    assert set(events[:-2]) == inodes and events[-2:] == ["rename", tmp_path.stat().st_ino]
    assert (final / "deep" / "deeper" / "file").read_text() == "x" and only(tmp_path) == ["a"]
