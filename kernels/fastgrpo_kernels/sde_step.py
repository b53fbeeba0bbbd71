"""One denoising transition of any sampler: a row of a table, one kernel.

    x'       = c_x x + c_v v + s eps              eps = addressed noise, see philox.py
    v        = v_uncond + g (v - v_uncond)        classifier-free guidance, where the velocity is `Guided`
    log_prob = mean_D log N(eps; 0, 1) - log s = -mean(eps^2) / 2 - log s - log(2 pi) / 2;  0 where s = 0

The mean over D instead of the sum is Flow-GRPO's (arXiv 2505.05470). A table row is (c_x, c_v, s, w); the
kernel knows no sampler, and the last column, the weight of the log-ratio, is for the objective. Every index
that changes between steps lies in a device tensor, so one captured launch serves every step, window and
replay.

B samples, D elements a sample, T steps, SUMS = ceil(D / SUM).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo_kernels.checks import VELOCITY_DTYPES, check_latents, check_tensor
from fastgrpo_kernels.common import BLOCK, NUM_WARPS, cdiv, columns, runs_kernels, sum_row
from fastgrpo_kernels.guidance import Guided, check_velocity, guided_velocity_ref, load_velocity
from fastgrpo_kernels.optional_triton import tl, triton
from fastgrpo_kernels.philox import NoiseAddress, check_address, interleave4, normal_ref, philox_normal4

HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))
SUM = 128  # elements of a partial sum of eps^2: four in each of 32 threads, which are a warp, or half of one of AMD's
UNROLLED = 4  # blocks a program in a large batch: with more, fewer than 1024 threads fit on a multiprocessor
LARGE_BATCH = 2**22  # elements: 1024 programs of four blocks, 8 for each multiprocessor of an H100


class SdeStep(NamedTuple):
    """What one transition leaves behind."""

    x_next: Tensor  # (B, *D) fp32
    x_next_model: Tensor  # (B, *D) in the dtype that the network reads; x_next itself when that is fp32
    v: Tensor  # (B, *D) the velocity as used: under guidance the guided one in fp32, else the input itself
    log_prob: Tensor  # (B,) fp32


def sde_step_ref(
    x: Tensor,
    velocity: Guided | Tensor,
    table: Tensor,
    step: Tensor,
    address: NoiseAddress,
    *,
    model_dtype: torch.dtype | None = None,
) -> SdeStep:
    """The definition of `sde_step` in torch."""
    rows = table.expand(x.shape[0], -1, -1).index_select(1, step)  # (B, 1, 4)
    c_x, c_v, s = columns(rows, x)
    velocity = Guided.of(velocity)
    used = velocity.v if velocity.v_uncond is None else guided_velocity_ref(velocity, x.dtype)
    eps = normal_ref(address, step, x.shape[1:].numel()).view_as(x)
    x_next = c_x * x + c_v * used.to(x.dtype) + s * eps

    s = s.flatten()  # (B,)
    log_s = torch.log(torch.where(s > 0, s, 1.0))
    log_prob = -eps.flatten(1).square().mean(1) / 2 - log_s - HALF_LOG_2PI.value
    return SdeStep(x_next, x_next.to(model_dtype or x.dtype), used, torch.where(s > 0, log_prob, 0.0))


def blocks_a_program(batch: int, size: int) -> int:
    """How many blocks of a row one program of the transition takes; the results do not depend on it.

    Several share their scalars, addresses and the key of the noise, a fifth of the instructions for an element, which are
    what a large batch waits for where the memory is fast. A small batch is spread over all multiprocessors instead.
    """
    return UNROLLED if batch * size >= LARGE_BATCH and size % (UNROLLED * BLOCK) == 0 else 1


@triton.jit
def block_of_row(first, i, i_b, D, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Where the elements of a program's i-th block lie, and which of them are inside the row: all if EVEN."""
    o_d = first + (i * BLOCK + tl.arange(0, BLOCK))
    return i_b * D + o_d, (o_d < D) | EVEN


@triton.jit
def sum_squares4(n0, n1, n2, n3, left, SUM: tl.constexpr, EVEN: tl.constexpr):
    """The sum of squares over each SUM elements, in all the threads that hold them; `left` of a quad and what follows it
    lie inside the row.

    A sum stays within a warp, so that no thread waits for another warp. Its order is that of the threads and each fma is
    spelled out: the same bits whatever else the program does.
    """
    n0, n1 = tl.where((left > 0) | EVEN, n0, 0.0), tl.where((left > 1) | EVEN, n1, 0.0)
    n2, n3 = tl.where((left > 2) | EVEN, n2, 0.0), tl.where((left > 3) | EVEN, n3, 0.0)
    squares = tl.fma(n0, n0, tl.fma(n1, n1, tl.fma(n2, n2, n3 * n3)))
    b_quad = tl.reshape(squares, (4 * n0.numel // SUM, SUM // 4))
    return tl.reshape(tl.broadcast_to(tl.sum(b_quad, axis=1, keep_dims=True), b_quad.shape), n0.shape)


@triton.jit
def sde_step_fwd_kernel(
    x,  # (B, D) fp32
    v,  # (B, D) any float
    v_uncond,  # (B, D) any float, or None
    table,  # (B, T, 4) fp32
    step,  # (1,) int64
    seed,  # (1,) int64
    iteration,  # (1,) int64
    sample_id,  # (B,) int64
    x_next,  # (B, D) fp32
    x_next_model,  # (B, D) in the model's dtype, or None
    v_guided,  # (B, D) fp32, or None
    partial,  # (B, SUMS) fp32, sums of eps^2
    guidance_scale,
    table_stride,
    SUMS,
    D,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
    UNROLL: tl.constexpr,  # blocks a program
    EVEN: tl.constexpr,  # whether programs divide a row evenly
):
    first, i_b = tl.program_id(0) * (UNROLL * BLOCK), tl.program_id(1).to(tl.int64)
    i_step, i_sample, i_iteration, key = tl.load(step), tl.load(sample_id + i_b), tl.load(iteration), tl.load(seed)
    p_row = table + i_b * table_stride + i_step * 4
    c_x, c_v, s = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)

    # All that is loaded comes before all noise, so that the one hides how long the other takes.
    means = tl.tuple([])
    for i in tl.static_range(UNROLL):
        o_x, m_x = block_of_row(first, i, i_b, D, BLOCK, EVEN)
        b_x = tl.load(x + o_x, mask=m_x, other=0.0)
        b_v = load_velocity(v, v_uncond, guidance_scale, o_x, m_x)
        means += (tl.fma(b_v, c_v, c_x * b_x),)
        if v_guided is not None:
            tl.store(v_guided + o_x, b_v, mask=m_x)

    o_q = tl.arange(0, BLOCK // 4)
    for i in tl.static_range(UNROLL):
        o_quad = first // 4 + i * (BLOCK // 4) + o_q
        n0, n1, n2, n3 = philox_normal4(key, o_quad, i_step, i_sample, i_iteration)
        left = D - 4 * o_quad
        o_sum = first // SUM + i * (BLOCK // SUM) + o_q // (SUM // 4)
        m_sum = (o_q % (SUM // 4) == 0) & ((left > 0) | EVEN)  # of the threads with a sum the first
        tl.store(partial + i_b * SUMS + o_sum, sum_squares4(n0, n1, n2, n3, left, SUM, EVEN), mask=m_sum)
        # x' = c_x x + c_v v + s eps
        b_next = tl.fma(interleave4(n0, n1, n2, n3, BLOCK), s, means[i])
        o_x, m_x = block_of_row(first, i, i_b, D, BLOCK, EVEN)
        tl.store(x_next + o_x, b_next, mask=m_x)
        if x_next_model is not None:
            tl.store(x_next_model + o_x, b_next, mask=m_x)


@triton.jit
def log_prob_fwd_kernel(
    partial,  # (B, SUMS) fp32, sums of eps^2
    table,  # (B, T, 4) fp32
    step,  # (1,) int64
    log_prob,  # (B,) fp32
    table_stride,
    SUMS,
    D,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    s = tl.load(table + i_b * table_stride + tl.load(step) * 4 + 2)
    mean_square = sum_row(partial + i_b * SUMS, SUMS, BLOCK) / D
    b_log_prob = -mean_square / 2 - tl.log(tl.where(s > 0, s, 1.0)) - HALF_LOG_2PI
    tl.store(log_prob + i_b, tl.where(s > 0, b_log_prob, 0.0))


def sde_step_triton(
    x: Tensor,
    velocity: Guided | Tensor,
    table: Tensor,
    step: Tensor,
    address: NoiseAddress,
    *,
    model_dtype: torch.dtype | None = None,
) -> SdeStep:
    """`sde_step_ref` as two kernels: the transition, and the reduction of its partial sums."""
    v, v_uncond, scale = Guided.of(velocity)
    batch, size = x.shape[0], x.shape[1:].numel()
    blocks, sums = cdiv(size, BLOCK), cdiv(size, SUM)
    unroll = blocks_a_program(batch, size)
    x_next = torch.empty_like(x)
    x_next_model = torch.empty_like(x, dtype=model_dtype) if model_dtype not in (None, x.dtype) else None
    v_guided = torch.empty_like(x) if v_uncond is not None else None
    partial = torch.empty(batch, sums, dtype=torch.float32, device=x.device)
    log_prob = torch.empty(batch, dtype=torch.float32, device=x.device)
    table_stride = table.stride(0) if table.dim() == 3 else 0
    sde_step_fwd_kernel[(cdiv(blocks, unroll), batch)](
        x, v, v_uncond, table, step, address.seed, address.iteration, address.sample_id,
        x_next, x_next_model, v_guided, partial,
        float(scale), table_stride, sums, size,
        BLOCK=BLOCK, SUM=SUM, UNROLL=unroll, EVEN=size % (unroll * BLOCK) == 0, num_warps=NUM_WARPS,
    )  # fmt: skip
    log_prob_fwd_kernel[(batch,)](partial, table, step, log_prob, table_stride, sums, size, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return SdeStep(
        x_next,
        x_next if x_next_model is None else x_next_model,
        v if v_guided is None else v_guided,
        log_prob,
    )


def sde_step_by_device(
    x: Tensor, velocity: Guided, table: Tensor, step: Tensor, address: NoiseAddress, model_dtype: torch.dtype | None
) -> SdeStep:
    """By the kernels where they run, else by the reference."""
    run = sde_step_triton if runs_kernels(x) else sde_step_ref
    return run(x, velocity, table, step, address, model_dtype=model_dtype)


def sde_step_compiled(
    x: Tensor, velocity: Guided, table: Tensor, step: Tensor, address: NoiseAddress, model_dtype: torch.dtype | None
) -> SdeStep:
    """`sde_step_by_device` as a node of a compiled graph, see registered.py."""
    (v, v_uncond, scale), model_dtype = velocity, model_dtype or x.dtype
    out = torch.ops.fastgrpo.sde_step(x, v, v_uncond, float(scale), table, step, *address, model_dtype)
    x_next, x_next_model, v_guided, log_prob = out
    return SdeStep(x_next, x_next if model_dtype == x.dtype else x_next_model, v if v_uncond is None else v_guided, log_prob)


def _check_table(table: Tensor, x: Tensor) -> None:
    shape = tuple(table.shape)
    shared, per_sample = table.dim() == 2, table.dim() == 3 and shape[0] == x.shape[0]
    if not (shared or per_sample) or shape[-1] != 4:
        raise ValueError(f"table has shape {shape}, expected (T, 4) or ({x.shape[0]}, T, 4) with columns c_x, c_v, s, w")
    # The batch axis may be expanded; a row of the table may not.
    rows = table if shared else table[0]
    check_tensor("table", rows, x, tuple(rows.shape), torch.float32)


@torch.no_grad()
def sde_step(
    x: Tensor,
    velocity: Guided | Tensor,
    table: Tensor,
    step: Tensor,
    address: NoiseAddress,
    *,
    model_dtype: torch.dtype | None = None,
) -> SdeStep:
    """One transition `x' = c_x x + c_v v + s eps` with row `step` of the table, without gradient.

    x: (B, *D) fp32. velocity: (B, *D) fp32, bf16 or fp16, or a `Guided` of two such. table: (T, 4) for all samples
    or (B, T, 4), fp32. step: (1,) int64. model_dtype: the dtype of the copy of x' that the network reads next.
    """
    velocity = Guided.of(velocity)
    check_latents("x", x)
    check_velocity(velocity, x)
    check_tensor("step", step, x, (1,), torch.int64)
    check_address(address, step, x.shape[0])
    _check_table(table, x)
    if model_dtype not in (None, *VELOCITY_DTYPES):
        raise ValueError(f"model_dtype is {model_dtype}, expected None or one of {VELOCITY_DTYPES}")
    run = sde_step_compiled if torch.compiler.is_compiling() else sde_step_by_device
    return run(x, velocity, table, step, address, model_dtype)
