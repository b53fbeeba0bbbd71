"""LoRA (arXiv 2106.09685) in three operations a layer instead of five.

PEFT computes base(x) + B(A(x)) * scaling. The product with `scaling` and the sum each read and write a whole output of the
layer once more, forward and backward. Here the last matrix product is added to the result of the first as it is computed:

    y = base(x)          y += scaling (x A^T) B^T
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from fastgrpo.models.lora_formats import Layers


class LeanLinear(Linear):
    """PEFT's LoRA layer, with its own forward pass for the one case that training and sampling run all the time."""

    lora_A: Any  # nn.ModuleDict, an adapter's name -> nn.Linear
    lora_B: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out)"""
        if args or kwargs or self.disable_adapters or self.merged or not self._plain(x):
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        y = self.base_layer(x)
        down = nn.functional.linear(x, self.lora_A[name].weight).flatten(0, -2)
        # In place, because the backward pass does not need the base layer's own output.
        y.view(-1, y.shape[-1]).addmm_(down, self.lora_B[name].weight.T, alpha=self.scaling[name])
        return y

    def _plain(self, x: Tensor) -> bool:
        """Whether there is one adapter, in the input's dtype, without dropout, bias or a variant of PEFT's such as DoRA."""
        if len(self.active_adapters) != 1 or self.active_adapters[0] not in self.lora_A:
            return False
        name = self.active_adapters[0]
        up = self.lora_B[name]
        return (
            x.dim() > 1 and up.weight.dtype == x.dtype and up.bias is None and name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
        )  # fmt: skip


def lora_config(*, rank: int, alpha: int, targets: list[str] | str) -> LoraConfig:
    """PEFT's configuration for a LoRA of `LeanLinear` layers. targets: ends of their names, or a regular expression."""
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    config._register_custom_module({torch.nn.Linear: LeanLinear})  # the way that PEFT offers for custom layers
    return config


def put_lora(network: Any, layers: Layers, *, rank: int, alpha: int, name: str = "default") -> None:
    """Put a LoRA with these values beside the layers of a transformer of diffusers. alpha: B is divided by alpha / rank."""
    # Names, and not ends of names: proj_out is a layer of FLUX, and the end of the name of 38 others.
    targets = "|".join(map(re.escape, sorted(layers)))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # PEFT warns of a second one
        network.add_adapter(lora_config(rank=rank, alpha=alpha, targets=targets), name)
    with torch.no_grad():
        for layer, (a, b) in layers.items():
            module = network.get_submodule(layer)
            module.lora_A[name].weight.copy_(a)
            module.lora_B[name].weight.copy_(b * (rank / alpha))


@contextmanager
def running(network: nn.Module, name: str) -> Iterator[None]:
    """Inside, the LoRA of that name runs in place of the one that is trained."""
    # PEFT's own switch would make what runs trainable, and all else not, in the middle of an update.
    layers = [module for module in network.modules() if isinstance(module, Linear)]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active
