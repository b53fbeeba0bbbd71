"""Numbers that go wrong in a run, and runs that learn nothing: what is skipped, recorded, ended and said."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import ForkServer, options, rows

pytestmark = pytest.mark.processes

RARE = ["checkpoint.every=1000", "evaluation.every=0", "evaluation.images=6", "evaluation.samples=0"]


def faulty(fork_server: ForkServer, kind: str, folder: Path, *settings: str, ranks: int = 0, status: int = 0) -> str:
    arguments = ["train", *options(folder, *RARE, *settings)]
    return fork_server.run(kind, *arguments, program="support.faulty_runs:main", ranks=ranks, status=status)


def test_a_bad_update_is_skipped_on_every_rank_and_recorded(tmp_path: Path, fork_server: ForkServer) -> None:
    """An infinite loss on one of two ranks, with a finite gradient: neither may take the step."""
    printed = faulty(fork_server, "infinite_loss", tmp_path, "iterations=3", ranks=2)
    (fault,) = rows(tmp_path, "faults.jsonl")
    assert (fault["iteration"], fault["update"], fault["tensor"], fault["count"]) == (2, 1, "loss", 1)
    assert 0 < len(fault["prompts"]) == fault["num_prompts"] <= 4
    assert "warning: iteration 2: update 1: not finite: 1 forward passes of the loss (prompts: " in printed
    assert printed.count("the update is skipped, 1 in a row") == 1  # on rank 0 alone
    found = rows(tmp_path)
    assert [row["bad_updates"] for row in found] == [0, 1, 0] and [row["skipped_steps"] for row in found] == [0, 1, 1]
    assert found[1]["loss"] is None and found[2]["loss"] is not None and found[2]["weight_change"] > 0
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


def test_a_sample_that_is_not_finite_is_left_out(tmp_path: Path, fork_server: ForkServer) -> None:
    printed = faulty(fork_server, "lost_velocity", tmp_path, "iterations=3")
    (fault,) = rows(tmp_path, "faults.jsonl")
    assert (fault["iteration"], fault["update"], fault["tensor"], fault["num_prompts"]) == (2, None, "velocities", 1)
    assert f"of the velocities (prompts: {fault['prompts'][0]!r}); 1 of 16 samples are left out" in printed
    found = rows(tmp_path)
    assert [row["bad_samples"] for row in found] == [0, 1, 0] and [row["skipped_steps"] for row in found] == [0, 0, 0]
    assert all(row["grad_norm"] is not None and row["loss"] is not None for row in found)


def test_a_weight_that_is_not_finite_ends_the_run_and_is_written_nowhere(tmp_path: Path, fork_server: ForkServer) -> None:
    printed = faulty(fork_server, "infinite_weight", tmp_path, "iterations=3", status=65)
    assert (
        "error: iteration 2: not finite: 1 numbers of the weights of transformer." in printed and "Traceback" not in printed
    )
    (fault,) = rows(tmp_path, "faults.jsonl")
    assert (fault["iteration"], fault["tensor"], fault["count"]) == (2, "weights", 1)
    assert len(rows(tmp_path)) == 1
    for file in tmp_path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values() if torch.is_floating_point(tensor))


def test_bad_updates_in_a_row_end_the_run(tmp_path: Path, fork_server: ForkServer) -> None:
    """The weights exp(A / temperature) of this setting are beyond all bounds, in every update."""
    overflowing = ["objective.name=sft", "objective.settings={temperature: 0.001}", "rollout.sampler=ode"]
    printed = fork_server.train(tmp_path, *RARE, *overflowing, "rollout.window={}", "iterations=9", status=65)
    assert "error: iteration 2: 3 updates in a row had to be skipped (guard.bad_updates); update 1: " in printed
    assert [(row["iteration"], row["update"]) for row in rows(tmp_path, "faults.jsonl")] == [(1, 1), (1, 2), (2, 1)]
    assert "Traceback" not in printed and not (tmp_path / "summary.json").exists()


def test_a_limit_ends_the_run_and_a_reward_that_never_varies_is_named(tmp_path: Path, fork_server: ForkServer) -> None:
    printed = fork_server.train(tmp_path / "limit", *RARE, "guard.max_kl=1e-30", status=65)
    assert "error: iteration 1: the kl is " in printed and ", above guard.max_kl = 1e-30; " in printed
    constant = "reward.train=support.failing_rewards:constant"
    printed = fork_server.train(tmp_path / "constant", *RARE, constant, "iterations=4")
    assert printed.count("warning: iteration 3: for 3 iterations now every image scores the same") == 1
    assert printed.count("now every image scores the same") == 1
