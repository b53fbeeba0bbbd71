"""A reward that takes as many seconds as the prompt says."""

import time

import torch
from torch import Tensor


def seconds(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    time.sleep(max(map(float, prompts)))
    return torch.zeros(len(prompts))
