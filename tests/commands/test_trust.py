"""`eval` of somebody else's run imports no code, and sends no token, that only the run names."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.helpers import ROOT

from fastgrpo.commands import evaluate
from fastgrpo.commands.cli import main
from fastgrpo.config.schema import ConfigError
from fastgrpo.validation import dump_config, load_config

CODE = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
score = lambda images, prompts, metadata: images
"""
SERVER = {"urls": ["http://10.0.0.9:8000"], "token_env": "SECRET"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run with a reward of its own beside it, evaluated up to where the model would be loaded."""

    def stop(*_: object) -> None:
        raise ConfigError("reached the model")

    monkeypatch.setattr(evaluate, "saved_model", stop)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # a pipe that says yes is nobody
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "brought_along.py").write_text(CODE)
    (run / "pytorch_lora_weights.safetensors").touch()
    write(run, "reward.eval=brought_along:score")
    yield run
    sys.modules.pop("brought_along", None)
    if str(run) in sys.path:
        sys.path.remove(str(run))


def write(run: Path, *overrides: str) -> None:
    config = load_config(ROOT / "configs" / "tiny_shapes.yaml", [f"output={run}", f"reward.folder={run}", *overrides])
    (run / "config.yaml").write_text(dump_config(config))


def said(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["eval", *arguments]) == 2
    return capsys.readouterr().err


def test_code_that_only_the_run_names_is_not_imported_unasked(run: Path, capsys: pytest.CaptureFixture) -> None:
    refusal = said(capsys, str(run))
    assert (
        f"{run}: its configuration has the reward 'brought_along:score', which is code" in refusal and "--trust" in refusal
    )
    assert not (run / "brought_along.ran").exists()
    assert "reached the model" in said(capsys, str(run), "--trust") and (run / "brought_along.ran").exists()


@pytest.mark.parametrize(
    ("answer", "imported"), [("y\n", True), ("yes\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_a_person_at_a_terminal_is_asked(
    answer: str, imported: bool, run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["eval", str(run)]) == 2
    assert "Do you trust whoever made it? [y/N]" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert (run / "brought_along.ran").exists() == imported


def test_a_reward_that_the_person_names_needs_no_asking(run: Path, capsys: pytest.CaptureFixture) -> None:
    for choice in (["--reward", "tiny_shapes"], ["--set", "reward.eval=tiny_shapes"]):
        assert "reached the model" in said(capsys, str(run), *choice)
    # It is looked for where the person is, not where the run says.
    assert "brought_along" in said(capsys, str(run), "--reward", "brought_along:score")
    assert not (run / "brought_along.ran").exists()
    Path("brought_along.py").write_text(CODE)
    assert "reached the model" in said(capsys, str(run), "--reward", "brought_along.py:score")
    assert Path("brought_along.ran").exists() and not (run / "brought_along.ran").exists()


def test_a_token_is_not_sent_to_a_server_that_only_the_run_names(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    write(run, "reward.eval=remote", f"reward.settings.remote={SERVER}")
    refusal = said(capsys, str(run))
    assert "sends the images, and the content of SECRET" in refusal and "http://10.0.0.9:8000" in refusal
    assert "hunter2" not in refusal and "hunter2" not in (run / "config.yaml").read_text()
    ours = 'reward.settings.remote.urls=["http://127.0.0.1:9"]'
    tried = said(capsys, str(run), "--set", ours, "--set", "reward.settings.remote.retries=-1")
    assert "retries = -1" in tried  # past the question, to the reward itself
