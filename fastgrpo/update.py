"""One optimiser step on stored transitions: velocity, moments, objective, gradients.

Trained steps and samples are one batch of S B transitions, taken `micro_batch_size` at a time:

    for each micro-batch:   moments(v_new, v_old) -> loss -> backward
    then one step of the optimiser

At a micro-batch of B, the rollout's own, each is one step of all its samples, in the very shape in which v_old was made, so
that the ratio of the first update is exactly 1. At any other size the network's rounding may differ by its shape; where
that matters, `recompute_old` makes v_old anew in the update's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastgrpo.objectives import Loss, StepRows
from fastgrpo.rollout import GuidanceRule, velocities
from fastgrpo.trajectory import Experience, take
from fastgrpo_kernels import transition
from fastgrpo_kernels.sde_step import guided_velocity_ref


class Engine(Protocol):
    """What an update needs of `fastgrpo.engine.Engine`."""

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self) -> Tensor: ...
    def rollout_policy(self) -> AbstractContextManager[nn.Module]: ...


class Learner(NamedTuple):
    """What stays the same from one update to the next."""

    engine: Engine
    objective: Callable[..., Loss]  # (moments, step rows, advantages, weight) -> Loss
    reference: Callable[[], AbstractContextManager] | None  # switches to the model before training; None: no KL
    guidance_scale: float
    model_dtype: torch.dtype
    micro_batch_size: int  # transitions a forward pass; divides S B
    guidance_rule: GuidanceRule | None = None  # the model's own, where it has one


class Transitions(NamedTuple):
    """Some transitions of an experience: N of its S B."""

    x: Tensor  # (N, *D) float32, before the step
    x_next: Tensor  # (N, *D) float32, after it
    v_old: Tensor  # (N, *D) float32, or without guidance in the model's dtype
    sigma: Tensor  # (N,) float32
    coefficients: Tensor  # (N, 4) float32
    kl_weight: Tensor  # (N,) float32
    loss_weight: Tensor  # (N,) float32
    conditioning: tuple  # of tensors (N, ...), or (2 N, ...) under guidance
    advantages: Tensor  # (N,) float32
    weight: Tensor  # (N,) float32


def micro_batches(experience: Experience, size: int) -> Iterator[Transitions]:
    """The transitions of an experience, step by step and `size` at a time."""
    rollout, steps = experience.rollout, experience.steps
    trained, batch = rollout.v_old.shape[:2]
    device = steps.start.device
    sample = torch.arange(batch, device=device).repeat(trained)  # (S B,)
    index = (torch.arange(trained, device=device)[:, None] + steps.start).flatten()  # (S B,) step of the rollout
    loss_weight = torch.ones_like(steps.table[..., 0]) if steps.loss_weight is None else steps.loss_weight
    x, x_next, v_old = (t.flatten(0, 1) for t in (rollout.latents[:-1], rollout.latents[1:], rollout.v_old))
    if len(sample) % size:
        raise ValueError(f"micro_batch_size {size} does not divide {trained} steps of {batch} samples into whole batches")
    for start in range(0, len(sample), size):
        part = slice(start, start + size)
        who, step = sample[part], index[part]
        yield Transitions(
            x[part], x_next[part], v_old[part], steps.sigmas[step], steps.table[who, step], steps.kl_weight[step],
            loss_weight[who, step],
            _conditioning_rows(experience.conditioning, who, batch), experience.advantages[who], experience.weight[who],
        )  # fmt: skip


def _conditioning_rows(conditioning: tuple, sample: Tensor, batch: int) -> tuple:
    """The rows of samples; under guidance, of the empty prompt first."""
    guided = len(conditioning[0]) == 2 * batch
    return take(conditioning, torch.cat([sample, sample + batch]) if guided else sample)


def update(learner: Learner, experiences: Sequence[Experience]) -> dict[str, Tensor]:
    """One optimiser step on all transitions of `experiences`; metrics as scalars on the device."""
    size = learner.micro_batch_size
    total = sum(experience.rollout.log_prob.numel() for experience in experiences) // size
    losses = []
    for experience in experiences:
        for transitions in micro_batches(experience, size):
            loss = transition_loss(learner, transitions)
            losses.append(loss)
            learner.engine.backward(loss.loss / total, last=len(losses) == total)
    metrics = {"grad_norm": learner.engine.step()}
    for name in Loss._fields:
        values = torch.stack([getattr(loss, name).detach() for loss in losses])
        metrics[name] = {"ratio_min": values.amin, "ratio_max": values.amax}.get(name, values.mean)()
    return metrics


def transition_loss(learner: Learner, transitions: Transitions) -> Loss:
    """The objective on a micro-batch, each sample's mean over elements."""
    x, x_next, v_old, sigma, coefficients, kl_weight, loss_weight, conditioning, advantages, weight = transitions
    x_model = x.to(learner.model_dtype)
    v_ref = reference_velocity(learner, x_model, sigma, conditioning)
    v, v_uncond = velocities(
        learner.engine, x_model, sigma, conditioning, learner.guidance_scale, learner.guidance_rule
    )
    moments = transition(
        x_next, x, v, v_old, coefficients, v_uncond=v_uncond, guidance_scale=learner.guidance_scale, v_ref=v_ref
    )
    step_rows = StepRows(s=coefficients[:, 2], w=coefficients[:, 3], kl_weight=kl_weight, loss_weight=loss_weight)
    return learner.objective(moments, step_rows, advantages, weight)


@torch.no_grad()
def reference_velocity(learner: Learner, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor | None:
    """The guided velocity of the model before training, (B, *D) float32; None where no KL asks for it."""
    if learner.reference is None:
        return None
    with learner.reference():
        return _guided(learner, x, sigma, conditioning)


def recompute_old(learner: Learner, experience: Experience) -> Experience:
    """The experience with v_old from a forward pass in the update's own shape, before any update of the weights.

    With gradients on, though none is used: that can change which kernels a network runs.
    """
    parts = []
    for transitions in micro_batches(experience, learner.micro_batch_size):
        with torch.enable_grad():
            x_model = transitions.x.to(learner.model_dtype)
            v = _guided(learner, x_model, transitions.sigma, transitions.conditioning)
        parts.append(v.detach())
    v_old = torch.cat(parts).view_as(experience.rollout.v_old)
    return replace(experience, rollout=replace(experience.rollout, v_old=v_old))


def _guided(learner: Learner, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor:
    v, v_uncond = velocities(learner.engine, x, sigma, conditioning, learner.guidance_scale, learner.guidance_rule)
    return guided_velocity_ref(v, v_uncond, learner.guidance_scale, torch.float32)


def largest_micro_batch(learner: Learner, experience: Experience) -> int:
    """The largest divisor of the S B transitions whose loss and gradient fit into GPU memory, by trying.

    On a CPU nothing can be tried without harm, and all are taken at once.
    """
    transitions = experience.rollout.log_prob.numel()
    # The bare policy: the engine would count a gradient that is only tried as part of an update.
    with learner.engine.rollout_policy() as policy:
        trained = [p for p in policy.parameters() if p.requires_grad]
        bare = learner._replace(engine=policy)
        for size in (n for n in range(transitions, 0, -1) if transitions % n == 0):
            try:
                loss = transition_loss(bare, next(micro_batches(experience, size))).loss
                torch.autograd.grad(loss, trained, allow_unused=True)
            except torch.OutOfMemoryError:
                continue
            return size
    raise torch.OutOfMemoryError("not even one transition's loss and gradient fit: set update.gradient_checkpointing")
