"""The reduced-step rollout: noise to latents, without a host in the loop.

    for each step i:   v = network(x, sigma_i)        x' = c_x[i] x + c_v[i] v + s[i] eps[i]

A multistep solver adds c_p[i] D_prev, with D_prev the data predicted at the step before. Samples that start from the same
noise are one sample until their window begins, and go through the network once.

Coefficients and noise addresses lie in device tensors, and what is trained on is written to fixed places, so nothing here
waits for the device. Evaluation is the same loop with the ODE's table and nothing to train.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgrpo.records import Rollout, Steps
from fastgrpo_kernels import INITIAL_STEP, Guided, NoiseAddress, normal, sde_step

# (v, v_uncond, scale) -> v: guidance that is more than v_uncond + scale (v - v_uncond)
GuidanceRule = Callable[[Tensor, Tensor, float], Tensor]


def velocities(
    policy: nn.Module,
    x: Tensor,  # (B, *D) in the model's dtype
    sigma: Tensor,  # (B,) float32
    conditioning: tuple,  # of tensors (B, ...), or (2 B, ...) from `with_unconditional`
    guidance_scale: float = 1.0,
    rule: GuidanceRule | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The velocity with the prompt and, under guidance, the one without, (B, *D) each, from one forward pass.

    By a rule the first is what that makes of both, and there is no second; without one the kernels combine them.
    """
    if len(conditioning[0]) == len(x):
        return policy(x, sigma, conditioning), None
    v_uncond, v = policy(torch.cat([x, x]), torch.cat([sigma, sigma]), conditioning).chunk(2)
    return (v, v_uncond) if rule is None else (rule(v, v_uncond, guidance_scale), None)


@torch.no_grad()
def rollout(
    policy: nn.Module,
    steps: Steps,
    address: NoiseAddress,  # of B samples
    conditioning: tuple,  # of tensors (B, ...), or (2 B, ...) under guidance
    *,
    guidance_scale: float,
    latent_shape: tuple[int, ...],
    model_dtype: torch.dtype,
    guidance_rule: GuidanceRule | None = None,
) -> Rollout:
    """Denoise B samples, keeping of the trajectory what is trained on."""
    batch, size = address.sample_id.numel(), steps.size
    options = dict(
        guidance_scale=guidance_scale, latent_shape=latent_shape, model_dtype=model_dtype, guidance_rule=guidance_rule
    )
    if steps.siblings > 1:
        x = _shared_start(policy, steps, address, conditioning, **options)
    else:
        x = normal(address, INITIAL_STEP, math.prod(latent_shape)).view(batch, *latent_shape)
    x_model = x.to(model_dtype)
    data = None if steps.history is None else torch.zeros_like(x)  # predicted at the step before
    # Each sample's window starts where its group's does, so a step's place differs by sample; steps that are not
    # trained on are written to one place past the end, which is cut off.
    latents = x.new_empty(size + 2, batch, *latent_shape)
    guided = len(conditioning[0]) != batch and guidance_rule is None
    # Without guidance by the kernel the velocity is what the network returned, and is kept in its dtype.
    v_old = x.new_empty(size + 1, batch, *latent_shape, dtype=torch.float32 if guided else model_dtype)
    log_prob = x.new_empty(size + 1, batch)
    rows = torch.arange(batch, device=x.device)
    indices = torch.arange(steps.table.shape[1], device=x.device)  # (T,)

    for i in range(steps.prefix, steps.table.shape[1]):
        place = i - steps.start  # (B,)
        before = (place >= 0) & (place <= size)
        trained = (place >= 0) & (place < size)
        latents[torch.where(before, place, size + 1), rows] = x
        sigma = steps.sigmas[i].expand(batch)
        v, v_uncond = velocities(policy, x_model, sigma, conditioning, guidance_scale, guidance_rule)
        # c_x (x + c_p / c_x D_prev) = c_x x + c_p D_prev; exactly c_x x where c_p = 0, so in the window too.
        remembering = x if data is None else x + _column(steps.history, i, x) * data
        velocity = Guided(v, v_uncond, guidance_scale)
        step = sde_step(remembering, velocity, steps.table, indices[i : i + 1], address, model_dtype=model_dtype)
        v_old[torch.where(trained, place, size), rows] = step.v
        log_prob[torch.where(trained, place, size), rows] = step.log_prob
        if data is not None:
            data = x - steps.sigmas[i] * step.v.to(x.dtype)
        x, x_model = step.x_next, step.x_next_model
    return Rollout(latents[: size + 1], v_old[:size], log_prob[:size], x)


def _column(rows: Tensor, i: int, x: Tensor) -> Tensor:
    """Column i of (B, T), shaped to multiply x."""
    return rows[:, i].view(-1, *[1] * (x.dim() - 1))


def _shared_start(policy: nn.Module, steps: Steps, address: NoiseAddress, conditioning: tuple, **options) -> Tensor:
    """Where the window begins, (B, *D), from the first sample of every `siblings` alone: an ODE rollout of its own."""
    if address.sample_id.numel() % steps.siblings:
        raise ValueError(f"a batch of {address.sample_id.numel()} does not hold whole groups of {steps.siblings} siblings")

    def first(rows: Tensor) -> Tensor:
        return rows[:: steps.siblings].contiguous()

    before = Steps(
        sigmas=steps.sigmas[: steps.prefix + 1], table=first(steps.table[:, : steps.prefix]), start=first(steps.start),
        size=0, kl_weight=steps.kl_weight,
    )  # fmt: skip
    # Under guidance the rows of the empty prompt come first, as many again: both halves are whole groups.
    result = rollout(
        policy, before, address._replace(sample_id=first(address.sample_id)),
        type(conditioning)(*(first(tensor) for tensor in conditioning)), **options,
    )  # fmt: skip
    return result.final.repeat_interleave(steps.siblings, dim=0)
