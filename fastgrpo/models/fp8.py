"""Rollouts in 8-bit floating point: the frozen linear layers of the transformer's blocks multiply e4m3 numbers.

    x8 = x / a,  a = max |x| of a row / 448            w8 = W / b,  b = max |W| of an output / 448
    y = a b (x8 w8^T) + bias                           summed in float32, rounded to x's dtype

LoRA, norms, attention and everything outside the blocks stay as they are. What rolls out is then not quite the policy that
is trained, so v_old is made again by that one (`update.old_velocity`): the ratio is again of exact
policies, and 8-bit numbers only decide which samples are looked at.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

E4M3_MAX = 448.0
MULTIPLE = 16  # of both sides of a weight, as the kernels ask


class Fp8Linear(nn.Linear):
    """A frozen linear layer that can also multiply in e4m3; it becomes one in place, so names and adapters stay."""

    drafting: bool
    w8: Tensor  # (out, in) float8_e4m3fn
    w_scale: Tensor  # (1, out) float32

    @classmethod
    def convert(cls, linear: nn.Linear) -> None:
        scale = (linear.weight.detach().abs().amax(1, keepdim=True).float() / E4M3_MAX).clamp(min=1e-12)
        linear.__class__ = cls
        linear.drafting = False
        linear.register_buffer("w8", (linear.weight.detach().float() / scale).to(torch.float8_e4m3fn), persistent=False)
        linear.register_buffer("w_scale", scale.T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        if not self.drafting:
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        scale = (rows.abs().amax(1, keepdim=True).float() / E4M3_MAX).clamp(min=1e-12)
        x8 = (rows.float() / scale).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(x8, self.w8.T, scale_a=scale, scale_b=self.w_scale, bias=self.bias, out_dtype=x.dtype)
        return y.view(*x.shape[:-1], -1)


def prepare_fp8(blocks: Sequence[nn.Module]) -> list[Fp8Linear]:
    """Give every frozen linear layer of the blocks an 8-bit copy of its weight, and return those layers."""
    if next(blocks[0].parameters()).is_cuda and torch.cuda.get_device_capability() < (8, 9):
        name = torch.cuda.get_device_name()
        raise ValueError(f"rollout.precision = 'fp8': {name} has no 8-bit matrix units (8.9 and later have); take model")
    found = [
        layer for block in blocks for layer in block.modules()
        if type(layer) is nn.Linear and not layer.weight.requires_grad and not any(n % MULTIPLE for n in layer.weight.shape)
    ]  # fmt: skip
    if not found:
        raise ValueError("rollout.precision = 'fp8': no frozen linear layer in the transformer's blocks; take model")
    for layer in found:
        Fp8Linear.convert(layer)
    return found


@contextmanager
def drafting(layers: Sequence[Fp8Linear]) -> Iterator[None]:
    """Inside, the layers, those that `prepare_fp8` returned, multiply in 8 bits."""
    try:
        for layer in layers:
            layer.drafting = True
        yield
    finally:
        for layer in layers:
            layer.drafting = False
