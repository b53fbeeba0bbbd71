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

from fastgrpo.learning.forward_process import target_moments
from fastgrpo.learning.objectives import Loss, StepRows
from fastgrpo.records import STEPS_FIRST, Experience, conditioning_rows, join, select
from fastgrpo.sampling.rollout import GuidanceRule, velocities
from fastgrpo_kernels import Guided, guided_velocity, transition


class Engine(Protocol):
    """What an update needs of `fastgrpo.engine.zero.Engine`."""

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
    mix: float | None = None  # of `forward.target_moments`; None: the objective is one of denoising transitions


class Transitions(NamedTuple):
    """Some transitions of an experience: N of its S B."""

    x: Tensor  # (N, *D) float32, what the network sees
    x_next: Tensor  # (N, *D) float32, after the step; of the forward process the velocity to match
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
    trained, batch = experience.sigma.shape
    if trained * batch % size:
        raise ValueError(f"micro_batch_size {size} does not divide {trained} steps of {batch} samples into whole batches")
    sample = torch.arange(batch, device=experience.sigma.device).repeat(trained)  # (S B,)
    flat = [getattr(experience, name).flatten(0, 1) for name in STEPS_FIRST]
    for start in range(0, trained * batch, size):
        part = slice(start, start + size)
        who = sample[part]
        yield Transitions(
            *(tensor[part] for tensor in flat), conditioning_rows(experience.conditioning, who, batch),
            experience.advantages[who], experience.weight[who],
        )  # fmt: skip


def live_batches(experiences: Sequence[Experience], count: int, place: Tensor | None = None) -> list[Experience]:
    """The samples that teach something, in `count` batches of the same size, the last filled up with others.

    Samples of weight 0 add nothing to the gradient: a batch of them need not be run. The shapes stay what they were, so
    that neither ratios nor captured graphs nor compiled blocks know of it.

    place: (n,), by which all samples are sorted where more is asked of their order than the live ones first.
    """
    if count == len(experiences) and place is None:
        return list(experiences)
    batch, every = len(experiences[0].advantages), join(experiences)
    order = ((every.weight == 0).to(torch.uint8) if place is None else place).argsort(stable=True)
    return [select(every, chosen) for chosen in order[: count * batch].split(batch)]


def live_count(experiences: Sequence[Experience]) -> Tensor:
    """How many batches their live samples fill, () int64; at least one, as an optimiser step needs a gradient."""
    live = sum((experience.weight > 0).sum() for experience in experiences)
    batch = len(experiences[0].advantages)
    return torch.div(live + batch - 1, batch, rounding_mode="floor").clamp(min=1)


def update(learner: Learner, experiences: Sequence[Experience], samples: int | None = None) -> dict[str, Tensor]:
    """One optimiser step on all transitions of `experiences`; metrics as scalars on the device.

    samples: over how many the loss is a mean, if some that teach nothing were left out (`live_batches`).
    """
    size = learner.micro_batch_size
    steps, batch = experiences[0].sigma.shape
    passes = len(experiences) * steps * batch // size
    total = (samples or len(experiences) * batch) * steps / size
    losses = []
    for experience in experiences:
        for transitions in micro_batches(experience, size):
            loss = transition_loss(learner, transitions)
            losses.append(loss)
            learner.engine.backward(loss.loss / total, last=len(losses) == passes)
    metrics = {"grad_norm": learner.engine.step()}
    for name in Loss._fields:
        values = torch.stack([getattr(loss, name).detach() for loss in losses])
        if name in ("ratio_min", "ratio_max"):
            metrics[name] = values.amin() if name == "ratio_min" else values.amax()
        else:  # what is weighted is a mean over all samples, the rest over those that were run
            metrics[name] = values.sum() / (total if name in ("loss", "policy", "kl") else passes)
    return metrics


def transition_loss(learner: Learner, transitions: Transitions) -> Loss:
    """The objective on a micro-batch, each sample's mean over elements."""
    x, x_next, v_old, sigma, coefficients, kl_weight, loss_weight, conditioning, advantages, weight = transitions
    x_model = x.to(learner.model_dtype)
    v_ref = reference_velocity(learner, x_model, sigma, conditioning)
    v, v_uncond = velocities(learner.engine, x_model, sigma, conditioning, learner.guidance_scale, learner.guidance_rule)
    velocity = Guided(v, v_uncond, learner.guidance_scale)
    moments = transition(x_next, x, velocity, v_old, coefficients, v_ref=v_ref)
    if learner.mix is not None:
        moments = target_moments(moments, x_next, guided_velocity(velocity), v_old, learner.mix)
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
            parts.append(_guided(learner, x_model, transitions.sigma, transitions.conditioning))
    return replace(experience, v_old=torch.cat(parts).view_as(experience.v_old))


def _guided(learner: Learner, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor:
    """The guided velocity, (B, *D) float32, without gradient."""
    v, v_uncond = velocities(learner.engine, x, sigma, conditioning, learner.guidance_scale, learner.guidance_rule)
    return guided_velocity(Guided(v, v_uncond, learner.guidance_scale))


def largest_micro_batch(learner: Learner, experience: Experience) -> int:
    """The largest divisor of the S B transitions whose loss and gradient fit into GPU memory, by trying.

    On a CPU nothing can be tried without harm, and all are taken at once.
    """
    transitions = experience.sigma.numel()
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
