"""LoRA (arXiv 2106.09685) in three operations a layer instead of five.

PEFT computes base(x) + B(A(x)) * scaling, of which the product with `scaling` and the sum each read and write a whole output
of the layer again, forward and backward. Here the last matrix product adds itself to the first one's result:

    y = base(x)          y += scaling (x A^T) B^T
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class LeanLinear(Linear):
    """PEFT's LoRA layer, with another forward for the one case that training and sampling run all the time."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out)"""
        if args or kwargs or self.disable_adapters or self.merged or not self._plain(x):
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        y = self.base_layer(x)
        down = nn.functional.linear(x, self.lora_A[name].weight).flatten(0, -2)
        # In place: nothing in the backward pass asks for the base layer's own output.
        y.view(-1, y.shape[-1]).addmm_(down, self.lora_B[name].weight.T, alpha=self.scaling[name])
        return y

    def _plain(self, x: Tensor) -> bool:
        """One adapter, of the input's dtype, without dropout, bias or one of PEFT's variants (DoRA and others)."""
        if len(self.active_adapters) != 1 or self.active_adapters[0] not in self.lora_A:
            return False
        name = self.active_adapters[0]
        up = self.lora_B[name]
        return (
            x.dim() > 1 and up.weight.dtype == x.dtype and up.bias is None and name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
        )  # fmt: skip


def lora_config(*, rank: int, alpha: int, targets: list[str]) -> LoraConfig:
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    config._register_custom_module({torch.nn.Linear: LeanLinear})  # PEFT's own way for layers of one's own
    return config
