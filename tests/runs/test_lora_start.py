"""Runs that go on from a LoRA: iteration 0 is its own score, the KL holds to what is asked for, and they resume bitwise."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.runs import ForkServer, rows

from fastgrpo.validation import ConfigError, check_folder, load_config

pytestmark = pytest.mark.processes

QUICK = ["iterations=2", "checkpoint.every=1", "checkpoint.keep=9", "evaluation.every=0", "update.steps_per_rollout=1"]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """A run whose LoRA has an effect, with alpha = 2 rank."""
    folder = tmp_path_factory.mktemp("first") / "run"
    fork_server.train(folder, *QUICK, "update.learning_rate=3e-3", "update.ema_decay=0")
    return folder


@pytest.fixture(scope="module")
def further(first: Path, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """One that goes on from it and holds to it."""
    folder = tmp_path_factory.mktemp("further") / "run"
    fork_server.train(folder, *QUICK, f"model.lora={{path: {first}, reference: start, rank: 4, alpha: 8}}")
    return folder


def test_iteration_0_is_the_lora_that_was_handed_in(first: Path, further: Path) -> None:
    last, start = rows(first, "evaluations.jsonl")[-1], rows(further, "evaluations.jsonl")[0]
    assert (last["iteration"], start["iteration"]) == (2, 0) and start["accuracy"] == last["accuracy"]
    images = [sorted((run / "samples" / number).glob("*.png")) for run, number in ((first, "00002"), (further, "00000"))]
    assert len(images[0]) == 6 and [one.read_bytes() for one in images[0]] == [one.read_bytes() for one in images[1]]
    base = [one.read_bytes() for one in sorted((first / "samples" / "00000").glob("*.png"))]
    assert base != [one.read_bytes() for one in images[1]]


def test_the_kl_holds_to_the_start_or_to_the_base(
    first: Path, further: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    """Before the first step the policy is the start."""
    assert rows(further)[0]["kl"] == 0 and rows(further)[1]["kl"] > 0
    other = tmp_path / "run"
    fork_server.train(other, *QUICK, f"model.lora={{path: {first / LORA}, rank: 4, alpha: 8}}", "iterations=1")
    assert rows(other)[0]["kl"] > 0
    assert rows(other)[0]["reward"] == rows(further)[0]["reward"]


def test_it_resumes_bitwise_and_not_from_another_lora(
    first: Path, further: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    folder, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(further, folder)
    shutil.copytree(first, moved)
    shutil.rmtree(folder / "checkpoints" / "00002")
    (folder / "metrics.jsonl").write_text((further / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    start = f"model.lora={{path: {moved}, reference: start, rank: 4, alpha: 8}}"
    weights = load_file(moved / LORA)
    save_file({name: one * 1.01 for name, one in weights.items()}, moved / LORA)
    assert "another content of model.lora.path" in fork_server.train(folder, *QUICK, start, status=2)
    shutil.copy(first / LORA, moved / LORA)
    fork_server.train(folder, *QUICK, start)
    assert rows(folder) == rows(further)
    assert (folder / LORA).read_bytes() == (further / LORA).read_bytes()
    assert "model.lora.path" in json.loads((folder / "inputs.json").read_text())


def test_another_rank_is_refused_with_that_of_the_file(first: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    printed = fork_server.train(tmp_path / "run", *QUICK, f"model.lora={{path: {first}, rank: 3}}", status=2)
    assert f"model.lora.rank = 3: the LoRA at {first} has rank 4" in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.reference=start"], r"model\.lora\.reference = 'start': a new LoRA has no effect at first"),
        (["model.lora.path=/a/lora", "model.train=full"], r"model\.lora\.path = '/a/lora': model\.train = full"),
        (["model.lora.path=/a/lora", "model.lora.targets=[to_q]"], r"model\.lora\.targets = .*leave it out"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_lora_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("configs/sd3_geneval.yaml", overrides)


def test_a_run_does_not_write_over_the_lora_that_it_goes_on_from(tmp_path: Path) -> None:
    config = load_config("configs/sd3_geneval.yaml", [f"model.lora.path={tmp_path}/run/best", f"output={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"model\.lora\.path = .*the run would write over it: choose another output"):
        check_folder(config)
