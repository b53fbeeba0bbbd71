"""A prompt's tensors without the zeros that they are padded with.

    trimmed(t)          without the trailing slices of zeros along each axis but the first
    fill(row, kept)     writes what was kept into a row of zeros, which is then the row it was, bit for bit

Families that attend to padding have other numbers there, and nothing is left out.
"""

import torch
from torch import Tensor


def trimmed(tensor: Tensor) -> Tensor:
    """One prompt's tensor (1, ...) without its padding, in memory of its own. A negative zero is a number."""
    used = (tensor != 0) | tensor.signbit()
    for axis in range(1, tensor.ndim):
        others = [other for other in range(tensor.ndim) if other != axis]
        last = used.any(dim=others).nonzero()
        tensor = tensor.narrow(axis, 0, int(last.max()) + 1 if len(last) else 0)
    return tensor.clone(memory_format=torch.contiguous_format)


def fill(row: Tensor, kept: Tensor) -> None:
    """Writes `trimmed` of a tensor (1, ...) into a row (...) of zeros; to a GPU without waiting where it is pinned."""
    row[tuple(slice(length) for length in kept.shape[1:])].copy_(kept[0], non_blocking=True)
