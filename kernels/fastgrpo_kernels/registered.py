"""The operations as `torch.compile` and `torch.export` see them: one node each, in the namespace `fastgrpo`.

    x, x_model, v, log_prob = sde_step(...)          eager: the kernels, or the reference, at once
                                                     compiled: torch.ops.fastgrpo.sde_step, which does the same in the graph

A node is opaque: the compiler neither fuses into it nor rounds in another way, so compiled and eager results are the same
bits. Only a compiled graph goes by way of these, since a registered operation costs the host more than the call itself.

A registered operation may return neither an input nor one tensor twice. Where a public function does, or leaves a tensor
out, the operation has an empty tensor in its place. B samples, D elements a sample.
"""

from typing import Any

import torch
from torch import Tensor

from fastgrpo_kernels.common import runs_kernels
from fastgrpo_kernels.guidance import Guided, guided_velocity_by_device
from fastgrpo_kernels.philox import NoiseAddress, normal_by_device
from fastgrpo_kernels.sde_step import sde_step_by_device
from fastgrpo_kernels.transition import (
    Inputs,
    transition_bwd_ref,
    transition_bwd_triton,
    transition_fwd_triton,
    transition_ref,
)


@torch.library.custom_op("fastgrpo::normal", mutates_args=())
def normal(seed: Tensor, iteration: Tensor, sample_id: Tensor, step: Tensor, size: int) -> Tensor:
    return normal_by_device(NoiseAddress(seed, iteration, sample_id), step, size)


@normal.register_fake
def _(seed, iteration, sample_id, step, size):
    return torch.empty(sample_id.shape[0], size, dtype=torch.float32, device=step.device)


@torch.library.custom_op("fastgrpo::guided_velocity", mutates_args=())
def guided_velocity(v: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    return guided_velocity_by_device(Guided(v, v_uncond, scale))


@guided_velocity.register_fake
def _(v, v_uncond, scale):
    return torch.empty_like(v, dtype=torch.float32)


@torch.library.custom_op("fastgrpo::sde_step", mutates_args=())
def sde_step(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    scale: float,
    table: Tensor,
    step: Tensor,
    seed: Tensor,
    iteration: Tensor,
    sample_id: Tensor,
    model_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`SdeStep`, with an empty x_next_model where it would be x_next, and an empty v where it would be the input."""
    velocity, address = Guided(v, v_uncond, scale), NoiseAddress(seed, iteration, sample_id)
    out = sde_step_by_device(x, velocity, table, step, address, model_dtype)
    x_next_model = x.new_empty(0) if out.x_next_model is out.x_next else out.x_next_model
    return out.x_next, x_next_model, x.new_empty(0) if out.v is v else out.v, out.log_prob


@sde_step.register_fake
def _(x, v, v_uncond, scale, table, step, seed, iteration, sample_id, model_dtype):
    x_next_model = x.new_empty(0) if model_dtype == x.dtype else torch.empty_like(x, dtype=model_dtype)
    v_guided = x.new_empty(0) if v_uncond is None else torch.empty_like(x)
    return torch.empty_like(x), x_next_model, v_guided, x.new_empty(x.shape[0])


# The fields of `Inputs`, in its order.
INPUTS = "Tensor x_next, Tensor x, Tensor v, Tensor v_old, Tensor coefficients, Tensor? v_uncond, Tensor? v_ref, float scale"


@torch.library.custom_op("fastgrpo::transition", mutates_args=(), schema=f"({INPUTS}) -> Tensor")
def transition(*arguments: Any) -> Tensor:
    """The three moments as one tensor (3, B)."""
    inputs = Inputs(*arguments)
    if runs_kernels(inputs.x):
        return transition_fwd_triton(inputs)
    velocity = Guided(inputs.v, inputs.v_uncond, inputs.scale)
    moments = transition_ref(inputs.x_next, inputs.x, velocity, inputs.v_old, inputs.coefficients, v_ref=inputs.v_ref)
    return torch.stack(moments)


@transition.register_fake
def _(*inputs):
    x = Inputs(*inputs).x
    return x.new_empty(3, x.shape[0])


@torch.library.custom_op(
    "fastgrpo::transition_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {INPUTS}, bool wants_v, bool wants_v_uncond) -> (Tensor, Tensor)",
)
def transition_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """dL/dv and dL/dv_uncond of the gradient (3, B) of `transition`, an empty tensor for one that is not wanted."""
    *fields, wants_v, wants_v_uncond = arguments
    inputs = Inputs(*fields)
    if runs_kernels(inputs.x):
        dv, dv_uncond = transition_bwd_triton(grad, inputs, wants_v, wants_v_uncond)
    else:
        dv, dv_uncond = transition_bwd_ref(grad, inputs)
    nothing = grad.new_empty(0)
    return (dv if dv is not None and wants_v else nothing), (
        dv_uncond if dv_uncond is not None and wants_v_uncond else nothing
    )


@transition_backward.register_fake
def _(grad, *arguments):
    *fields, wants_v, wants_v_uncond = arguments
    inputs = Inputs(*fields)
    dv = torch.empty_like(inputs.v) if wants_v else grad.new_empty(0)
    if inputs.v_uncond is None or not wants_v_uncond:
        return dv, grad.new_empty(0)
    return dv, torch.empty_like(inputs.v_uncond)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, _, wants_v, _, _, wants_v_uncond, _, _ = ctx.needs_input_grad
    dv, dv_uncond = transition_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale, wants_v, wants_v_uncond)
    return None, None, dv if wants_v else None, None, None, dv_uncond if wants_v_uncond else None, None, None


transition.register_autograd(_gradients, setup_context=_save)
