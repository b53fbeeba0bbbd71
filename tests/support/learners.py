"""The embedded model's rollouts, and a learner of one process."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fastgrpo.data.embeddings import Embeddings
from fastgrpo.learning.batches import experience_of
from fastgrpo.learning.objectives import clip
from fastgrpo.learning.update import Learner
from fastgrpo.policy import Model, Policy
from fastgrpo.records import TRAIN, Batch, Experience, Prompted, Schedule, Trajectory, noise_address
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo_kernels import NoiseAddress

PROMPTS = ["a red circle", "two blue squares", "a green square and a yellow circle", "a red circle"]


class PlainEngine:
    """The engine of one process, as simple as can be: gradients are left where they fall."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy, self.lasts = policy, []

    def __call__(self, *arguments: Tensor) -> Tensor:
        return self.policy(*arguments)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.lasts.append(last)
        loss.backward()

    def step(self) -> Tensor:
        return torch.zeros(())

    def rollout_policy(self) -> nullcontext:
        return nullcontext(self.policy)


def schedule_of(model: Model, start: Tensor, size: int, sampler: str = "flow_sde") -> Schedule:
    return window_schedule(sampler_steps(sampler, model.sigmas(10), 0.7), start, size).to(model.device)


def rollout_arguments(
    model: Model, guidance_scale: float, sampler: str = "flow_sde", size: int = 3, seed: int = 0
) -> tuple[Schedule, NoiseAddress, Prompted, float]:
    """What `rollout` is given after the policy, on the model's device."""
    schedule = schedule_of(model, torch.tensor([0, 6, 3, 0]), size, sampler)
    address = noise_address(TRAIN, seed, 1, torch.arange(4, device=model.device))
    return schedule, address, Embeddings(model).prompted(PROMPTS, guidance_scale), guidance_scale


def experience_from(trajectory: Trajectory, arguments: tuple, weight: Tensor | None = None) -> Experience:
    schedule, address, prompted, _ = arguments
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], device=trajectory.final.device)
    batch = Batch(sample_id=address.sample_id, prompted=prompted, schedule=schedule, trajectory=trajectory)
    return experience_of(batch, advantages, torch.ones_like(advantages) if weight is None else weight)


def learner_of(model: Model, guidance_scale: float, beta: float = 0.1, micro_batch_size: int = 4) -> Learner:
    return Learner(
        engine=PlainEngine(Policy(model)), objective=partial(clip, clip_range=1e-3, beta=beta),
        reference=model.reference if beta else None, guidance_scale=guidance_scale, model_dtype=model.dtype,
        micro_batch_size=micro_batch_size,
    )  # fmt: skip
