"""The update: exactly on-policy at first, and its gradient that of the published formula."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.learners import experience_from, learner_of, rollout_arguments
from support.tiny_model import load_tuned_model
from torch import Tensor, nn
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import fastgrpo.learning.update
import fastgrpo_kernels.guidance
from fastgrpo.learning.batches import live_batches, live_count, micro_batches
from fastgrpo.learning.update import largest_micro_batch, optimizer_step, recompute_old, transition_loss
from fastgrpo.policy import Policy
from fastgrpo.records import Experience
from fastgrpo.sampling.rollout import rollout
from fastgrpo_kernels import guided_velocity_triton, transition_triton


def rolled(model, guidance_scale: float, sampler: str, size: int = 3, seed: int = 0) -> Experience:
    arguments = rollout_arguments(model, guidance_scale, sampler, size, seed)
    return experience_from(rollout(Policy(model), *arguments), arguments)


@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "wan_sde", "cps"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_first_ratio_is_exactly_1(tuned_model, guidance_scale: float, sampler: str) -> None:
    """Bit for bit, with a window of its own for each group, with the reference switched in between, in training mode."""
    experience = rolled(tuned_model, guidance_scale, sampler)
    learner = learner_of(tuned_model, guidance_scale)
    for transitions in micro_batches(experience, 4):
        loss = transition_loss(learner, transitions)
        assert loss.ratio_min.item() == loss.ratio_max.item() == 1.0
        assert loss.drift.item() == 0.0 and loss.clip_fraction.item() == 0.0
        assert loss.kl.item() > 0  # the LoRA has an effect


def test_ratio_leaves_1_when_the_policy_moves(tuned_model) -> None:
    experience = rolled(tuned_model, 1.0, "flow_sde")
    with torch.no_grad():
        for name, parameter in tuned_model.transformer.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    loss = transition_loss(learner_of(tuned_model, 1.0), next(micro_batches(experience, 4)))
    assert loss.ratio_min.item() < loss.ratio_max.item() and loss.drift.item() > 0


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_gradient_is_that_of_the_published_formula(tuned_model, guidance_scale: float) -> None:
    """Against torch.distributions in float64 on the whole model: clipped surrogate of subtracted log-probs, and KL."""
    experience = rolled(tuned_model, guidance_scale, "flow_sde")
    with torch.no_grad():  # off-policy, so that ratio, clip and drift all matter
        for name, parameter in tuned_model.transformer.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.002)
    learner, beta = learner_of(tuned_model, guidance_scale), 0.1
    optimizer_step(learner, [experience])
    assert learner.engine.lasts == [False, False, True]
    found = {n: p.grad.double() for n, p in tuned_model.transformer.named_parameters() if p.grad is not None}

    model = copy.deepcopy(tuned_model.transformer).double()
    for p in model.parameters():
        p.grad = None

    def velocity(j: int) -> Tensor:
        x, sigma = experience.x[j].double(), experience.sigma[j].double()
        v, v_uncond = (
            None if rows is None else model(
                hidden_states=x, timestep=sigma * 1000, encoder_hidden_states=rows.embeds.double(),
                pooled_projections=rows.pooled.double(),
            ).sample
            for rows in (experience.prompted.cond, experience.prompted.uncond)
        )  # fmt: skip
        return v if v_uncond is None else v_uncond + guidance_scale * (v - v_uncond)

    total = 0.0
    for j in range(3):
        c_x, c_v, s, _ = experience.coefficients[j].double().view(4, 4, 1, 1, 1).unbind(1)
        x, x_next = experience.x[j].double(), experience.x_next[j].double()
        model.disable_adapters()
        with torch.no_grad():
            reference = torch.distributions.Normal(c_x * x + c_v * velocity(j), s.expand_as(x))
        model.enable_adapters()
        new = torch.distributions.Normal(c_x * x + c_v * velocity(j), s.expand_as(x))
        old = torch.distributions.Normal(c_x * x + c_v * experience.v_old[j].double(), s.expand_as(x))
        ratio = (new.log_prob(x_next) - old.log_prob(x_next)).flatten(1).mean(1).exp()
        a = experience.advantages.double()
        policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-3, 1 + 1e-3))
        kl = torch.distributions.kl_divergence(new, reference).flatten(1).mean(1)
        total = total + (policy + beta * kl).mean() / 3
    total.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5 * gradient.abs().max().item() + 1e-9)


def test_a_steps_weight_multiplies_its_policy_gradient_and_not_its_kl(tuned_model) -> None:
    """Against a gradient of each step alone, by weights that are 1 for one step and 0 for the others."""
    start = torch.tensor([0, 6, 3, 0])
    at = start[:, None] + torch.arange(3)  # (B, S)
    schedule, *arguments = rollout_arguments(tuned_model, 1.0)
    trajectory = rollout(Policy(tuned_model), schedule, *arguments)
    experience = experience_from(trajectory, (schedule, *arguments))

    def gradient(weights: list[float] | None, beta: float) -> dict[str, Tensor]:
        weighted = experience
        if weights is not None:
            table = torch.zeros(4, 10).scatter(1, at, torch.tensor(weights).expand(4, -1))
            weighted = experience_from(trajectory, (schedule._replace(loss_weight=table), *arguments))
        optimizer_step(learner_of(tuned_model, 1.0, beta=beta), [weighted])
        found = {n: p.grad.double() for n, p in tuned_model.transformer.named_parameters() if p.grad is not None}
        tuned_model.transformer.zero_grad()
        return found

    single = [gradient([float(i == j) for i in range(3)], beta=0.0) for j in range(3)]
    kl = gradient([0.0, 0.0, 0.0], beta=0.1)
    assert max(g.abs().max() for g in kl.values()) > 0
    for weights, found in (([2.0, 0.5, 3.0], None), ([1.0, 1.0, 1.0], gradient(None, beta=0.1))):
        found = gradient(weights, beta=0.1) if found is None else found
        for name, value in found.items():
            expected = sum(w * g[name] for w, g in zip(weights, single, strict=True)) + kl[name]
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item() + 1e-9)


def test_dead_groups_leave_no_gradient(tuned_model) -> None:
    experience = rolled(tuned_model, 1.0, "flow_sde")
    dead = replace(experience, advantages=torch.zeros(4), weight=torch.zeros(4))
    optimizer_step(learner_of(tuned_model, 1.0), [dead])
    assert all(p.grad is None or (p.grad == 0).all() for p in tuned_model.transformer.parameters())


def test_without_beta_the_reference_is_not_run(tuned_model) -> None:
    experience = rolled(tuned_model, 1.0, "flow_sde")
    learner = learner_of(tuned_model, 1.0, beta=0.0)
    calls = []
    learner.engine.policy.register_forward_hook(lambda *_: calls.append(1))
    optimizer_step(learner, [experience])
    assert len(calls) == len(experience.x)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 12])
def test_any_fold_is_the_same_update(tuned_model, guidance_scale: float, size: int) -> None:
    """Transition by transition, or all steps of all samples at once: the same gradient up to the order of its sums."""
    experience = rolled(tuned_model, guidance_scale, "flow_sde")

    def gradients(micro_batch_size: int) -> dict[str, Tensor]:
        learner = learner_of(tuned_model, guidance_scale, micro_batch_size=micro_batch_size)
        optimizer_step(learner, [experience])
        assert learner.engine.lasts == [False] * (12 // micro_batch_size - 1) + [True]
        found = {n: p.grad.clone() for n, p in tuned_model.transformer.named_parameters() if p.grad is not None}
        tuned_model.transformer.zero_grad()
        return found

    expected, found = gradients(4), gradients(size)
    assert found.keys() == expected.keys() and len(found) > 10
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max().item() + 1e-9
        )


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("size", [2, 12])
def test_recomputed_old_velocity_makes_any_fold_exact(tuned_model, guidance_scale: float, size: int) -> None:
    experience = rolled(tuned_model, guidance_scale, "flow_sde")
    learner = learner_of(tuned_model, guidance_scale, micro_batch_size=size)
    for transitions in micro_batches(recompute_old(learner, experience), size):
        loss = transition_loss(learner, transitions)
        assert loss.ratio_min.item() == loss.ratio_max.item() == 1.0 and loss.drift.item() == 0.0


@pytest.mark.parametrize("size", [4, 12])
def test_recomputed_old_velocity_is_exact_on_the_kernels(tuned_model, monkeypatch, size: int) -> None:
    """They round guidance once, where torch rounds it twice: v_old has to be theirs too."""
    if torch.cuda.is_available():
        pytest.skip("there the kernels are not interpreted: tests/kernels/test_guidance.py compares them")

    def fma(_, x, y, z):
        """Of a GPU; the interpreter's own rounds twice. A product of two float32 is exact in float64."""
        assert x.data.dtype == np.float32
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
    monkeypatch.setattr(fastgrpo_kernels.guidance, "guided_velocity_ref", guided_velocity_triton)
    monkeypatch.setattr(fastgrpo.learning.update, "transition", transition_triton)
    experience = rolled(tuned_model, 3.0, "flow_sde")
    learner = learner_of(tuned_model, 3.0, micro_batch_size=size)
    for transitions in micro_batches(recompute_old(learner, experience), size):
        loss = transition_loss(learner, transitions)
        assert loss.ratio_min.item() == loss.ratio_max.item() == 1.0 and loss.drift.item() == 0.0


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_keep_the_first_ratio_at_1(tuned_model) -> None:
    """The same compiled block with gradients and without, with the adapter on and off; and it is the same network."""
    eager = rolled(tuned_model, 1.0, "flow_sde")
    tuned_model.compile()
    assert tuned_model.blocks and all(block._compiled_call_impl is not None for block in tuned_model.blocks)
    compiled = rolled(tuned_model, 1.0, "flow_sde")
    torch.testing.assert_close(compiled.x_next[-1], eager.x_next[-1], rtol=1e-3, atol=1e-3)
    learner = learner_of(tuned_model, 1.0)
    for transitions in micro_batches(compiled, 4):
        loss = transition_loss(learner, transitions)
        assert loss.ratio_min.item() == loss.ratio_max.item() == 1.0 and loss.kl.item() > 0


@pytest.mark.processes
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_keep_the_first_ratio_at_1_in_bfloat16(checkpointing: bool) -> None:
    """There a program without gradients rounds differently: rollouts have to run that of the update."""
    model = load_tuned_model(dtype=torch.bfloat16)
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    model.compile()
    experience, learner = rolled(model, 1.0, "flow_sde"), learner_of(model, 1.0, beta=0.0)
    for transitions in micro_batches(experience, 4):
        loss = transition_loss(learner, transitions)
        assert loss.ratio_min.item() == loss.ratio_max.item() == 1.0 and loss.drift.item() == 0.0
        loss.loss.backward()
    gradients = [p.grad for p in model.transformer.parameters() if p.requires_grad]
    assert len(gradients) > 10 and all(gradient.isfinite().all() for gradient in gradients)


def test_recomputing_in_the_rollouts_shape_changes_nothing(tuned_model) -> None:
    experience = rolled(tuned_model, 1.0, "flow_sde")
    again = recompute_old(learner_of(tuned_model, 1.0), experience)
    assert torch.equal(again.v_old, experience.v_old)


def test_a_fold_that_does_not_divide_is_refused(tuned_model) -> None:
    experience = rolled(tuned_model, 1.0, "flow_sde")
    with pytest.raises(ValueError, match="micro_batch_size 5 does not divide 3 steps of 4 samples"):
        next(micro_batches(experience, 5))


def test_largest_micro_batch_is_what_memory_holds(tuned_model) -> None:
    """With a device that holds five transitions' activations, four is the largest divisor of the twelve."""
    experience = rolled(tuned_model, 1.0, "flow_sde")
    learner = learner_of(tuned_model, 1.0)
    assert largest_micro_batch(learner, experience) == 12
    room = 5

    def forward(module: nn.Module, arguments: tuple) -> None:
        if len(arguments[0]) > room:
            raise torch.OutOfMemoryError("out of memory")

    learner.engine.policy.register_forward_pre_hook(forward)
    assert largest_micro_batch(learner, experience) == 4
    room = 0
    with pytest.raises(torch.OutOfMemoryError, match="gradient_checkpointing"):
        largest_micro_batch(learner, experience)
    assert all(p.grad is None for p in tuned_model.transformer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("live", [[0, 5, 6, 11], [1, 2, 3, 4, 8, 10], [], list(range(12))])
def test_batches_of_dead_samples_are_not_run_and_not_missed(tuned_model, guidance_scale: float, live: list[int]) -> None:
    """12 samples in 3 batches: the same gradient from as few batches as the live ones fill, and a first ratio of 1."""
    weight = torch.zeros(12).index_fill(0, torch.tensor(live, dtype=torch.int64), 1.0)
    parts = [
        replace(rolled(tuned_model, guidance_scale, "flow_sde", seed=i), advantages=torch.randn(4), weight=mine)
        for i, mine in enumerate(weight.split(4))
    ]
    transformer = tuned_model.transformer
    learner = learner_of(tuned_model, guidance_scale)
    whole = optimizer_step(learner, parts)
    expected = {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}
    transformer.zero_grad()

    count = live_count(parts)
    assert count == max(1, -(-len(live) // 4))
    packed = live_batches(parts, int(count))
    assert len(packed) == count and all(len(e.advantages) == 4 for e in packed)
    learner.engine.lasts.clear()
    metrics = optimizer_step(learner, packed, samples=12)
    assert learner.engine.lasts == [False] * (3 * int(count) - 1) + [True]
    assert metrics["ratio_min"].item() == metrics["ratio_max"].item() == 1.0
    for name in ("loss", "policy", "kl"):
        torch.testing.assert_close(metrics[name], whole[name], rtol=1e-5, atol=1e-9)
    for name, gradient in expected.items():
        found = transformer.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-12)
    assert len(expected) > 10
