"""Rewards of one's own: which module or file wins, where they are looked for, and what is said when there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import ROOT, environment

from fastgrpo.config.reading import dump_config, read_config
from fastgrpo.rewards import find_reward
from fastgrpo.validation import load_config

# A console script's process, which has not its working directory on the path: the folder and names -> what was found.
PROGRAM = """
import os, sys
from pathlib import Path
sys.path[:] = [place for place in sys.path if place not in ("", os.getcwd())]
from fastgrpo.rewards import find_reward
for name in sys.argv[2:]:
    try:
        print(find_reward(name, Path(sys.argv[1]))(0, 0, 0))
    except ValueError as error:
        print("refused:", error)
"""


def write(folder: Path, name: str, says: str, more: str = "") -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{more}\ndef score(images, prompts, metadata):\n    return {says}\n")


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """The working directory and the folder of the configuration."""
    here, beside = tmp_path / "here", tmp_path / "beside it"
    write(here, "mine_here.py", "'here'")
    write(here, "json.py", "'not the library'")
    write(here, "in_both.py", "'here'")
    write(beside, "in_both.py", "'beside'")
    write(beside, "mine_beside.py", "helper_beside.NAME", "import helper_beside")
    write(beside, "helper_beside.py", "0", "NAME = 'beside, with its helper'")
    write(beside, "deep/package/inner.py", "'a package'")
    write(beside, "broken.py", "0", "import no_such_library")
    write(beside, "faulty.py", "0", "x = 1 / 0")
    return here, beside


def found(here: Path, beside: Path, *names: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM, str(beside), *names]
    ended = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True, check=True)
    return ended.stdout.splitlines()


@pytest.mark.processes
def test_installed_modules_win_then_the_working_directory_then_the_folder_of_the_configuration(places) -> None:
    here, beside = places
    names = ["mine_here:score", "in_both:score", "mine_beside:score", "deep.package.inner:score", "json.py:score"]
    names += ["./in_both.py:score", str(beside / "in_both.py") + ":score", "deep/package/inner.py:score", "json:dumps"]
    *answers, last = found(here, beside, *names[:-1], "json:score")
    assert answers == [
        "here", "here", "beside, with its helper", "a package", "not the library", "here", "beside", "a package",
    ]  # fmt: skip
    assert last.startswith("refused: reward 'json:score':") and "json/__init__.py has no 'score'" in last
    assert "path/to/file.py:score" in last


@pytest.mark.processes
def test_what_is_missing_or_broken_is_told_with_the_places(places) -> None:
    here, beside = places
    names = ["nowhere:score", "nowhere.py:score", "broken:score", "faulty:score", "broken.py:score", "mine_here:other"]
    missing, no_file, broken, faulty, broken_file, other = found(here, beside, *names)
    assert f"among the installed packages and in {here} and {beside}. Install it, set PYTHONPATH, or name" in missing
    assert f"no such file; it was looked for in {here} and {beside}" in no_file
    assert "reward 'broken:score': No module named 'no_such_library'" in broken
    assert f"ZeroDivisionError: division by zero (at {beside}/faulty.py:1)" in faulty
    assert "No module named 'no_such_library'" in broken_file and f"{here}/mine_here.py has no 'other'" in other


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ValueError, match="reward 'math:pi': is a float, which cannot be called"):
        find_reward("math:pi")
    with pytest.raises(ValueError, match="reward 'colour': not one of tiny_shapes, .* module:function or file.py:function"):
        find_reward("colour")


def test_a_configuration_says_where_it_lies_if_it_names_a_reward_of_ones_own(tmp_path: Path) -> None:
    """So that the configuration which a run keeps finds it too; one without is as it was."""
    base, child = tmp_path / "base" / "a.yaml", tmp_path / "child" / "b.yaml"
    for file, text in (
        (base, f"extends: {ROOT}/configs/tiny_shapes.yaml\nreward: {{train: 'mine:score'}}\n"),
        (child, "extends: ../base/a.yaml\nseed: 3\n"),
    ):
        file.parent.mkdir()
        file.write_text(text)
    assert load_config(base).reward.folder == load_config(child).reward.folder == base.parent
    plain = ROOT / "configs" / "tiny_shapes.yaml"
    assert load_config(plain).reward.folder is None
    named = load_config(plain, ["reward.eval={'mine.py:score': 1, tiny_shapes: 1}"])
    assert named.reward.folder == plain.parent
    kept = tmp_path / "config.yaml"
    kept.write_text(dump_config(load_config(child)))
    assert read_config(kept).reward.folder == base.parent
