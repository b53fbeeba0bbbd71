"""The embedded model's rollouts, and a learner of one process."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fastgrpo.data.embeddings import Embeddings
from fastgrpo.learning.objectives import clip
from fastgrpo.learning.update import (
    Learner,
)
from fastgrpo.policy import Policy
from fastgrpo.records import TRAIN, Experience, Rollout, Steps, experience_of, noise_address
from fastgrpo.sampling import tables as sde

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


def steps_of(model, start: Tensor, size: int, sampler: str = "flow_sde") -> Steps:
    sigmas = model.sigmas(10)
    table = sde.window_tables(sde.sampler_steps(sampler, sigmas, 0.7), start, size)
    return Steps(sigmas, table, start, size, sde.kl_weights(sde.sampler_steps(sampler, sigmas, 0.7)).float()).to(model.device)


def rollout_arguments(
    model, guidance_scale: float, sampler: str = "flow_sde", size: int = 3, seed: int = 0
) -> tuple[tuple, dict]:
    """What `rollout` is given after the policy, on the model's device."""
    steps = steps_of(model, torch.tensor([0, 6, 3, 0]), size, sampler)
    address = noise_address(TRAIN, seed, 1, torch.arange(4, device=model.device))
    options = dict(guidance_scale=guidance_scale, latent_shape=model.latent_shape, model_dtype=model.dtype)
    return (steps, address, Embeddings(model)(PROMPTS, guidance_scale=guidance_scale)), options


def experience_from(result: Rollout, arguments: tuple) -> Experience:
    steps, _, conditioning = arguments
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], device=result.final.device)
    return experience_of(result, steps, conditioning, advantages, torch.ones_like(advantages))


def learner_of(model, guidance_scale: float, beta: float = 0.1, micro_batch_size: int = 4) -> Learner:
    objective = partial(clip, clip_range=1e-3, beta=beta)
    reference = model.reference if beta else None
    return Learner(PlainEngine(Policy(model)), objective, reference, guidance_scale, model.dtype, micro_batch_size)
