"""The console script: its help is quick and whole, its errors are one line, and the older doors open on the same rooms."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import ROOT, environment

from fastgrpo.commands import UNAVAILABLE, cli, report
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


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("a mistake"), 2, "error: a mistake"),
        (RewardUnavailable("it is gone"), UNAVAILABLE, "stopped: it is gone"),
    ],
)
def test_an_error_is_a_line_and_a_status(
    error: Exception, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(report, "run", fail)
    assert cli.main(["report", "folder"]) == status
    assert capsys.readouterr().err == text + "\n"


@pytest.mark.parametrize("error", [RuntimeError("a fault"), KeyError("another")])
def test_a_fault_of_the_program_itself_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(report, "run", fail)
    with pytest.raises(type(error)) as caught:
        cli.main(["report", "folder"])
    assert caught.value is error


@pytest.mark.processes
@pytest.mark.parametrize("door", DOORS)
def test_the_doors_lead_to_the_commands(door: str) -> None:
    command = [sys.executable, *DOORS[door], "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in {"train": ["--random-weights", "rollout.num_steps"], "make-prompts": ["--exclude"]}.get(door, ["--help"]):
        assert option in done.stdout


def test_report_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_terminal_without_a_prompts_script_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(report, "run", lambda arguments: print("café 猫") or 0)
    assert cli.main(["report", "nowhere"]) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == "café \\u732b\n".encode("latin-1")
