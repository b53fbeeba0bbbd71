"""Addressed noise: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller.

    key      = seed (64 bit)
    counter  = (element // 4, step, sample_id, iteration)     4 x 32 bit
    r0..r3   = Philox4x32-10(key, counter)
    u        = r 2^-32 + 2^-33                                in (0, 1], rounded to fp32
    eps      of elements 4q, 4q+1, 4q+2, 4q+3:
               R cos(2 pi u1), R sin(2 pi u1)                 R = sqrt(-2 log u0)
               R cos(2 pi u3), R sin(2 pi u3)                 R = sqrt(-2 log u2)

Noise has an address instead of a history: a sample gets the same noise in any batch, on any rank, after a
resume and inside a replayed CUDA graph. The integers are exact everywhere; the normals of two platforms
differ by the last bits of log, cos and sin.

B samples, D elements a sample, Q = ceil(D / 4) quads, BLOCKS = ceil(D / BLOCK).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo_kernels.checks import check_tensor
from fastgrpo_kernels.common import BLOCK, NUM_WARPS, cdiv, runs_kernels
from fastgrpo_kernels.optional_triton import tl, triton

INITIAL_STEP = 2**32 - 1  # addresses the noise that a rollout starts from; transitions count from 0

_LOW_32 = 0xFFFFFFFF


class NoiseAddress(NamedTuple):
    """Where the noise of a batch lies: device tensors, which a captured graph reads anew at every replay."""

    seed: Tensor  # (1,) int64, all 64 bits are used
    iteration: Tensor  # (1,) int64, the low 32 bits are used
    sample_id: Tensor  # (B,) int64, the low 32 bits are used


def _multiply_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a 32 x 32 bit product; int64 wraps around, but its bits are those of uint64."""
    product = a * b
    return (product >> 32) & _LOW_32, product & _LOW_32


def philox_ref(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on 32-bit words held in int64; words and seed broadcast against each other."""
    c0, c1, c2, c3 = (word & _LOW_32 for word in counter)
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    for _ in range(10):
        high0, low0 = _multiply_high_low(0xD2511F53, c0)
        high1, low1 = _multiply_high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32, (k1 + 0xBB67AE85) & _LOW_32
    return c0, c1, c2, c3


def box_muller_ref(r0: Tensor, r1: Tensor) -> tuple[Tensor, Tensor]:
    # The uniforms are rounded to fp32 as in the kernel. From there float64: the vector and the scalar log,
    # cos and sin of a CPU differ in the last bit, which would make fp32 noise depend on where a batch or a
    # thread's share ends.
    u0, u1 = ((r.float() * 2.0**-32 + 2.0**-33).double() for r in (r0, r1))
    radius = torch.sqrt(-2.0 * torch.log(u0))
    return radius * torch.cos(2.0 * math.pi * u1), radius * torch.sin(2.0 * math.pi * u1)


def normal_ref(address: NoiseAddress, step: Tensor, size: int) -> Tensor:
    """The definition of `normal` in torch; `step` is a (1,) int64 tensor."""
    quad = torch.arange(cdiv(size, 4), device=step.device)  # (Q,)
    r0, r1, r2, r3 = philox_ref((quad, step, address.sample_id[:, None], address.iteration), address.seed)
    normals = torch.stack((*box_muller_ref(r0, r1), *box_muller_ref(r2, r3)), dim=-1)  # (B, Q, 4)
    return normals.float().flatten(1)[:, :size].contiguous()


@triton.jit
def cos_sin_turns(u):
    """cos(2 pi u) and sin(2 pi u) for u in [0, 1]: quarter turns are exact in fp32, Taylor series do the rest.

    The library's own take any argument, for which some compilers keep a table on the stack.
    """
    quarter = tl.floor(4.0 * u + 0.5)
    t = 6.283185307179586 * (u - 0.25 * quarter)  # within pi / 4 of 0
    t2 = t * t
    sin = t + t * t2 * (-1 / 6 + t2 * (1 / 120 + t2 * (-1 / 5040 + t2 * (1 / 362880))))
    cos = 1.0 + t2 * (-1 / 2 + t2 * (1 / 24 + t2 * (-1 / 720 + t2 * (1 / 40320 + t2 * (-1 / 3628800)))))
    k = quarter.to(tl.int32)
    odd = (k & 1) != 0
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((k + 1) & 2) != 0, -x, x), tl.where((k & 2) != 0, -y, y)


@triton.jit
def box_muller(r0, r1):
    # Scaling by a power of two is exact, so these uniforms do not depend on whether the compiler fuses the add.
    u0 = r0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u1 = r1.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * tl.log(u0))
    cos, sin = cos_sin_turns(u1)
    return radius * cos, radius * sin


@triton.jit
def philox_normal4(seed, o_quad, step, sample_id, iteration):
    """The normals of elements 4q, 4q+1, 4q+2, 4q+3 for a block of quads q."""
    r0, r1, r2, r3 = tl.philox(
        seed, o_quad.to(tl.uint32), step.to(tl.uint32), sample_id.to(tl.uint32), iteration.to(tl.uint32)
    )
    n0, n1 = box_muller(r0, r1)
    n2, n3 = box_muller(r2, r3)
    return n0, n1, n2, n3


@triton.jit
def interleave4(n0, n1, n2, n3, BLOCK: tl.constexpr):
    """Four blocks of quads -> one block of elements; a renaming of registers at four elements a thread."""
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit
def normal_fwd_kernel(
    out,  # (B, D) fp32
    step,  # (1,) int64
    seed,  # (1,) int64
    iteration,  # (1,) int64
    sample_id,  # (B,) int64
    D,
    BLOCK: tl.constexpr,
):
    i_block, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_x = i_block * BLOCK + tl.arange(0, BLOCK)
    o_quad = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    n0, n1, n2, n3 = philox_normal4(tl.load(seed), o_quad, tl.load(step), tl.load(sample_id + i_b), tl.load(iteration))
    tl.store(out + i_b * D + o_x, interleave4(n0, n1, n2, n3, BLOCK), mask=o_x < D)


def normal_triton(address: NoiseAddress, step: Tensor, size: int) -> Tensor:
    """`normal_ref` as one kernel."""
    batch = address.sample_id.shape[0]
    out = torch.empty(batch, size, dtype=torch.float32, device=step.device)
    normal_fwd_kernel[(cdiv(size, BLOCK), batch)](
        out, step, address.seed, address.iteration, address.sample_id, size, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return out


def normal_by_device(address: NoiseAddress, step: Tensor, size: int) -> Tensor:
    """By the kernel where it runs, else by the reference."""
    run = normal_triton if runs_kernels(step) else normal_ref
    return run(address, step, size)


def check_address(address: NoiseAddress, step: Tensor, batch: int) -> None:
    """Everything on the device of `step`, one sample_id a sample."""
    check_tensor("step", step, step, (1,), torch.int64)
    check_tensor("address.seed", address.seed, step, (1,), torch.int64)
    check_tensor("address.iteration", address.iteration, step, (1,), torch.int64)
    check_tensor("address.sample_id", address.sample_id, step, (batch,), torch.int64)


def normal(address: NoiseAddress, step: int | Tensor, size: int) -> Tensor:
    """Standard normal noise (B, size) fp32 at `address` and `step`, an int or a (1,) int64 device tensor."""
    if not 1 <= size < 2**30:
        raise ValueError(f"size is {size}, expected 1 <= size < 2**30 elements a sample")
    if isinstance(step, int):
        if not 0 <= step < 2**32:
            raise ValueError(f"step is {step}, expected 0 <= step < 2**32: the address has 32 bits for it")
        # A fill on the device: a copy from the host could not be captured.
        step = torch.full((1,), step, dtype=torch.int64, device=address.sample_id.device)
    check_address(address, step, address.sample_id.numel())
    if torch.compiler.is_compiling():
        return torch.ops.fastgrpo.normal(*address, step, size)
    return normal_by_device(address, step, size)
