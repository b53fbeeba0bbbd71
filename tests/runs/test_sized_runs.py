"""Runs over several sizes and evaluations at another one: resumed, on two ranks, and as the commands see them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.helpers import ROOT
from support.runs import ForkServer, rows

from fastgrpo.config.schema import ConfigError
from fastgrpo.config.sizes import Size, iteration_size
from fastgrpo.learning.objectives import effective_clip_range
from fastgrpo.learning.updater import Updater
from fastgrpo.parts import Objects, Parts
from fastgrpo.policy import sized
from fastgrpo.validation import load_config

CONFIG = ROOT / "configs" / "tiny_shapes_grpo.yaml"
SIZES = [
    "rollout.sizes=[[32, 32], {height: 16, width: 32}, [32, 24]]", "evaluation.height=24", "evaluation.every=0",
    "evaluation.images=6", "reward.train=jpeg_compressibility", "reward.eval=jpeg_compressibility", "checkpoint.every=1",
    "checkpoint.keep=9", "update.steps_per_rollout=1",
]  # fmt: skip
# What an update's sums over ranks may round; all else comes from rollouts.
ROUNDED = ("grad_norm", "weight_change", "drift", "kl", "loss", "policy")
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> tuple[Path, str]:
    """Five iterations of one process over three sizes, and what it printed."""
    folder = tmp_path_factory.mktemp("sizes") / "run"
    return folder, fork_server.train(folder, *SIZES, "iterations=5")


@pytest.fixture(scope="module")
def stopped(undisturbed: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy as if the run had ended after its third iteration."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(undisturbed[0], folder)
    for iteration in (4, 5):
        shutil.rmtree(folder / "checkpoints" / f"{iteration:05d}")
    for file, kept in (("metrics.jsonl", 3), ("evaluations.jsonl", 1)):
        (folder / file).write_text("".join((folder / file).read_text().splitlines(keepends=True)[:kept]))
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.processes
def test_every_iteration_has_its_size_and_says_so(undisturbed: tuple[Path, str]) -> None:
    folder, printed = undisturbed
    config, found = load_config(folder / "config.yaml"), rows(folder)
    sizes = [(row["height"], row["width"]) for row in found]
    assert sizes == [iteration_size(config, i)[:2] for i in range(1, 6)] and len(set(sizes)) == 3
    assert all(row["first_ratio_deviation"] == 0 and row["image_spread"] > 0 for row in found)
    assert not (folder / "faults.jsonl").exists()
    assert f"{sizes[-1][0]}x{sizes[-1][1]} reward" in printed
    report = (folder / "report.html").read_text()
    assert all(f"<th>{height} x {width}</th>" in report for height, width in sizes)


@pytest.mark.processes
def test_evaluations_draw_at_their_own_size(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    pictures = list(folder.glob("samples/*/*.png"))
    assert pictures and {Image.open(file).size for file in pictures} == {(32, 24)}  # width is the model's own


@pytest.mark.processes
def test_a_run_goes_on_bitwise(
    undisturbed: tuple[Path, str], stopped: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    fork_server.train(folder, *SIZES, "iterations=5")
    whole = undisturbed[0]
    assert rows(folder) == rows(whole) and rows(folder, "evaluations.jsonl") == rows(whole, "evaluations.jsonl")
    assert (folder / LORA).read_bytes() == (whole / LORA).read_bytes()


@pytest.mark.processes
def test_two_ranks_go_on_with_the_same_sizes_and_images(
    undisturbed: tuple[Path, str], stopped: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    fork_server.train(folder, *SIZES, "iterations=5", ranks=2)
    expected, found = rows(undisturbed[0]), rows(folder)
    assert [(row["height"], row["width"]) for row in found] == [(row["height"], row["width"]) for row in expected]
    for key, value in expected[3].items():
        assert found[3][key] == (pytest.approx(value, rel=1e-5, abs=1e-9) if key in ROUNDED else value), key


@pytest.mark.processes
def test_eval_and_sample_draw_at_the_size_of_an_evaluation(
    undisturbed: tuple[Path, str], tmp_path: Path, fork_server: ForkServer
) -> None:
    """That of the run, another by --set, and none that the model cannot make."""
    folder, _ = undisturbed
    scored = []
    for settings in ([], ["--set", "evaluation.height=16", "--set", "evaluation.width=16"]):
        printed = fork_server.run("eval", str(folder), *settings)
        scored.append(json.loads(next(line for line in printed.splitlines() if line.startswith("{")))["accuracy"])
    assert scored[0] == rows(folder, "evaluations.jsonl")[-1]["accuracy"] != scored[1]
    picture = tmp_path / "picture.png"
    one = ["--prompt", "a red circle", "--images", "1", "--output", str(picture)]
    for settings, (height, width) in (([], (24, 32)), (["--set", "evaluation.width=16"], (24, 16))):
        fork_server.run("sample", str(folder), *one, *settings)
        enlarged = 128 // max(height, width)  # a sheet with room for two, and gaps of two pixels
        assert Image.open(picture).size == ((2 * width + 6) * enlarged, (height + 4) * enlarged)
    refused = fork_server.run("sample", str(folder), *one, "--set", "evaluation.height=40", status=2)
    assert "evaluation.height = 40" in refused and "this model's positions end at 32; take at most that" in refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["rollout.sizes=[[32, 32], [20, 32]]"], r"sizes\[1\] = 20x32, in place of .*height = 20: must be a multiple of 8"),
        (["rollout.sizes=[[32, 64]]"], r"rollout\.sizes\[0\] = 32x64, .*width = 64: this model's positions end at 32"),
        (["rollout.sizes=[{height: 32, width: 32, num_frames: 9}]"], r"sizes\[0\] = 32x32x9.*num_frames = 9: SD3 has no"),
        (["evaluation.width=12"], r"evaluation\.width = 12, in place of the model's own size: model\.width = 12: must be a"),
    ],
)  # fmt: skip
def test_sizes_that_the_model_cannot_make_are_refused_before_anything_runs(
    settings: list[str], said: str, tmp_path: Path
) -> None:
    config = load_config(CONFIG, [*settings, f"output={tmp_path / 'run'}", "reward.train=jpeg_compressibility"])
    with pytest.raises(ConfigError, match=said):
        Parts.of(config, torch.device("cpu"), Objects())
    assert not (tmp_path / "run").exists()


class OneSize:
    """A model object of a user's own, with everything but `sized`."""

    def __init__(self, model) -> None:
        self._model = model

    def __getattr__(self, name: str):
        if name == "sized":
            raise AttributeError(name)
        return getattr(self._model, name)


def test_an_object_of_ones_own_without_sized_runs_at_its_own_size_alone(tiny_model, tmp_path: Path) -> None:
    objects = Objects(model=OneSize(tiny_model))
    for settings in (["rollout.sizes=[[32, 32]]"], ["evaluation.height=16"]):
        config = load_config(CONFIG, [*settings, f"output={tmp_path}", "reward.train=jpeg_compressibility"])
        with pytest.raises(
            ConfigError, match=r"(rollout\.sizes\[0\] = 32x32|evaluation\.height = 16): OneSize has no method `sized`"
        ):
            Parts.of(config, torch.device("cpu"), objects)
    config = load_config(CONFIG, [f"output={tmp_path}", "reward.train=jpeg_compressibility"])
    assert Parts.of(config, torch.device("cpu"), objects).model is objects.model
    with sized(objects.model, Size()):
        assert objects.model.size == tiny_model.size


def test_the_clip_range_follows_the_size_of_a_latent(tuned_model) -> None:
    """It is quoted for 65,536 elements; a latent of a quarter of another's spreads the ratio twice as much."""
    config = load_config(CONFIG, ["objective.clip_range=1e-4", "forward.old_policy.limit=0", "objective.name=clip"])
    updater, found = Updater(config, tuned_model, engine=None), {}  # type: ignore[arg-type]
    for size in (Size(32, 32), Size(16, 16), Size(32, 32), Size(16, 32)):
        with sized(tuned_model, size):
            found[size] = updater.learner.objective.keywords["clip_range"]
            assert found[size] == effective_clip_range(1e-4, torch.Size(tuned_model.latent_shape).numel())
    assert found[Size(16, 16)] == pytest.approx(2 * found[Size(32, 32)]) and len(updater.learners) == 3
