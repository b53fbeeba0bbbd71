"""The moments of a stored transition under a new velocity: all that an objective needs of (B, D).

    e  = x' - (c_x x + c_v v_old)        what the noise did
    d  = c_v (v - v_old)                 how far the policy moved the mean
    k  = c_v (v - v_ref)                 how far it is from the reference
    m1 = mean(e d)    m2 = mean(d d)    m3 = mean(k k)          v = v_uncond + g (v - v_uncond) under guidance

From these, log-ratio = w (2 m1 - m2) with w = 1 / (2 s^2), and KL = m3 / (2 s^2) (Flow-GRPO, arXiv
2505.05470). The difference form is exactly 0 on-policy and has none of the cancellation of log_prob_new -
log_prob_old.

    dL/dv = g c_v / D (g1 e + 2 g2 d + 2 g3 k)       gi = dL/dmi;  1 - g in place of g for v_uncond

B samples, D elements a sample, BLOCKS = ceil(D / BLOCK).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo_kernels.checks import VELOCITY_DTYPES, check_latents, check_tensor
from fastgrpo_kernels.common import BLOCK, NUM_WARPS, cdiv, columns, runs_kernels, sum_row
from fastgrpo_kernels.guidance import Guided, check_velocity, guided_velocity_ref, load_velocity
from fastgrpo_kernels.optional_triton import tl, triton


class Moments(NamedTuple):
    """Means over the elements of a sample."""

    m1: Tensor  # (B,) mean(e d)
    m2: Tensor  # (B,) mean(d d)
    m3: Tensor  # (B,) mean(k k), zeros without a reference


class Inputs(NamedTuple):
    """All that a transition's moments are made of, each tensor by itself, as autograd and the compiler ask for them."""

    x_next: Tensor  # (B, *D) fp32
    x: Tensor  # (B, *D) fp32
    v: Tensor  # (B, *D) any float
    v_old: Tensor  # (B, *D) any float
    coefficients: Tensor  # (B, 4) fp32
    v_uncond: Tensor | None  # (B, *D) any float
    v_ref: Tensor | None  # (B, *D) any float
    scale: float


def differences_ref(
    x_next: Tensor, x: Tensor, velocity: Guided | Tensor, v_old: Tensor, coefficients: Tensor, v_ref: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """e, d and k, (B, *D) each; k is 0 without a reference."""
    c_x, c_v, _ = columns(coefficients, x)
    v = guided_velocity_ref(velocity, x.dtype)
    d = c_v * (v - v_old)
    k = torch.zeros_like(d) if v_ref is None else c_v * (v - v_ref)
    return x_next - (c_x * x + c_v * v_old), d, k


def transition_ref(
    x_next: Tensor,
    x: Tensor,
    velocity: Guided | Tensor,
    v_old: Tensor,
    coefficients: Tensor,
    *,
    v_ref: Tensor | None = None,
) -> Moments:
    """The definition of `transition` in torch, differentiable, in the dtype of x."""
    x_next, x, v_old, coefficients = (t.detach() for t in (x_next, x, v_old, coefficients))
    e, d, k = differences_ref(x_next, x, velocity, v_old, coefficients, None if v_ref is None else v_ref.detach())
    return Moments(*(product.flatten(1).mean(1) for product in (e * d, d * d, k * k)))


def transition_bwd_ref(grad: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """dL/dv and dL/dv_uncond by the module's last formula, in the bits that autograd makes of `transition_ref`.

    grad: (3, B), dL/dm1, dL/dm2, dL/dm3.
    """
    x_next, x, v, v_old, coefficients, v_uncond, v_ref, scale = inputs
    e, d, k = differences_ref(x_next, x, Guided(v, v_uncond, scale), v_old, coefficients, v_ref)
    _, c_v, _ = columns(coefficients, x)
    g1, g2, g3 = (grad / x[0].numel()).view(3, -1, *[1] * (x.dim() - 1))
    dv_guided = c_v * (g1 * e + 2 * (g2 * d)) + c_v * (2 * (g3 * k))
    if v_uncond is None:
        return dv_guided.to(v.dtype), None
    # 1 - g is two terms in autograd, each rounded to the dtype of v_uncond before they are added.
    dv = scale * dv_guided
    return dv.to(v.dtype), dv_guided.to(v_uncond.dtype) - dv.to(v_uncond.dtype)


@triton.jit
def load_differences(x_next, x, v, v_old, coefficients, v_uncond, v_ref, guidance_scale, D, BLOCK: tl.constexpr):
    """The block's offsets and mask, c_v, and e, d, k, which are 0 outside the row."""
    i_block, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c_x, c_v = tl.load(coefficients + i_b * 4), tl.load(coefficients + i_b * 4 + 1)
    o_d = i_block * BLOCK + tl.arange(0, BLOCK)
    m_x = o_d < D
    o_x = i_b * D + o_d
    b_v = load_velocity(v, v_uncond, guidance_scale, o_x, m_x)
    b_old = tl.load(v_old + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = tl.load(x + o_x, mask=m_x, other=0.0)
    # e = x' - (c_x x + c_v v_old), the mean rounded as in the rollout
    b_e = tl.load(x_next + o_x, mask=m_x, other=0.0) - tl.fma(b_old, c_v, c_x * b_x)
    b_d = c_v * (b_v - b_old)
    if v_ref is not None:
        b_k = c_v * (b_v - tl.load(v_ref + o_x, mask=m_x, other=0.0).to(tl.float32))
    else:
        b_k = tl.zeros_like(b_d)
    return o_x, m_x, c_v, b_e, b_d, b_k


@triton.jit
def transition_fwd_kernel(
    x_next,  # (B, D) fp32
    x,  # (B, D) fp32
    v,  # (B, D) any float
    v_old,  # (B, D) any float
    coefficients,  # (B, 4) fp32
    v_uncond,  # (B, D) any float, or None
    v_ref,  # (B, D) any float, or None
    partial,  # (3, B, BLOCKS) fp32, sums of e d, d d, k k
    guidance_scale,
    D,
    BLOCK: tl.constexpr,
):
    _, _, _, b_e, b_d, b_k = load_differences(x_next, x, v, v_old, coefficients, v_uncond, v_ref, guidance_scale, D, BLOCK)
    BLOCKS, B = tl.num_programs(0), tl.num_programs(1)
    p_partial = partial + tl.program_id(1).to(tl.int64) * BLOCKS + tl.program_id(0)
    tl.store(p_partial, tl.sum(b_e * b_d))
    tl.store(p_partial + B * BLOCKS, tl.sum(b_d * b_d))
    tl.store(p_partial + 2 * B * BLOCKS, tl.sum(b_k * b_k))


@triton.jit
def moments_fwd_kernel(
    partial,  # (3 B, BLOCKS) fp32
    moments,  # (3 B,) fp32
    BLOCKS,
    D,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    tl.store(moments + i_row, sum_row(partial + i_row * BLOCKS, BLOCKS, BLOCK) / D)


@triton.jit
def transition_bwd_kernel(
    x_next,  # (B, D) fp32
    x,  # (B, D) fp32
    v,  # (B, D) any float
    v_old,  # (B, D) any float
    coefficients,  # (B, 4) fp32
    v_uncond,  # (B, D) any float, or None
    v_ref,  # (B, D) any float, or None
    grad,  # (3, B) fp32, dL/dm1, dL/dm2, dL/dm3
    dv,  # (B, D) as v, or None
    dv_uncond,  # (B, D) as v_uncond, or None
    guidance_scale,
    D,
    BLOCK: tl.constexpr,
):
    o_x, m_x, c_v, b_e, b_d, b_k = load_differences(
        x_next, x, v, v_old, coefficients, v_uncond, v_ref, guidance_scale, D, BLOCK
    )
    i_b, B = tl.program_id(1), tl.num_programs(1)
    g1, g2, g3 = tl.load(grad + i_b), tl.load(grad + B + i_b), tl.load(grad + 2 * B + i_b)
    # dL/dv_guided = c_v / D (g1 e + 2 g2 d + 2 g3 k)
    b_grad = (c_v / D) * (g1 * b_e + 2.0 * g2 * b_d + 2.0 * g3 * b_k)
    if dv is not None:
        if v_uncond is not None:
            tl.store(dv + o_x, guidance_scale * b_grad, mask=m_x)
        else:
            tl.store(dv + o_x, b_grad, mask=m_x)
    if dv_uncond is not None:
        tl.store(dv_uncond + o_x, (1.0 - guidance_scale) * b_grad, mask=m_x)


def transition_fwd_triton(inputs: Inputs) -> Tensor:
    """The three moments as one tensor (3, B), so that their three upstream gradients arrive as one."""
    *tensors, scale = inputs
    batch, size = inputs.x.shape[0], inputs.x.shape[1:].numel()
    blocks = cdiv(size, BLOCK)
    partial = torch.empty(3, batch, blocks, dtype=torch.float32, device=inputs.x.device)
    moments = torch.empty(3, batch, dtype=torch.float32, device=inputs.x.device)
    transition_fwd_kernel[(blocks, batch)](*tensors, partial, scale, size, BLOCK=BLOCK, num_warps=NUM_WARPS)
    moments_fwd_kernel[(3 * batch,)](partial, moments, blocks, size, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return moments


def transition_bwd_triton(
    grad: Tensor, inputs: Inputs, wants_v: bool, wants_v_uncond: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dv and dL/dv_uncond, each where it is wanted; grad: (3, B), contiguous."""
    *tensors, scale = inputs
    batch, size = inputs.x.shape[0], inputs.x.shape[1:].numel()
    dv = torch.empty_like(inputs.v) if wants_v else None
    dv_uncond = torch.empty_like(inputs.v_uncond) if inputs.v_uncond is not None and wants_v_uncond else None
    transition_bwd_kernel[(cdiv(size, BLOCK), batch)](
        *tensors, grad, dv, dv_uncond, scale, size, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return dv, dv_uncond


class Transition(torch.autograd.Function):
    """`transition_fwd_triton` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)
        return transition_fwd_triton(Inputs(*inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, wants_v, _, _, wants_v_uncond, _, _ = ctx.needs_input_grad
        inputs = Inputs._make([*ctx.saved_tensors, ctx.scale])
        dv, dv_uncond = transition_bwd_triton(grad.contiguous(), inputs, wants_v, wants_v_uncond)
        return None, None, dv, None, None, dv_uncond, None, None


def transition_triton(
    x_next: Tensor,
    x: Tensor,
    velocity: Guided | Tensor,
    v_old: Tensor,
    coefficients: Tensor,
    *,
    v_ref: Tensor | None = None,
) -> Moments:
    """`transition_ref` as two kernels forward and one backward."""
    v, v_uncond, scale = Guided.of(velocity)
    moments = Transition.apply(x_next, x, v, v_old, coefficients, v_uncond, v_ref, float(scale))
    return Moments(*moments.unbind(0))


def transition(
    x_next: Tensor,
    x: Tensor,
    velocity: Guided | Tensor,
    v_old: Tensor,
    coefficients: Tensor,
    *,
    v_ref: Tensor | None = None,
) -> Moments:
    """The moments m1, m2, m3 of a stored transition; gradients flow to `velocity` only.

    x_next, x: (B, *D) fp32. velocity: (B, *D) fp32, bf16 or fp16, or a `Guided` of two such. v_old, v_ref: (B, *D) in
    one of these dtypes, already guided.
    coefficients: (B, 4) fp32, the row (c_x, c_v, s, w) of each sample. Log-ratio = w (2 m1 - m2).
    """
    velocity, shape = Guided.of(velocity), tuple(x.shape)
    check_latents("x", x)
    check_tensor("x_next", x_next, x, shape, torch.float32)
    check_tensor("coefficients", coefficients, x, (shape[0], 4), torch.float32)
    check_velocity(velocity, x)
    check_tensor("v_old", v_old, x, shape, *VELOCITY_DTYPES)
    if v_ref is not None:
        check_tensor("v_ref", v_ref, x, shape, *VELOCITY_DTYPES)
    if torch.compiler.is_compiling():
        v, v_uncond, scale = velocity
        inputs = Inputs(x_next, x, v, v_old, coefficients, v_uncond, v_ref, float(scale))
        return Moments(*torch.ops.fastgrpo.transition(*inputs).unbind(0))
    run = transition_triton if runs_kernels(x) else transition_ref
    return run(x_next, x, velocity, v_old, coefficients, v_ref=v_ref)
