"""Rewards by name: a callable `(images, prompts, metadata) -> (B,) float32`, and nothing else.

    images     (B, 3, H, W) uint8, what a viewer would see
    prompts    list of B strings
    metadata   list of B dicts: the prompts' lines of the prompt file

A new reward is one file here and one line in `REWARDS`; your own needs neither: name it `package.module:function`.
"""

import importlib
from collections.abc import Callable

from torch import Tensor

Reward = Callable[[Tensor, list[str], list[dict]], Tensor]

REWARDS = {
    "tiny_shapes": "fastgrpo.rewards.tiny_shapes:strict",
    "tiny_shapes_graded": "fastgrpo.rewards.tiny_shapes:graded",
}


def load_reward(name: str) -> Reward:
    """The reward of that name from `REWARDS`, or the `module:function` that it spells out."""
    module, colon, attribute = REWARDS.get(name, name).partition(":")
    if not colon:
        raise ValueError(f"reward {name!r}: not one of {', '.join(REWARDS)}, and not of the form module:function")
    return getattr(importlib.import_module(module), attribute)
