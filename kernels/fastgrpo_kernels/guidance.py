"""Classifier-free guidance, in one expression for all kernels.

    v_guided = v_uncond + g (v - v_uncond)        the difference rounded, then one fma; v itself without v_uncond

The rollout and the update make the guided velocity inside their own kernels, from `load_velocity`. `guided_velocity` makes
it for whoever needs it by itself, and has the kernels' rounding. So the first ratio is exactly 1 under guidance too, whether
v_old is what the rollout stored or is made anew before the update. Torch rounds the product as well: with a v_old of its own
the ratio would only be near 1.

B samples, D elements a sample.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo_kernels.checks import VELOCITY_DTYPES, check_latents, check_tensor
from fastgrpo_kernels.common import BLOCK, NUM_WARPS, cdiv, runs_kernels
from fastgrpo_kernels.optional_triton import tl, triton


class Guided(NamedTuple):
    """A velocity and how it is guided. Without `v_uncond` it is `v`, whatever the scale."""

    v: Tensor  # (B, *D) fp32, bf16 or fp16, with the prompt
    v_uncond: Tensor | None = None  # (B, *D) fp32, bf16 or fp16, without it
    scale: float = 1.0

    @classmethod
    def of(cls, velocity: "Guided | Tensor") -> "Guided":
        """A plain tensor is a velocity without guidance."""
        if isinstance(velocity, Guided):
            return velocity
        if not isinstance(velocity, Tensor):
            raise TypeError(f"velocity is a {type(velocity).__name__}, expected a Tensor or Guided(v, v_uncond, scale)")
        return cls(velocity)


def check_velocity(velocity: Guided, x: Tensor) -> None:
    """Both in the shape of x, each in a dtype that a network returns."""
    check_tensor("v", velocity.v, x, tuple(x.shape), *VELOCITY_DTYPES)
    if velocity.v_uncond is not None:
        check_tensor("v_uncond", velocity.v_uncond, x, tuple(x.shape), *VELOCITY_DTYPES)


def guided_velocity_ref(velocity: Guided | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition of `guided_velocity` in torch, differentiable, computed in `dtype`."""
    v, v_uncond, scale = Guided.of(velocity)
    if v_uncond is None:
        return v.to(dtype)
    return v_uncond.to(dtype) + scale * (v.to(dtype) - v_uncond.to(dtype))


@triton.jit
def load_velocity(v, v_uncond, guidance_scale, o_x, m_x):
    """A block of the guided velocity. One expression for rollout and training, with an explicit fma: were the
    compiler to choose, the two could round differently, and the on-policy ratio would not be exactly 1."""
    b_v = tl.load(v + o_x, mask=m_x, other=0.0).to(tl.float32)
    if v_uncond is not None:
        b_u = tl.load(v_uncond + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_v = tl.fma(b_v - b_u, guidance_scale, b_u)
    return b_v


@triton.jit
def guided_velocity_fwd_kernel(
    v,  # (B, D) any float
    v_uncond,  # (B, D) any float
    v_guided,  # (B, D) fp32
    guidance_scale,
    D,
    BLOCK: tl.constexpr,
):
    i_block, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = i_block * BLOCK + tl.arange(0, BLOCK)
    m_x = o_d < D
    o_x = i_b * D + o_d
    tl.store(v_guided + o_x, load_velocity(v, v_uncond, guidance_scale, o_x, m_x), mask=m_x)


def guided_velocity_triton(velocity: Guided | Tensor) -> Tensor:
    """`guided_velocity_ref` as one kernel."""
    v, v_uncond, scale = Guided.of(velocity)
    if v_uncond is None:
        return v.float()
    batch, size = v.shape[0], v.shape[1:].numel()
    v_guided = torch.empty_like(v, dtype=torch.float32)
    guided_velocity_fwd_kernel[(cdiv(size, BLOCK), batch)](
        v, v_uncond, v_guided, float(scale), size, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return v_guided


def guided_velocity_by_device(velocity: Guided) -> Tensor:
    """By the kernel where it runs, else by the reference."""
    run = guided_velocity_triton if runs_kernels(velocity.v) else guided_velocity_ref
    return run(velocity)


@torch.no_grad()
def guided_velocity(velocity: Guided | Tensor) -> Tensor:
    """`v_uncond + g (v - v_uncond)`, or `v` where there is no v_uncond: (B, *D) fp32, without gradient.

    In the bits that `sde_step` and `transition` make of the same velocity: as `v_old` it gives a ratio of exactly 1.
    """
    velocity = Guided.of(velocity)
    check_latents("v", velocity.v, *VELOCITY_DTYPES)
    check_velocity(velocity, velocity.v)
    if torch.compiler.is_compiling() and velocity.v_uncond is not None:
        return torch.ops.fastgrpo.guided_velocity(velocity.v, velocity.v_uncond, float(velocity.scale))
    return guided_velocity_by_device(velocity).detach()
