"""One optimiser step on stored transitions: velocity, moments, objective, gradients.

for each batch and each trained step:   moments(v_new, v_old) -> loss -> backward
then one step of the optimiser
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastgrpo.objectives import Loss, StepRows
from fastgrpo.rollout import velocities
from fastgrpo.trajectory import Experience
from fastgrpo_kernels import transition
from fastgrpo_kernels.sde_step import guided_velocity_ref


class Engine(Protocol):
    """What an update needs of `fastgrpo.engine.Engine`."""

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self) -> Tensor: ...


class Learner(NamedTuple):
    """What stays the same from one update to the next."""

    engine: Engine
    objective: Callable[..., Loss]  # (moments, step rows, advantages, weight) -> Loss
    reference: Callable[[], AbstractContextManager] | None  # switches to the model before training; None: no KL
    guidance_scale: float
    model_dtype: torch.dtype


def update(learner: Learner, experiences: Sequence[Experience]) -> dict[str, Tensor]:
    """One optimiser step on all transitions of `experiences`; metrics as scalars on the device."""
    transitions = [(experience, j) for experience in experiences for j in range(experience.steps.size)]
    losses = []
    for n, (experience, j) in enumerate(transitions, 1):
        loss = transition_loss(learner, experience, j)
        learner.engine.backward(loss.loss / len(transitions), last=n == len(transitions))
        losses.append(loss)
    metrics = {"grad_norm": learner.engine.step()}
    for name in Loss._fields:
        values = torch.stack([getattr(loss, name).detach() for loss in losses])
        metrics[name] = {"ratio_min": values.amin, "ratio_max": values.amax}.get(name, values.mean)()
    return metrics


def transition_loss(learner: Learner, experience: Experience, j: int) -> Loss:
    """The objective on the j-th trained transition of each sample of a batch."""
    rollout, steps = experience.rollout, experience.steps
    rows = torch.arange(len(steps.start), device=steps.start.device)
    index = steps.start + j  # (B,) the step that this is of each sample's rollout
    coefficients, sigma = steps.table[rows, index], steps.sigmas[index]  # (B, 4), (B,)
    x, x_next, v_old = rollout.latents[j], rollout.latents[j + 1], rollout.v_old[j]
    x_model = x.to(learner.model_dtype)

    v_ref = reference_velocity(learner, x_model, sigma, experience.conditioning)
    v, v_uncond = velocities(learner.engine, x_model, sigma, experience.conditioning)
    moments = transition(
        x_next, x, v, v_old, coefficients, v_uncond=v_uncond, guidance_scale=learner.guidance_scale, v_ref=v_ref
    )
    step_rows = StepRows(s=coefficients[:, 2], w=coefficients[:, 3], kl_weight=steps.kl_weight[index])
    return learner.objective(moments, step_rows, experience.advantages, experience.weight)


@torch.no_grad()
def reference_velocity(learner: Learner, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor | None:
    """The guided velocity of the model before training, (B, *D) float32; None where no KL asks for it."""
    if learner.reference is None:
        return None
    with learner.reference():
        v, v_uncond = velocities(learner.engine, x, sigma, conditioning)
    return guided_velocity_ref(v, v_uncond, learner.guidance_scale, torch.float32)
