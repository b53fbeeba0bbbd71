"""The console script: its help is quick and whole, its errors are one line, and the older doors open on the same rooms."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.helpers import ROOT, environment

from fastgrpo.commands import UNAVAILABLE, cli, report
from fastgrpo.config.schema import ConfigError
from fastgrpo.data.prompts import load_prompts
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.reporting.saved_run import read_run
from fastgrpo.reporting.text import score_text
from fastgrpo.rewards import RewardUnavailable

DOORS = {
    "fastgrpo": ["-m", "fastgrpo"],
    "train": ["fastgrpo/train.py"],
    "report": ["-m", "fastgrpo.report"],
    "make-prompts": ["-m", "fastgrpo.rewards.make_prompts"],
}


@pytest.mark.processes
def test_help_lists_every_command_without_torch() -> None:
    code = """if True:
        import sys
        from fastgrpo.commands.cli import main
        try:
            main(["--help"])
        finally:
            assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^    (\S+)", done.stdout.split("positional arguments:")[1], re.MULTILINE)
    assert listed == list(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and f"usage: fastgrpo {name}" in printed
    assert re.search(rf"^ *fastgrpo {name} ", printed, re.MULTILINE), "no example"


def test_a_command_that_is_not_there_is_refused(capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["tran"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2 and "make-prompts" in capsys.readouterr().err


def refusal() -> None:
    raise ConfigError("seed = 3: no")


def no_reward() -> None:
    raise RewardUnavailable("it is gone")


@pytest.mark.parametrize(
    ("fail", "status", "text"),
    [
        (lambda: load_prompts(Path("none.txt")), 2, "error: none.txt: no such prompt file"),
        (lambda: read_run(Path("none")), 2, "error: none: not the folder of a run; it holds none of config.yaml, .*"),
        (refusal, 2, "error: seed = 3: no"),
        (no_reward, UNAVAILABLE, "stopped: it is gone"),
    ],
)
def test_what_a_user_is_refused_is_a_line_and_a_status(
    fail: Callable, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(report, "run", lambda _: fail())
    assert cli.main(["report", "folder"]) == status
    assert re.fullmatch(text + "\n", capsys.readouterr().err)


def a_users_own_mistake() -> None:
    raise ValueError("no refusal of this package")


@pytest.mark.parametrize(
    "fail",
    [
        a_users_own_mistake,
        lambda: score_text("3", percent=False),  # type: ignore[arg-type]  # Python's ValueError, in a line of this package
        lambda: Path("\0").stat(),
        lambda: json.loads("{"),
        lambda: cli.COMMANDS["none"],
        lambda: RunFolder(Path("none")).config.read_text(),
    ],
)
def test_a_fault_of_code_keeps_its_traceback(fail: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "run", lambda _: fail())
    with pytest.raises((ValueError, KeyError, OSError)):
        cli.main(["report", "folder"])


@pytest.mark.processes
@pytest.mark.parametrize("door", DOORS)
def test_the_doors_lead_to_the_commands(door: str) -> None:
    command = [sys.executable, *DOORS[door], "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in {"train": ["--random-weights", "rollout.num_steps"], "make-prompts": ["--exclude"]}.get(door, ["--help"]):
        assert option in done.stdout


def test_report_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_terminal_without_a_prompts_script_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(report, "run", lambda arguments: print("café 猫") or 0)
    assert cli.main(["report", "nowhere"]) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == "café \\u732b\n".encode("latin-1")


def test_an_error_is_one_line_whatever_it_quotes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A file from elsewhere must not write on the terminal."""

    def refuse(_: object) -> None:
        raise ConfigError("a\nb \x1b[31m \ud800 é " + "x" * 9000 + " the fix")

    monkeypatch.setattr(report, "run", refuse)
    assert cli.main(["report", "folder"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(r"error: a\nb \x1b[31m \ud800 é xxx") and shown.endswith(" the fix\n") and len(shown) < 2100
