"""What is typed after a command: numbers as in a configuration, places that are there, one line before the work."""

import json
from pathlib import Path

import pytest
from support.helpers import ROOT

from fastgrpo.commands import saved_model
from fastgrpo.commands.arguments import check_file
from fastgrpo.commands.cli import main
from fastgrpo.config.reading import dump_config
from fastgrpo.validation import ConfigError, load_config

CONFIG = str(ROOT / "configs" / "tiny_shapes_grpo.yaml")
PLAN = ("plan", "--config", CONFIG)
BENCH = ("bench", "--config", CONFIG)
PROMPTS = ("make-prompts", "ocr", "--output", "a.jsonl", "--count")
SERVE = ("serve-reward", "--reward", "tiny_shapes")
SAMPLE = ("sample", "run", "--prompt", "a cat")


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The last line of what a refused command says; nothing before it is a traceback or a result."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert status == 2 and not said.out and "Traceback" not in said.err
    return said.err.splitlines()[-1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run before its first checkpoint. No model may be loaded."""
    monkeypatch.setattr(saved_model, "configured_model", lambda *_: pytest.fail("a model is loaded"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(load_config(CONFIG, [f"output={folder}"])))
    return folder


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (PLAN, "--mfu"), (PLAN, "--peak"), (PLAN, "--gpus"), (BENCH, "--rounds"), (BENCH, "--batches"),
        (PROMPTS[:-1], "--count"), (SERVE, "--port"), (SERVE, "--max-images"), (SERVE, "--max-bytes"),
        (SERVE, "--max-waiting"), (SERVE, "--max-connections"), (SERVE, "--body-seconds"), (SERVE, "--shutdown-seconds"),
        (SAMPLE, "--guidance"), (SAMPLE, "--steps"), (SAMPLE, "--images"), (("eval", "run"), "--guidance"),
        (("eval", "run"), "--images"), (BENCH, "--iterations"), (SAMPLE, "--seed"), (("eval", "run"), "--seed"),
        ((*PROMPTS, "1"), "--seed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["-1", "inf", ".inf", "nan", ".nan", "1e400", "1_0", "true", "", "99999999999999999999"])
def test_a_number_is_a_finite_one_within_bounds(command: tuple, option: str, value: str, capsys) -> None:
    assert f"error: argument {option}: " in refused(capsys, *command, f"{option}={value}")


def test_a_seed_may_have_63_bits(run: Path, capsys: pytest.CaptureFixture) -> None:
    for option in ("--seed=9223372036854775807", "--seed=0"):
        assert "holds no trained weights" in refused(capsys, "eval", str(run), option)
    for seed in ("9223372036854775808", "18446744073709551616", "-1"):
        assert f"{seed}: must be at" in refused(capsys, "eval", str(run), f"--seed={seed}")


@pytest.mark.parametrize("command", [("eval",), ("sample", "--prompt", "a cat"), ("report",)])
def test_what_is_no_run_is_said_before_the_work(command: tuple, run: Path, capsys: pytest.CaptureFixture) -> None:
    name, *options = command
    for place in (run.parent / "nothing", run.parent):
        assert f"{place}: not the folder of a run" in refused(capsys, name, str(place), *options)
    if name != "report":
        assert "holds no trained weights" in refused(capsys, name, str(run), *options)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("no/such/a.png", "there is no folder"),
        ("a", "no suffix is no kind of picture; take .png"),
        ("a.jsonl", ".jsonl is no kind of picture; take .png"),
        ("folder.png", "is a folder"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_work(output, message, run: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(run)
    (run / "folder.png").mkdir()
    assert f"error: --output {output}: " in (said := refused(capsys, *SAMPLE, "--output", output)) and message in said
    if "picture" not in message:
        assert message in refused(capsys, "make-prompts", "ocr", "--count", "3", "--output", output)
        assert message in refused(capsys, *BENCH, "--json", output)


def test_inputs_that_are_not_there_are_said_before_the_work(run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "pytorch_lora_weights.safetensors").touch()
    assert "none.txt: no such prompt file" in refused(capsys, "eval", str(run), "--prompts", "none.txt")
    assert "--input a.png: sd3 reads no image" in refused(capsys, "sample", str(run), "--prompt", "a", "--input", "a.png")
    edits = ("sample", str(run), "--prompt", "a", "--set", "model.name=flux_kontext")
    assert "give one with --input" in refused(capsys, *edits)
    assert "--input a.png: no such file" in refused(capsys, *edits, "--input", "a.png")
    assert "no such configuration file" in refused(capsys, "train", "--config", str(run))


def test_set_takes_what_the_command_reads(run: Path, capsys: pytest.CaptureFixture) -> None:
    for command in (("eval", str(run)), ("sample", str(run), "--prompt", "a cat")):
        said = refused(capsys, *command, "--set", "update.learning_rate=1")
        assert "--set update.learning_rate=1: " in said and "does not read this key; it reads model, " in said
        assert "unknown key" in refused(capsys, *command, "--set", "model.hight=8", "--base")
        assert "holds no trained weights" in refused(capsys, *command, "--set", "evaluation.num_steps=3")


def test_a_moved_run_finds_the_prompts_in_its_folder(run: Path) -> None:
    """Those that a program handed in; those of a file lie where they were."""
    given = load_config(CONFIG, [f"output={run}", f"prompts.eval={run}/prompts_eval.jsonl"])
    (run / "config.yaml").write_text(dump_config(given, run))
    moved = run.rename(run.with_name("moved"))
    assert saved_model.saved_config(moved, base=True).prompts.eval == moved / "prompts_eval.jsonl"
    (moved / "config.yaml").write_text(dump_config(load_config(CONFIG, [f"output={run}"])))
    assert saved_model.saved_config(moved, base=True).prompts == load_config(CONFIG).prompts


def test_home_is_known_on_the_command_line(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    assert f"{run}: holds no trained weights" in refused(capsys, "eval", "~/run")
    assert main(["make-prompts", "ocr", "--count", "3", "--output", "~/a.jsonl"]) == 0
    assert len([json.loads(line) for line in (run.parent / "a.jsonl").read_text().splitlines()]) == 3


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("counting=²", "--mix counting = '²': expected float"),
        ("counting=.inf", "--mix counting = inf: must be a finite number"),
        ("counting=-1", "--mix counting = -1.0: must be at least 0"),
        ("counting=1,counting=2", "counting stands twice"),
    ],
)
def test_shares_are_numbers_that_stand_once(mix: str, message: str, tmp_path: Path, capsys) -> None:
    command = ("make-prompts", "geneval", "--count", "3", "--output", str(tmp_path / "a.jsonl"), "--mix", mix)
    assert message in refused(capsys, *command)


def test_a_device_is_not_replaced_by_a_file() -> None:
    with pytest.raises(ConfigError, match="--output /dev/null: is a device or a pipe; name a file"):
        check_file("--output", Path("/dev/null"))
