"""Images and rollouts of any model, in few words."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.policy import Model, Policy
from fastgrpo.records import SAMPLE, Prompted, Schedule, noise_address
from fastgrpo.sampling.generate import generate
from fastgrpo.sampling.schedule import ode_schedule, with_experts
from fastgrpo_kernels import INITIAL_STEP, NoiseAddress, normal


def drawn(model: Model, prompts: Sequence[str | ImagePrompt], num_steps: int, guidance_scale: float) -> Tensor:
    """Images of these prompts with the noise of samples 0, 1, 2, ..."""
    prompted = Embeddings(model).prompted(prompts, guidance_scale)
    address = noise_address(SAMPLE, 0, 0, torch.arange(len(prompts)))
    return generate(model, Policy(model), prompted, address, num_steps=num_steps, guidance_scale=guidance_scale)


def noise(model: Model, count: int) -> Tensor:
    """The latents (B, *D) that a rollout of so many samples starts from."""
    address = noise_address(SAMPLE, 0, 0, torch.arange(count))
    shape = torch.Size(model.latent_shape)
    return normal(address, INITIAL_STEP, shape.numel()).view(count, *shape)


def ode_arguments(
    model: Model, prompts: Sequence[str | ImagePrompt], num_steps: int, guidance_scale: float
) -> tuple[Schedule, NoiseAddress, Prompted, float]:
    """What `rollout` is given after the policy."""
    address = noise_address(SAMPLE, 0, 0, torch.arange(len(prompts)))
    prompted = Embeddings(model).prompted(prompts, guidance_scale)
    schedule = with_experts(ode_schedule(model.sigmas(num_steps), len(prompts)), model)
    return schedule, address, prompted, guidance_scale
