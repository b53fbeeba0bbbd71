"""One optimiser step on stored transitions: velocity, moments, objective, gradients.

Trained steps and samples are one batch of S B transitions, taken `micro_batch_size` at a time:

    for each micro-batch:   moments(v_new, v_old) -> loss -> backward
    then one step of the optimiser

A model of several experts takes one expert's transitions after the other's (`batches.ByExpert`).
At a micro-batch of B, the rollout's own, each is one step of all its samples, in the very shape in which v_old was made, so
that the ratio of the first update is exactly 1. At any other size the network's rounding may differ by its shape; where
that matters, `recompute_old` makes v_old anew in the update's.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.learning.batches import ByExpert, micro_batches
from fastgrpo.learning.forward_process import target_moments
from fastgrpo.learning.objectives import Loss, Moments, StepRows
from fastgrpo.policy import GuidanceRule, Network, Policy, prompted_velocity
from fastgrpo.records import Experience
from fastgrpo_kernels import Guided, guided_velocity, transition


class Engine(Protocol):
    """The part of `fastgrpo.engine.zero.Engine` that an update uses."""

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self) -> Tensor: ...
    def rollout_policy(self) -> AbstractContextManager[Policy]: ...


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Everything that stays the same from one optimiser step to the next."""

    engine: Engine
    network: Network | None = None  # the policy's forward pass; None: the engine's
    objective: Callable[..., Loss]  # (moments, step rows, advantages, weight) -> Loss
    reference: Callable[[], AbstractContextManager] | None  # switches to the model before training; None: no KL
    guidance_scale: float
    model_dtype: torch.dtype
    micro_batch_size: int  # transitions a forward pass; divides S B
    guide: GuidanceRule | None = None  # the model's own guidance, where it has one
    experts: ByExpert | None = None  # None: the model is one network
    mix: float | None = None  # see `forward_process.target_moments`; None: the objective trains on denoising transitions

    def velocity(self, batch: Experience) -> Guided:
        """The policy's velocities of a micro-batch, with a gradient where gradients are on."""
        velocity = prompted_velocity(self.network or self.engine, batch.prompted, self.guidance_scale, self.guide)
        asked = () if batch.experts is None else (batch.experts,)
        return velocity(batch.x.to(self.model_dtype), batch.sigma, *asked)

    @torch.no_grad()
    def reference_velocity(self, batch: Experience) -> Tensor | None:
        """The guided velocity of the model before training, (N, *D) float32; None where no KL needs it."""
        if self.reference is None:
            return None
        with self.reference():
            return guided_velocity(self.velocity(batch))


def optimizer_step(learner: Learner, experiences: Sequence[Experience], samples: int | None = None) -> dict[str, Tensor]:
    """One optimiser step on all transitions of `experiences`; metrics as scalars on the device.

    Where the loss or the gradient of any rank is not finite the engine makes no step: grad_norm is infinite then.

    samples: over how many the loss is a mean, if some that teach nothing were left out (`live_batches`).
    """
    size = learner.micro_batch_size
    steps, batch = experiences[0].sigma.shape
    passes = len(experiences) * steps * batch // size
    total = (samples or len(experiences) * batch) * steps / size
    losses: list[Loss] = []
    for experience in experiences:
        for transitions in micro_batches(experience, size, learner.experts):
            loss = transition_loss(learner, transitions)
            losses.append(loss)
            # A loss that is not finite can have a finite gradient. Times NaN it has none, and the engine skips the step on
            # all ranks: nothing has to wait for the loss.
            sound = torch.where(loss.loss.detach().isfinite(), 1.0, torch.nan)
            learner.engine.backward(loss.loss * sound / total, last=len(losses) == passes)
    return {"grad_norm": learner.engine.step(), **Loss.over(losses, total)}


def transition_loss(learner: Learner, batch: Experience) -> Loss:
    """The objective on a micro-batch, each sample's mean over elements."""
    v_ref = learner.reference_velocity(batch)
    velocity = learner.velocity(batch)
    moments: Moments = transition(batch.x_next, batch.x, velocity, batch.v_old, batch.coefficients, v_ref=v_ref)
    if learner.mix is not None:
        moments = target_moments(moments, batch.x_next, guided_velocity(velocity), batch.v_old, learner.mix)
    s, w = batch.coefficients[:, 2], batch.coefficients[:, 3]
    rows = StepRows(s=s, w=w, kl_weight=batch.kl_weight, loss_weight=batch.loss_weight)
    return learner.objective(moments, rows, batch.advantages, batch.weight)


def recompute_old(learner: Learner, experience: Experience) -> Experience:
    """The experience with v_old from a forward pass in the update's own shape, before any update of the weights.

    With gradients on, though none is used: that can change which kernels a network runs.
    """
    parts = []
    for batch in micro_batches(experience, learner.micro_batch_size, learner.experts):
        with torch.enable_grad():
            parts.append(guided_velocity(learner.velocity(batch)))
    v_old = torch.cat(parts)
    if learner.experts is not None:
        v_old = v_old[learner.experts.order(experience).argsort()]
    return replace(experience, v_old=v_old.view_as(experience.v_old))


def largest_micro_batch(learner: Learner, experience: Experience) -> int:
    """The largest divisor of the S B transitions whose loss and gradient fit into GPU memory, by trying.

    On a CPU nothing can be tried without harm, and all are taken at once. Of a model of several experts all that are trained
    run in the trial, as they do in the largest micro-batch that may come.
    """
    asked = None if learner.experts is None else learner.experts.trained
    transitions = experience.sigma.numel()
    # The bare policy: the engine would count a gradient that is only tried as part of an update.
    with learner.engine.rollout_policy() as policy:
        trained = [p for p in policy.parameters() if p.requires_grad]
        bare = replace(learner, network=policy)
        for size in (n for n in range(transitions, 0, -1) if transitions % n == 0):
            try:
                first = replace(experience.transitions(slice(0, size)), experts=asked)
                loss = transition_loss(bare, first).loss
                torch.autograd.grad(loss, trained, allow_unused=True)
            except torch.OutOfMemoryError:
                continue
            return size
    raise torch.OutOfMemoryError("not even one transition's loss and gradient fit: set update.gradient_checkpointing")
