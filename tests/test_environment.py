"""The set-up of the tests and of their child processes: packages, devices, and the releases that go together."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment


def child(code: str, *paths: Path, **settings: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment(*paths, **settings), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_children_see_what_the_callers_path_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the project and what the test itself adds."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "carried"))
    for folder, names in {"carried": ("only_carried", "twice", "fastgrpo"), "given": ("twice",)}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.py").write_text("")
    code = "import only_carried, twice, fastgrpo as own; print(only_carried.__file__, twice.__file__, own.__file__)"
    only_carried, twice, own = (Path(place) for place in child(code, tmp_path / "given").split())
    assert only_carried.parent == tmp_path / "carried" and twice.parent == tmp_path / "given"
    assert own.is_relative_to(ROOT)


def test_children_are_no_ranks_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert child("import os; print(os.environ.keys() & {'RANK', 'TRITON_INTERPRET'}, os.environ['A'])", A="b") == "set() b\n"
