"""Checkpoints beside the training, the best one, and runs without a copy in memory: whole runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import CONFIG, ForkServer, options, rows

from fastgrpo.engine.checkpoint import Snapshot
from fastgrpo.engine.ranks import OneRank
from fastgrpo.engine.shards import Shard
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.saving import Saving
from fastgrpo.trained_files import weights_hash
from fastgrpo.validation import load_config

pytestmark = pytest.mark.processes

WORKER = "support.saving_worker:main"
QUICK = [
    "evaluation.every=0", "evaluation.images=6", "evaluation.images_between=6", "evaluation.samples=0",
    "reward.eval=jpeg_compressibility", "update.steps_per_rollout=1",
]  # fmt: skip


def disturbed(server: ForkServer, folder: Path, settings: dict, *overrides: str, ranks: int = 0, status: int = 0) -> str:
    arguments = [json.dumps(settings), *options(folder, *QUICK, *overrides)]
    return server.run(*arguments, program=WORKER, ranks=ranks, status=status)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def best(folder: Path) -> int:
    """The iteration that best/ says to be of; its weights must be those of that iteration's checkpoint."""
    record = json.loads((folder / "best" / "trained.json").read_text())
    averages = load_file(folder / "checkpoints" / f"{record['iteration']:05d}" / "averages.safetensors")
    prefix = "ema/transformer."
    weights = {name.removeprefix(prefix): value for name, value in averages.items() if name.startswith(prefix)}
    assert record["weights"] == weights_hash(weights)
    return record["iteration"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    ranks: int, tmp_path: Path, fork_server: ForkServer
) -> None:
    """The first is not written before the second is to be begun; callbacks hear of each once, on every rank."""
    printed = disturbed(fork_server, tmp_path, {"slow": True}, "checkpoint.every=2", ranks=ranks)
    expected = "iterate 1; iterate 2; begin 2; iterate 3; iterate 4; begin 4; write 2; told 2; write 4; told 4"
    told = sorted(line for line in printed.splitlines() if line.startswith("rank "))
    assert told == [f"rank {rank}: {expected}" for rank in range(ranks)]
    assert checkpoints(tmp_path) == ["00002", "00004"]


BEST = ["checkpoint.keep_best=true", "checkpoint.every=1000", "checkpoint.keep=1", "evaluation.every=1"]
SCORES = {"scores": [0.1, 0.5, 0.9, 0.2, 0.3]}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """A run whose second evaluation is its best."""
    folder = tmp_path_factory.mktemp("best") / "run"
    disturbed(fork_server, folder, SCORES, *BEST)
    return folder


def test_the_best_checkpoint_outlives_later_ones_and_its_weights_lie_apart(kept: Path) -> None:
    assert best(kept) == 2 and checkpoints(kept) == ["00002", "00004"]
    assert json.loads((kept / "trained.json").read_text())["iteration"] == 4
    assert (kept / "best" / "pytorch_lora_weights.safetensors").is_file()


def test_a_kill_between_the_best_checkpoint_and_its_weights_loses_nothing(
    kept: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    disturbed(fork_server, tmp_path, SCORES | {"kill": 2}, *BEST, status=-9)
    assert checkpoints(tmp_path) == ["00001", "00002"] and best(tmp_path) == 1
    disturbed(fork_server, tmp_path, SCORES, *BEST)
    assert best(tmp_path) == 2 and checkpoints(tmp_path) == checkpoints(kept)
    assert rows(tmp_path) == rows(kept) and rows(tmp_path, "evaluations.jsonl") == rows(kept, "evaluations.jsonl")


def test_a_finished_run_keeps_its_last_evaluation_as_its_best_once(tmp_path: Path, fork_server: ForkServer) -> None:
    """Ended between the last iteration and its evaluation, gone on with, and begun once more when all is done."""
    disturbed(fork_server, tmp_path, {"scores": [0.1, 0.2]}, *BEST, "iterations=2", status=1)  # there is no third score
    assert checkpoints(tmp_path) == ["00001", "00002"] and best(tmp_path) == 1
    written = []
    for _ in range(2):
        disturbed(fork_server, tmp_path, {"scores": [0.1, 0.2, 0.3]}, *BEST, "iterations=2")
        assert checkpoints(tmp_path) == ["00002"] and best(tmp_path) == 2
        written.append((tmp_path / "checkpoints" / "00002" / "COMPLETE").stat().st_mtime_ns)
    assert written[0] == written[1]


def test_a_later_evaluation_does_not_cost_the_best_checkpoint_that_is_there(tmp_path: Path) -> None:
    """A checkpoint is written beside the training: the next evaluation may be on record before it is pruned."""
    config = load_config(CONFIG, [f"output={tmp_path}", "checkpoint.keep_best=true", "checkpoint.keep=1"])
    model: Any = SimpleNamespace(save_trained=lambda folder, weights: (folder / "weights").write_text(repr(weights)))
    engine: Any = None
    saving = Saving(config, OneRank(), engine, model, {})
    lines = RunFolder(tmp_path).evaluations
    for iteration, scores in ((1, [0.5]), (2, [0.5, 0.2, 0.9])):
        lines.write_text("".join(f'{{"iteration": {i}, "accuracy": {{"overall": {x}}}}}\n' for i, x in enumerate(scores, 1)))
        shard = Shard({"master/w": torch.ones(1)}, {"master/w": 0}, {})
        saving.newest = Snapshot(iteration, shard, {"ema/transformer.w": torch.full((1,), float(iteration))}, {})
        saving.begin()
        assert saving.settle(wait=True)
    assert checkpoints(tmp_path) == ["00001", "00002"] and best(tmp_path) == 1


def test_without_a_copy_in_memory_an_ending_leaves_the_last_checkpoint(tmp_path: Path, fork_server: ForkServer) -> None:
    failing = "support.failing_rewards:Failing"
    settings = json.dumps({failing: {"kind": "error", "calls": 12}})  # of 4 images each: it fails in the fourth iteration
    overrides = ["checkpoint.in_memory=false", f"reward.train={failing}", f"reward.settings={settings}"]
    printed = fork_server.train(tmp_path, *QUICK, *overrides, status=70)
    assert "the state after iteration 2 is saved" in printed and len(rows(tmp_path)) == 3
    assert checkpoints(tmp_path) == ["00002"]
