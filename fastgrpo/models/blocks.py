"""Running the blocks of a transformer of diffusers one by one, where a family does not call its stock `forward`."""

from typing import Any

import torch


def run(network: Any, block: Any, *inputs: Any) -> Any:
    """The output of a block. With gradient checkpointing its activations are computed again in the backward pass."""
    if network.gradient_checkpointing and torch.is_grad_enabled():
        return network._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)
