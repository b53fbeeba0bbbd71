"""From prompts to images: embeddings made once a prompt, the steps of a sampler, the loop, the decoder.

Training, evaluation and sampling all draw their images through here, so they agree on what a prompt, a seed and a sample
number mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgrpo import sde
from fastgrpo.rollout import rollout, with_unconditional
from fastgrpo.trajectory import Steps, concatenate, noise_address


class Embeddings:
    """The conditioning of prompts, computed once for each.

    Prompts are encoded one at a time: in a batch, the last bits would depend on which other prompts were new, and with
    them the whole run after a resume.
    """

    def __init__(self, model) -> None:  # noqa: ANN001 (any adapter of fastgrpo.models)
        self._model = model
        self._known: dict[str, tuple] = {}

    def __call__(self, prompts: Sequence[str], *, guidance_scale: float) -> tuple:
        """Rows for `rollout`: the prompts', and under guidance those of the empty prompt before them."""
        conditioning = concatenate([self._one(prompt) for prompt in prompts])
        return with_unconditional(conditioning, None if guidance_scale == 1 else self._one(""))

    def _one(self, prompt: str) -> tuple:
        if prompt not in self._known:
            self._known[prompt] = self._model.encode([prompt])
        return self._known[prompt]


def ode_steps(model, num_steps: int, batch: int) -> Steps:  # noqa: ANN001
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
    model,  # noqa: ANN001 (any adapter of fastgrpo.models)
    policy: nn.Module,
    embeddings: Embeddings,
    prompts: Sequence[str],  # B
    sample_id: Tensor,  # (B,) int64, the address of each image's noise
    *,
    stream: int,
    seed: int,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Images (B, 3, H, W) uint8 by the ODE."""
    result = rollout(
        policy,
        ode_steps(model, num_steps, len(prompts)),
        noise_address(stream, seed, 0, sample_id.to(model.device)),
        embeddings(prompts, guidance_scale=guidance_scale),
        guidance_scale=guidance_scale,
        latent_shape=model.latent_shape,
        model_dtype=model.dtype,
    )
    return model.decode(result.final)
