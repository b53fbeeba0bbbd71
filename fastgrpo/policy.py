"""A model as a policy: what an engine wraps, a rollout samples from, and an update trains.

v = network(x, sigma, conditioning)          under guidance one pass over both conditionings of each sample
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.records import Prompted, concatenate
from fastgrpo_kernels import Guided

# (x (B, *D) in the model's dtype, sigma (B,) float32, conditioning) -> v (B, *D)
Network = Callable[[Tensor, Tensor, tuple], Tensor]
# (v, v_uncond, scale) -> v: guidance that is more than v_uncond + scale (v - v_uncond)
GuidanceRule = Callable[[Tensor, Tensor, float], Tensor]


Model = Any


class Policy(nn.Module):
    """A model's network as a module, with what a rollout needs to know of it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.transformer = model.transformer
        self.velocity = model.velocity
        self.latent_shape: tuple[int, ...] = model.latent_shape
        self.dtype: torch.dtype = model.dtype  # of what the network reads
        self.guide: GuidanceRule | None = model.guide  # the model's own guidance, where it has one

    def forward(self, x: Tensor, sigma: Tensor, conditioning: tuple) -> Tensor:
        """The velocity v = noise - data at x (B, *D) and sigma (B,)."""
        return self.velocity(x, sigma, conditioning)


def prompted_velocity(
    network: Network, prompted: Prompted, guidance_scale: float = 1.0, guide: GuidanceRule | None = None
) -> Callable[[Tensor, Tensor], Guided]:
    """The network under these prompts, a function of x (B, *D) and sigma (B,): its velocity with and without the prompt.

    The kernels combine the two. By a rule of the model's own, `guide`, they are combined here, and there is one.
    """
    cond, uncond = prompted
    if uncond is None:
        return lambda x, sigma: Guided(network(x, sigma, cond))
    both = concatenate([uncond, cond])

    def velocity(x: Tensor, sigma: Tensor) -> Guided:
        v_uncond, v = network(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return Guided(v, v_uncond, guidance_scale) if guide is None else Guided(guide(v, v_uncond, guidance_scale))

    return velocity
