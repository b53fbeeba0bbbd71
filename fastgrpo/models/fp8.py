"""Rollouts in 8-bit floating point: the frozen linear layers of the transformer's blocks multiply e4m3 numbers.

    x8 = x / a,  a = max |x| of a row / 448            w8 = W / b,  b = max |W| of an output / 448
    y = a b (x8 w8^T) + bias                           summed in float32, rounded to x's dtype

LoRA, norms, attention and everything outside the blocks stay as they are. The policy that samples is then not quite the
policy that is trained, so the trained one computes v_old again (`update.old_velocity`). The ratio is one of exact policies
then, and 8-bit numbers only decide which samples are looked at.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

E4M3_MAX = 448.0
MULTIPLE = 16  # the kernels ask that both sides of a weight are a multiple of this


class Fp8Linear(nn.Linear):
    """A frozen linear layer that can also multiply e4m3 numbers. It is converted in place, so names and adapters stay."""

    drafting: bool = False
    w8: Tensor  # (out, in) float8_e4m3fn
    w_scale: Tensor  # (1, out) float32

    @classmethod
    def convert(cls, linear: nn.Linear) -> "Fp8Linear":
        """Make an `Fp8Linear` of a linear layer, in place."""
        scale = (linear.weight.detach().abs().amax(1, keepdim=True).float() / E4M3_MAX).clamp(min=1e-12)
        linear.__class__ = cls
        linear.register_buffer("w8", (linear.weight.detach().float() / scale).to(torch.float8_e4m3fn), persistent=False)
        linear.register_buffer("w_scale", scale.T.contiguous(), persistent=False)
        assert isinstance(linear, Fp8Linear)
        return linear

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
    """Give every frozen linear layer of the blocks an 8-bit copy of its weight, and return those layers.

    One layer of each kind multiplies once: ValueError where the device cannot, before a rollout would find out.
    """
    frozen = [
        layer for block in blocks for name, layer in block.named_modules()
        if type(layer) is nn.Linear and not layer.weight.requires_grad and ".lora_" not in name
        and not any(n % MULTIPLE for n in layer.weight.shape)
    ]  # fmt: skip
    if not frozen:
        raise ValueError("rollout.precision = 'fp8': no frozen linear layer in the transformer's blocks; take model")
    layers = [Fp8Linear.convert(layer) for layer in frozen]
    kinds = {(layer.weight.shape, layer.weight.dtype, layer.bias is None): layer for layer in layers}
    for layer in kinds.values():
        _try_product(layer)
    return layers


@torch.no_grad()
def _try_product(layer: Fp8Linear) -> None:
    """Multiply once. Whether that works depends on the device, torch's release, the dtype and the bias: only a try tells."""
    weight = layer.weight
    try:
        with drafting([layer]):
            layer(torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device))
    except (RuntimeError, ValueError) as error:
        dtype = str(weight.dtype).removeprefix("torch.")
        device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else f"the {weight.device.type.upper()}"
        reason, _, _ = str(error).partition("\n")  # without the C++ stack that follows
        take = "rollout.precision=model" if dtype == "bfloat16" else "model.dtype=bfloat16, or rollout.precision=model"
        raise ValueError(
            f"rollout.precision = 'fp8': {device} multiplies no 8-bit numbers with model.dtype={dtype} "
            f"({reason}); take {take}"
        ) from error


@contextmanager
def drafting(layers: Sequence[Fp8Linear]) -> Iterator[None]:
    """Inside, the layers multiply in 8 bits. layers: the ones that `prepare_fp8` returned."""
    try:
        for layer in layers:
            layer.drafting = True
        yield
    finally:
        for layer in layers:
            layer.drafting = False
