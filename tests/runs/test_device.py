"""The real network, its update, the engine and whole runs, on the GPU where there is one.

Without one the same runs on the CPU, with a stand-in for the graph: that finds mistakes, and says nothing of a GPU.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.capture import capture, equal
from support.helpers import DEVICE, ROOT, environment, needs_gpu
from support.learners import experience_from, learner_of, rollout_arguments
from support.runs import command, rows
from support.tiny_model import load_tiny_model, load_tuned_model
from torch import Tensor

from fastgrpo.learning.batches import micro_batches
from fastgrpo.learning.update import Learner, optimizer_step, recompute_old, transition_loss
from fastgrpo.policy import Policy
from fastgrpo.records import Trajectory
from fastgrpo.sampling.graph import CapturedRollout
from fastgrpo.sampling.rollout import rollout
from fastgrpo_kernels import Moments

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
DTYPES = ["float32", "bfloat16", pytest.param("float16", marks=needs_gpu)]  # in which DeepSpeed trains on no CPU
GUIDANCE = [1.0, 4.5]


def tuned(dtype: str):
    return load_tuned_model(device=DEVICE, dtype=getattr(torch, dtype))


def move(model) -> None:
    """The trained weights, in place, as an optimiser does."""
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)


def sampled(model, guidance_scale: float, run=rollout) -> tuple[Trajectory, tuple]:
    """A rollout, and the arguments that it was of."""
    arguments = rollout_arguments(model, guidance_scale)
    return run(Policy(model), *arguments), arguments


def watched(learner: Learner) -> tuple[Learner, list[Moments]]:
    """The learner, and the moments that its objective will be given."""
    seen: list[Moments] = []

    def objective(moments: Moments, *rest: Any) -> Any:
        seen.append(moments)
        return learner.objective(moments, *rest)

    return replace(learner, objective=objective), seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance_scale", GUIDANCE)
@pytest.mark.parametrize("old_velocity", ["rollout", "recompute"])
@pytest.mark.parametrize("captured", [False, True])
def test_first_ratio_is_exactly_1(dtype: str, guidance_scale: float, old_velocity: str, captured: bool) -> None:
    model = tuned(dtype)
    run = CapturedRollout(capture()) if captured else rollout
    experience = experience_from(*sampled(model, guidance_scale, run))
    learner, seen = watched(learner_of(model, guidance_scale))
    if old_velocity == "recompute":
        experience = recompute_old(learner, experience)
    for transitions in micro_batches(experience, 4):
        loss = transition_loss(learner, transitions)
        assert loss.ratio_min.item() == loss.ratio_max.item() == 1.0
    assert len(seen) == 3 and all((m.m1 == 0).all() and (m.m2 == 0).all() for m in seen)
    assert all((m.m3 > 0).all() and m.m3.isfinite().all() for m in seen)  # the LoRA has an effect


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance_scale", GUIDANCE)
def test_a_replay_is_the_eager_rollout(dtype: str, guidance_scale: float) -> None:
    """Bit for bit, also after the weights have moved in place under the graph, and of other noise."""
    model = tuned(dtype)
    policy, captured, found = Policy(model), CapturedRollout(capture()), []
    for seed in (0, 0, 1):
        arguments = rollout_arguments(model, guidance_scale, seed=seed)
        found.append(captured(policy, *arguments))
        assert equal(found[-1], rollout(policy, *arguments))
        move(model)
    assert len(captured.graphs) == 1 and all(result.final.isfinite().all() for result in found)
    assert not equal(found[0], found[1]) and not equal(found[1], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance_scale", GUIDANCE)
def test_gradients_are_finite_and_repeat(dtype: str, guidance_scale: float) -> None:
    model = tuned(dtype)
    experience = experience_from(*sampled(model, guidance_scale))
    move(model)  # off-policy, so that ratio, clip and KL all have one

    def gradients() -> dict[str, Tensor]:
        model.transformer.zero_grad()
        optimizer_step(learner_of(model, guidance_scale), [experience])
        return {name: p.grad.clone() for name, p in model.transformer.named_parameters() if p.grad is not None}

    first, second = gradients(), gradients()
    assert len(first) > 10 and all(gradient.isfinite().all() for gradient in first.values())
    assert sum(bool(gradient.any()) for gradient in first.values()) > 10
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())


@needs_gpu
def test_a_gpu_samples_what_a_cpu_does() -> None:
    """The noise is the same, so the latents are, but for rounding, which ten guided steps enlarge; TF32 would be far off."""
    here, there = (sampled(load_tiny_model(device), 4.5)[0] for device in (DEVICE, "cpu"))
    torch.testing.assert_close(here.latents.cpu(), there.latents, rtol=0, atol=5e-3)
    torch.testing.assert_close(here.final.cpu(), there.final, rtol=0, atol=5e-3)


def child(command: list[str]) -> str:
    """What a process of its own printed: an engine patches the one that it is in."""
    env = environment(device=DEVICE)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.processes
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine(dtype: str) -> None:
    """On-policy at first, and no step skipped but in float16, where each halves the scale of the loss. Captured before and
    after updates, bit for bit the eager rollout; a replay follows the updates. In float32 the same steps as plain AdamW's.
    """
    printed = child([sys.executable, str(ROOT / "tests" / "support" / "device_worker.py"), dtype])
    seen = json.loads(printed.splitlines()[-1])
    assert len(seen["checks"]) == 5 and not [name for name, passed in seen["checks"].items() if not passed]
    steps, skipped = seen["metrics"], seen["skipped"]
    assert all(step["ratio_min"] == step["ratio_max"] == 1.0 and step["drift"] == 0.0 for step in steps[: skipped + 1])
    assert len(steps) > skipped + 1 and all(step["drift"] > 0 for step in steps[skipped + 1 :])
    assert [step["grad_norm"] for step in steps[:skipped]] == [math.inf] * skipped
    assert all(math.isfinite(step["grad_norm"]) and step["grad_norm"] > 0 for step in steps[skipped:])
    assert seen["loss_scale"] == (2.0 ** (24 - skipped) if dtype == "float16" else 1.0)
    assert skipped == 0 or dtype == "float16"  # the tiny network's gradients are larger than those that 2^24 was chosen for
    if dtype == "float32":
        for step, plain in zip(seen["metrics"], seen["plain_metrics"], strict=True):
            assert step["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
            assert step["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert seen["distance"] < 1e-5 * seen["went"]


@pytest.mark.processes
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_iterations_of_a_whole_run(dtype: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    child(command(output, "iterations=2", "evaluation.every=0", f"model.dtype={dtype}"))
    found = rows(output)
    assert [row["first_ratio_deviation"] for row in found] == [0.0, 0.0]
    numbers = [(key, value) for row in found for key, value in row.items() if isinstance(value, float)]
    assert len(numbers) > 20 and all(math.isfinite(value) for _, value in numbers)
    skipped = [row["skipped_steps"] for row in found]
    # An infinite norm is null in the file.
    assert [row["grad_norm"] is None for row in found] == [skipped[0] > 0, skipped[1] > skipped[0]]
    assert all(row["grad_norm"] is None or row["grad_norm"] > 0 for row in found)
    if dtype == "float16":
        assert [row["loss_scale"] for row in found] == [2.0 ** (24 - count) for count in skipped]
    else:
        assert skipped == [0, 0] and not any("loss_scale" in row for row in found)
    kind = json.loads((output / "summary.json").read_text())["rollout"]
    assert kind.startswith("captured" if DEVICE == "cuda" else "eager")
