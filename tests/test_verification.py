"""`fastgrpo verify`: every kind of damage is named and counts, a good run has none, and nothing makes it raise."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.drawn_run import draw_run

from fastgrpo.commands import cli
from fastgrpo.engine import lock
from fastgrpo.verification import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_run(tmp_path_factory.mktemp("verify") / "run")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def printed(folder: Path, capsys: pytest.CaptureFixture, status: int) -> list[str]:
    """The lines that tell of a fault."""
    assert cli.main(["verify", str(folder)]) == status
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAULT")]


def test_a_good_run_has_no_fault_and_nothing_is_changed(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert printed(run, capsys, 0) == []
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def drop_line(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


def in_its_place(path: Path) -> Path:
    """Removes what is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path


CHECKPOINT = "checkpoints/00004"
FLIPPED = (
    f"{CHECKPOINT}/rank_00000.safetensors", f"{CHECKPOINT}/rank_00001.safetensors", f"{CHECKPOINT}/averages.safetensors",
    f"{CHECKPOINT}/state.json", "checkpoints/00002/state.json", "weights.safetensors", "best/weights.safetensors",
    "prompts_train.jsonl",
)  # fmt: skip
GARBAGE = (
    "config.yaml", "metrics.jsonl", "evaluations.jsonl", "faults.jsonl", "inputs.json", "summary.json", "trained.json",
    "best/trained.json", "samples/prompts.json", "prompts_eval.jsonl", f"{CHECKPOINT}/COMPLETE", f"{CHECKPOINT}/state.json",
)  # fmt: skip
ODD: dict[str, bytes] = {
    "not UTF-8": b"\xff\xfe\x00{", "empty": b"", "deep": b"[" * 100_000, "many digits": b'{"iteration": %s}' % (b"9" * 5000),
    "number": b"5", "list of lists": b"[[1]]", "half a character": b'{"files": {"\\ud800": "\\ud800"}}',
    "long name": b'{"files": {"%s": "a"}}' % (b"x" * 5000), "huge": b'{"files": {"a": 1e400}, "world_size": 1e18}',
}  # fmt: skip
MAPPINGS = ("half a character", "long name", "huge")


@pytest.mark.parametrize("name", FLIPPED)
def test_a_flipped_bit_is_named(name: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    flip(run / name)
    faults = printed(run, capsys, 1)  # where the newest checkpoint is damaged, the weights that are handed out fit none
    assert name.rpartition("/")[2] in faults[0] and len(faults) <= 2


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_named_whatever_it_is(name: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    for kind, content in ODD.items():
        good = {"faults.jsonl": ("empty",), "summary.json": MAPPINGS, "samples/prompts.json": ("list of lists",)}
        if kind in good.get(name, ()):
            continue
        (run / name).write_bytes(content)
        faults = printed(run, capsys, 1)
        named = {"trained.json": "trained weights", "best/trained.json": "best/trained weights"}.get(name, name)
        place = CHECKPOINT if name.startswith("checkpoints") else named
        assert any(place in fault for fault in faults), (kind, faults)
        assert all(fault.isprintable() for fault in faults)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config cut": (lambda run: (run / "config.yaml").write_text("rollout: {num_st"), "config.yaml"),
    "metrics emptied": (lambda run: (run / "metrics.jsonl").write_text(""), "no line of iterations 1, 2, 3, 4"),
    "metrics missing": (lambda run: (run / "metrics.jsonl").unlink(), "no line of iterations 1, 2, 3, 4"),
    "line missing": (lambda run: drop_line(run / "metrics.jsonl"), "metrics.jsonl         no line of iteration 1"),
    "half a line": (lambda run: (run / "metrics.jsonl").open("a").write('{"iter'), "line 5 cannot be read"),
    "base missing": (lambda run: drop_line(run / "evaluations.jsonl"), "evaluations.jsonl     no line of iteration 0"),
    "file missing": (lambda run: (run / CHECKPOINT / "state.json").unlink(), "state.json is missing"),
    "marker missing": (lambda run: (run / CHECKPOINT / "COMPLETE").unlink(), "COMPLETE does not describe this checkpoint"),
    "weights missing": (lambda run: (run / "weights.safetensors").unlink(), "weights.safetensors is not what was written"),
    "weights of another iteration": (
        lambda run: shutil.copy(run / "best" / "trained.json", run / "trained.json"), "of iteration 2, and should be of 4"
    ),
    "best of another iteration": (
        lambda run: shutil.copy(run / "trained.json", run / "best" / "trained.json"), "of iteration 4, and should be of 2"
    ),
    "no hash": (
        lambda run: (run / "trained.json").write_text('{"iteration": 4, "files": {"gone.safetensors": null}}'),
        "gone.safetensors is not what was written",
    ),
    "unfinished": (lambda run: (run / "checkpoints" / "00005.partial").mkdir(), "checkpoints/00005.partial  unfinished"),
    "left over": (lambda run: (run / "config.yaml.a.1.partial").touch(), "config.yaml.a.1.partial  unfinished"),
    "set aside": (lambda run: (run / CHECKPOINT).rename(run / f"{CHECKPOINT}.damaged2"), "00004.damaged2  set aside"),
    "none": (lambda run: shutil.rmtree(run / "checkpoints"), "there is none that is whole"),
    "a file in its place": (lambda run: in_its_place(run / "checkpoints").touch(), "there is none that is whole"),
    "a folder in its place": (lambda run: in_its_place(run / "inputs.json").mkdir(), "inputs.json"),
    "a line's end in a name": (
        lambda run: (run / "trained.json").write_text('{"iteration": 4, "files": {"a\\nok": "0"}}'), "a\\nok is not what"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named(how: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    act, words = DAMAGE[how]
    act(run)
    faults = printed(run, capsys, 1)
    assert any(words in fault for fault in faults), faults


def test_what_a_living_run_is_writing_is_no_fault(run: Path) -> None:
    (run / "checkpoints" / "00005.partial").mkdir()
    with lock.held(run):
        found = {finding.what: finding for finding in verify(run)}
    assert found["checkpoints/00005.partial"].about == "a process that trains here writes it"
    assert not any(finding.fault for finding in found.values())
    (run / lock.LOCK).write_text(json.dumps({"host": os.uname().nodename, "process": 1, "machine": "another"}))
    os.utime(run / lock.LOCK, (0, 0))
    assert any(finding.fault for finding in verify(run))


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "not the folder of a run: it holds no config.yaml" in capsys.readouterr().err
