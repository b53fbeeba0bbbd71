"""From prompts to images: the steps of the ODE, the loop, the decoder.

Evaluation and sampling draw their images through here, so they agree on what a prompt, a seed and a sample number mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.records import Steps, noise_address
from fastgrpo.sampling import tables as sde
from fastgrpo.sampling.rollout import rollout


def ode_steps(model, num_steps: int, batch: int) -> Steps:
    """The deterministic sampler, with nothing to train."""
    sigmas = model.sigmas(num_steps)
    table = sde.coefficient_table("ode", sigmas, 0.0).float().to(model.device)
    return Steps(
        sigmas=sigmas.to(model.device),
        table=table.expand(batch, -1, -1),
        start=torch.zeros(batch, dtype=torch.int64, device=model.device),
        size=0,
        kl_weight=torch.zeros(num_steps, device=model.device),
    )


def generate(
    model,
    policy: nn.Module,
    embeddings: Embeddings,
    prompts: Sequence[str | ImagePrompt],  # B
    sample_id: Tensor,  # (B,) int64, the address of each image's noise
    *,
    stream: int,
    seed: int,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Images (B, 3, H, W) uint8, or videos (B, T, 3, H, W), by the ODE."""
    result = rollout(
        policy,
        ode_steps(model, num_steps, len(prompts)),
        noise_address(stream, seed, 0, sample_id.to(model.device)),
        embeddings(prompts, guidance_scale=guidance_scale),
        guidance_scale=guidance_scale,
        latent_shape=model.latent_shape,
        model_dtype=model.dtype,
        guidance_rule=model.guide,
    )
    return model.decode(result.final)
