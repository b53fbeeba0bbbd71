"""Whole runs on the embedded model, as a user starts them: one process and two, killed and resumed, and what they leave."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import ForkServer, command, rows, rows_so_far, run, start

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of one process that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(command(folder))


def test_a_run_leaves_what_it_promises(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert {"base_accuracy", "final_accuracy", "train_seconds", "images", "seed", "base", "final"} <= summary.keys()
    assert summary["images"] == 64 and summary["status"] == "finished"
    assert "base  trained   change" in printed and "overall" in printed
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3, 4]
    evaluations = rows(folder, "evaluations.jsonl")
    assert [row["iteration"] for row in evaluations] == [0, 2, 4]
    assert summary["base_accuracy"] == evaluations[0]["accuracy"]["overall"]
    assert summary["final_accuracy"] == evaluations[-1]["accuracy"]["overall"]
    assert len(list((folder / "samples" / "00004").glob("*.png"))) == 6 and (folder / "samples" / "00004.png").exists()
    assert list((folder / "tensorboard").iterdir()) and (folder / "report.html").stat().st_size > 10_000
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["00002", "00004"]


def test_first_update_of_every_rollout_is_exactly_on_policy(finished: tuple[Path, str]) -> None:
    for row in rows(finished[0]):
        assert row["first_ratio_deviation"] == 0.0
        assert row["ratio_min"] <= 1 <= row["ratio_max"]
    assert any(row["ratio_max"] > 1 for row in rows(finished[0])), "the second update is off-policy"


def test_a_finished_run_is_left_alone(finished: tuple[Path, str], fork_server: ForkServer) -> None:
    before = rows(finished[0]), (finished[0] / "pytorch_lora_weights.safetensors").read_bytes()
    assert "trained" in fork_server.train(finished[0])
    assert (rows(finished[0]), (finished[0] / "pytorch_lora_weights.safetensors").read_bytes()) == before


def test_another_configuration_in_the_same_folder_is_refused(finished: tuple[Path, str], fork_server: ForkServer) -> None:
    printed = fork_server.train(finished[0], "objective.beta=0.2", status=2)
    assert "objective.beta: 0.1 -> 0.2" in printed and "Traceback" not in printed


def test_killed_and_resumed_is_bitwise_undisturbed(
    finished: tuple[Path, str], tmp_path: Path, fork_server: ForkServer
) -> None:
    """SIGKILL after the third iteration: the fourth starts from the checkpoint of the second."""
    folder = tmp_path / "killed"
    process = start(command(folder))
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(rows_so_far(folder)) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "summary.json").exists()
    fork_server.train(folder)
    assert rows(folder) == rows(finished[0])
    assert rows(folder, "evaluations.jsonl") == rows(finished[0], "evaluations.jsonl")
    weights = "pytorch_lora_weights.safetensors"
    resumed, undisturbed = load_file(folder / weights), load_file(finished[0] / weights)
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


def test_two_processes_roll_out_what_one_does(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Same noise, same prompts, same batches: until the first update every number of the rollout is the same bits."""
    run(command(tmp_path / "two", "iterations=1", ranks=2))
    one, two = rows(finished[0])[0], rows(tmp_path / "two")[0]
    for key in ("reward", "reward_std", "zero_groups", "images", "rollout_forwards"):
        assert one[key] == two[key]
    assert two["first_ratio_deviation"] == 0.0
    assert rows(tmp_path / "two", "evaluations.jsonl")[0] == rows(finished[0], "evaluations.jsonl")[0]


def test_every_zero_stage_rolls_out_the_same(finished: tuple[Path, str], tmp_path: Path, fork_server: ForkServer) -> None:
    """Stage 3 shards the parameters themselves, and gathers them for rollout, reference, average and checkpoint."""
    fork_server.train(tmp_path / "three", "iterations=2", "engine.zero_stage=3", "rollout.cuda_graph=false", ranks=2)
    three = rows(tmp_path / "three")
    assert three[0]["reward"] == rows(finished[0])[0]["reward"] and three[0]["first_ratio_deviation"] == 0.0
    assert (tmp_path / "three" / "pytorch_lora_weights.safetensors").exists()
    evaluations = rows(tmp_path / "three", "evaluations.jsonl")
    assert evaluations[0] == rows(finished[0], "evaluations.jsonl")[0]


def test_bfloat16_is_exactly_on_policy_too(tmp_path: Path, fork_server: ForkServer) -> None:
    fork_server.train(tmp_path / "bf16", "iterations=2", "model.dtype=bfloat16")
    for row in rows(tmp_path / "bf16"):
        assert row["first_ratio_deviation"] == 0.0 and row["grad_norm"] > 0


def test_eight_bit_rollouts_are_scored_again_exactly(
    finished: tuple[Path, str], tmp_path: Path, fork_server: ForkServer
) -> None:
    """Other samples than those of an exact rollout, but near; and the first ratio is 1 of what scored them."""
    fork_server.train(tmp_path / "fp8", "rollout.precision=fp8", "update.old_velocity=recompute", "iterations=2")
    for row, exact in zip(rows(tmp_path / "fp8"), rows(finished[0]), strict=False):
        assert row["first_ratio_deviation"] == 0
        assert row["reward"] == pytest.approx(exact["reward"], abs=0.2) and row["kl"] != exact["kl"]


def test_a_schedule_that_spares_forward_passes(tmp_path: Path, fork_server: ForkServer) -> None:
    """MixGRPO-Flash with a prefix a group, guided: windows at 0, 1, 1 and 2, and after them half of what is left of 8 steps.

    16 images, of which 4 are siblings, twice for guidance. The first update stays exactly on-policy.
    """
    settings = [
        "rollout.num_steps=8", "rollout.sampler=cps", "rollout.guidance_scale=2", "rollout.shared_noise=true",
        "rollout.window={kind: progressive, size: 2, every: 2, decay: 0.5}", "objective.step_weight=tempflow",
        "rollout.after_window={solver: dpmpp_2m, compress_ratio: 0.5}",
    ]  # fmt: skip
    fork_server.train(tmp_path / "flash", *settings)
    found = rows(tmp_path / "flash")
    expected = [2 * (4 * prefix + 16 * (2 + after)) for prefix, after in ((0, 3), (1, 3), (1, 3), (2, 2))]
    assert [row["rollout_forwards"] for row in found] == expected
    assert all(row["first_ratio_deviation"] == 0 and row["grad_norm"] > 0 for row in found)
    assert len(rows(tmp_path / "flash", "evaluations.jsonl")) == 3


def test_folds_cached_embeddings_and_recomputed_velocities(
    finished: tuple[Path, str], tmp_path: Path, fork_server: ForkServer
) -> None:
    """Other ways to the same run: the rollout's numbers are the same bits, and the first update is exactly on-policy."""
    settings = [
        "update.micro_batch_size=largest", "update.old_velocity=recompute", f"prompts.cache={tmp_path / 'embeddings'}",
        "iterations=2",
    ]  # fmt: skip
    printed = fork_server.train(tmp_path / "folded", *settings)
    kind = "eager (CUDA graphs need a GPU, this is a cpu)"
    assert f"rollout: {kind}" in printed
    assert "update: 8 transitions a forward pass" in printed
    made = len(list((tmp_path / "embeddings").rglob("*.safetensors")))
    assert (
        f"embeddings of {made} prompts take about" in printed and made < 464
    )  # which its prompt files have, with the empty one
    folded, plain = rows(tmp_path / "folded"), rows(finished[0])
    assert folded[0]["reward"] == plain[0]["reward"] and folded[0]["first_ratio_deviation"] == 0.0
    assert folded[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-3)
    assert json.loads((tmp_path / "folded" / "summary.json").read_text())["rollout"].startswith(kind)


def test_eval_and_sample_read_a_run(finished: tuple[Path, str], tmp_path: Path, fork_server: ForkServer) -> None:
    folder = finished[0]
    printed = fork_server.run("eval", str(folder)).splitlines()[-1]
    assert json.loads(printed)["accuracy"] == rows(folder, "evaluations.jsonl")[-1]["accuracy"]
    picture = tmp_path / "a.png"
    fork_server.run("sample", str(folder), "--prompt", "a red circle", "--images", "2", "--output", str(picture))
    assert picture.stat().st_size > 100
    (folder / "report.html").unlink()
    fork_server.run("report", str(folder))
    assert (folder / "report.html").exists()


def test_other_advantages_change_the_update_and_not_what_is_reported(
    finished: tuple[Path, str], tmp_path: Path, fork_server: ForkServer
) -> None:
    """Half of each group, by win rates of each reward: rewards are logged as they came, dead groups counted as groups."""
    settings = ["iterations=1", "reward.train={tiny_shapes_graded: 1, tiny_shapes: 0}"]
    settings.append("advantage={std: group, combine: each, pairwise: true, keep: 2}")
    fork_server.train(tmp_path / "each", *settings, ranks=2)
    plain, (row,) = rows(finished[0])[0], rows(tmp_path / "each")
    for key in ("reward", "reward_std", "zero_groups", "images"):
        assert row[key] == plain[key]
    assert row["rewards"]["tiny_shapes_graded"] == row["reward"] != row["rewards"]["tiny_shapes"]
    assert row["first_ratio_deviation"] == 0.0 and row["zero_groups"] < 0.5 and row["grad_norm"] != plain["grad_norm"]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_the_reward_rises_under_deepspeed(tmp_path: Path, zero_stage: int, fork_server: ForkServer) -> None:
    """A reward of the user's own, `module:function`, two processes: the last rollouts are clearly redder than the first.

    The prompts, the same ones every time, leave the colour of one object open, and none asks for red.
    """
    things = [("blue", "square"), ("green", "triangle"), ("yellow", "circle"), ("green", "square")]
    shapes = {"square": "circle", "triangle": "square", "circle": "triangle"}
    prompts = [f"a {color} {shape} and a {shapes[shape]}" for color, shape in things]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    settings = [
        "iterations=16", "rollout.groups=4", "rollout.group_size=16", "rollout.batch_size=16", "objective.beta=0",
        "reward.train=support.model_worker:redness", "update.learning_rate=3e-3", f"engine.zero_stage={zero_stage}",
        "evaluation.every=0", "checkpoint.every=100", "rollout.window={kind: fixed, start: 0, size: 2}",
        f"prompts.train={tmp_path / 'prompts.txt'}", "prompts.weights={}",
    ]  # fmt: skip
    fork_server.train(tmp_path / "red", *settings, ranks=2)
    rewards = [row["reward"] for row in rows(tmp_path / "red")]
    spread = rows(tmp_path / "red")[0]["reward_std"]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 2 * spread, rewards
