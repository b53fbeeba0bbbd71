"""What the kernels share: the shape of a launch, where they run, the sum over a row's blocks, and a table's rows as columns.

A launch has one program for every block of BLOCK elements of every sample: its grid is (BLOCKS, B) with
BLOCKS = ceil(D / BLOCK). Only `sde_step` gives a program several blocks of a large batch.
"""

import torch
from torch import Tensor

from fastgrpo_kernels.optional_triton import HAS_TRITON, tl, triton

# Four elements a thread: the four normals of one Philox call stay in the thread that stores them, and fp32
# moves in 128-bit accesses. Any other ratio makes Triton pass the noise through shared memory.
BLOCK = 1024
THREADS = BLOCK // 4
NUM_WARPS = THREADS // (64 if torch.version.hip else 32)


def cdiv(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def runs_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels run where x is; everywhere else the torch reference does."""
    return HAS_TRITON and x.is_cuda


def columns(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_x, c_v and s of rows (B, 4), shaped (B, 1, ...) to broadcast over x."""
    c_x, c_v, s, _ = rows.view(-1, 4, *[1] * (x.dim() - 1)).unbind(1)
    return c_x, c_v, s


@triton.jit
def sum_row(row, BLOCKS, BLOCK: tl.constexpr):
    """The sum of a row's BLOCKS partial sums, without atomics: its order depends on BLOCKS alone, so repeats are bitwise."""
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, BLOCKS, BLOCK):
        o_block = i + tl.arange(0, BLOCK)
        b_sum += tl.load(row + o_block, mask=o_block < BLOCKS, other=0.0)
    return tl.sum(b_sum)
