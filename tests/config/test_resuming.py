"""What a run is, and what may change in it: places and cadences may, whatever a number hangs on may not."""

import inspect
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.helpers import ROOT
from support.keys import keys

from fastgrpo.callbacks import FolderLog
from fastgrpo.config.keys import Config
from fastgrpo.config.reading import dump_config
from fastgrpo.config.resuming import MAY_CHANGE
from fastgrpo.parts import Objects
from fastgrpo.reporting.run_folder import RunFolder, read_lines
from fastgrpo.rewards import REWARDS
from fastgrpo.validation import ConfigError, check_folder, load_config

CONFIG = ROOT / "configs" / "tiny_shapes_grpo.yaml"
REMOTE = "reward.settings={remote: {urls: [%s], timeout: %d, form: %s}}"


def configured(folder: Path, *overrides: str) -> Config:
    return load_config(CONFIG, ["reward.train=remote", REMOTE % ("http://a:1", 9, "raw"), *overrides, f"output={folder}"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has trained an iteration."""
    folder = tmp_path / "run"
    folder.mkdir()
    RunFolder(folder).config.write_text(dump_config(configured(folder)))
    RunFolder(folder).metrics.write_text('{"iteration": 1}\n')
    return folder


@pytest.mark.parametrize(
    "override",
    [
        "iterations=7", "model.path=/elsewhere/model", "prompts.train=/elsewhere/a.jsonl", "prompts.cache=/elsewhere/cache",
        "checkpoint.every=3", "checkpoint.keep=9", "evaluation.every=0", REMOTE % ("http://b:2", 5, "raw"),
    ],
)  # fmt: skip
def test_places_and_cadences_may_change(run: Path, override: str) -> None:
    check_folder(configured(run, override))


def test_the_folder_may_be_moved(run: Path) -> None:
    check_folder(configured(run.rename(run.with_name("elsewhere"))))


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("update.weight_decay=1e-6", "update.weight_decay: "),
        ("evaluation.images=50", "evaluation.images: "),
        ("evaluation.guidance_scale=3", "evaluation.guidance_scale: "),
        ("model.lora.rank=3", "model.lora.rank: "),
        ("model.tiny_decoder=/a/vae", "model.tiny_decoder: None -> /a/vae"),
        (REMOTE % ("http://a:1", 9, "png"), "reward.settings.remote.form: raw -> png"),
    ],
)
def test_a_change_of_what_is_computed_is_refused_with_the_way_out(run: Path, override: str, change: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_folder(configured(run, override, "checkpoint.every=3"))
    said = str(refusal.value)
    assert change in said and "checkpoint.every:" not in said and "remove" not in said
    assert said.index("give these keys their earlier values") < said.index("choose another folder with --set output=")


def test_a_checkpoint_counts_as_trained_too(run: Path) -> None:
    RunFolder(run).metrics.unlink()
    check_folder(configured(run, "seed=1"))
    (RunFolder(run).checkpoints / "00001").mkdir(parents=True)
    (RunFolder(run).checkpoints / "00001" / "COMPLETE").touch()
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        check_folder(configured(run, "seed=1"))


@pytest.mark.parametrize(("override", "kept"), [("seed=1", 0), ("checkpoint.every=3", 1)])
def test_a_run_that_trained_nothing_may_be_corrected(run: Path, override: str, kept: int) -> None:
    """Then its first evaluation is that of another run, and is made anew."""
    folder = RunFolder(run)
    folder.metrics.write_text("")
    folder.evaluations.write_text('{"iteration": 0, "accuracy": {"overall": 0.5}}\n')
    folder.samples_of(0).mkdir(parents=True)
    config = configured(run, override)
    check_folder(config)
    log, ranks = FolderLog(), SimpleNamespace(rank=0)
    parts = SimpleNamespace(prompts=None, held_out=None, inputs={}, changes=[])  # as the configuration says
    run = SimpleNamespace(config=config, ranks=ranks, objects=Objects(), parts=parts, iteration=0, rollout_form="eager")
    log.on_start(run)  # type: ignore[arg-type]
    assert len(read_lines(folder.evaluations)) == len(folder.sample_folders()) == kept
    assert load_config(folder.config) == config


def test_what_may_change_is_a_key_of_the_configuration_or_of_a_reward() -> None:
    known = {path for path, _ in keys(Config)}
    for name, place in REWARDS.items():
        module, _, attribute = place.partition(":")
        taken = inspect.signature(getattr(import_module(module), attribute)).parameters
        known |= {f"reward.settings.{name}.{key}" for key in taken}
    assert set(MAY_CHANGE) <= known


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for key in ("output", "prompts.cache"):
        with pytest.raises(ConfigError, match=rf"{key} = '.*file/a/b': .*/file is a file; name a folder"):
            check_folder(load_config(CONFIG, [f"output={tmp_path}", f"{key}={tmp_path}/file/a/b"]))
