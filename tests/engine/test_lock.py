"""One owner a folder: live ones are respected, dead ones are not, wherever they were."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from fastgrpo.engine import lock
from fastgrpo.engine.lock import held
from fastgrpo.validation import ConfigError


def test_a_second_owner_is_told_who_is_first(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with held(folder):
        owner = json.loads((folder / "lock.json").read_text())
        assert owner["process"] == os.getpid() and owner["host"] == os.uname().nodename
        with pytest.raises(ConfigError, match=f"^output = {folder}: in use by process {os.getpid()} on "), held(folder):
            pass
        assert json.loads((folder / "lock.json").read_text()) == owner
    assert list(folder.iterdir()) == []
    with held(folder):
        pass


def child_with(folder: Path) -> int:
    """A process that holds the folder until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            with held(folder):
                (folder / "ready").touch()
                time.sleep(60)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


def test_a_folder_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    child = child_with(tmp_path)
    with pytest.raises(ConfigError, match=f"in use by process {child} "), held(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with held(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()


def test_another_process_with_the_number_of_the_dead_one_is_no_owner(tmp_path: Path) -> None:
    with held(tmp_path):
        owner = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(owner | {"started": "1"}))
    with held(tmp_path):
        pass


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"machine": "another container"}])
def test_of_another_machine_only_the_signs_of_life_are_seen(other: dict, tmp_path: Path) -> None:
    with held(tmp_path):
        owner = json.loads((tmp_path / "lock.json").read_text())
    file = tmp_path / "lock.json"
    file.write_text(json.dumps(owner | other | {"process": 2**22 + 1}))
    for silent, free in ((lock.DEAD - 30, False), (lock.DEAD + 30, True)):
        os.utime(file, (time.time() - silent,) * 2)
        if free:
            with held(tmp_path):
                pass
        else:
            with pytest.raises(ConfigError, match="in use"), held(tmp_path):
                pass


def test_the_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with held(tmp_path):
        file = tmp_path / "lock.json"
        os.utime(file, (1, 1))
        deadline = time.monotonic() + 30
        while file.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_of_many_that_come_at_once_one_gets_it(tmp_path: Path) -> None:
    """Over the lock of a process that is gone, as after a crash of a whole job."""
    os.kill(child := child_with(tmp_path), signal.SIGKILL)
    os.waitpid(child, 0)
    start = time.time() + 0.3
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            status = 3
            try:
                time.sleep(max(0.0, start - time.time()))
                with held(tmp_path):
                    time.sleep(2)
                    status = 0
            except ConfigError:
                status = 2
            finally:
                os._exit(status)
        children.append(pid)
    assert sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children) == [0] + [2] * 7


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}"])
def test_a_file_that_names_nobody_is_nobodys(content: str, tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(content)
    with held(tmp_path):
        pass
