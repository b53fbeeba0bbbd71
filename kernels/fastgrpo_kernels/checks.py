"""Checks at the boundary: the value in the message, and the fix. Metadata only: no wait for the device."""

import torch
from torch import Tensor

VELOCITY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: Tensor, like: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """`value` has this shape, one of these dtypes, the device of `like`, and contiguous memory."""
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device}: move it once, outside the loop")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} has dtype {value.dtype}, expected {expected}: cast it with .to()")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    if not value.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {value.stride()}): call .contiguous() on it")


def check_latents(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    """A batch (B, *D) that the kernels can address, in one of these dtypes; of none in fp32."""
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, *D) with at least one element a sample")
    # Inside a row the kernels count elements with 32 bits; across rows with 64.
    if x.numel() // x.shape[0] >= 2**30:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: split samples of 2**30 elements or more")
    # The batch is the second axis of the grid, which CUDA limits to 16 bits.
    if x.shape[0] > 65535:
        raise ValueError(f"{name} has a batch of {x.shape[0]}: split batches of more than 65535 samples")
    check_tensor(name, x, x, tuple(x.shape), *(dtypes or (torch.float32,)))
