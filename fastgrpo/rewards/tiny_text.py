"""Rewards of the tiny text world, from its verifier `fastgrpo.tiny.text.verify`. Both lie in [0, 1], more is better."""

import torch
from torch import Tensor

from fastgrpo.tiny.text.verify import score


def strict(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """1 where the image (B, 3, H, W) uint8 shows exactly the text that was asked for, else 0: what evaluation reports."""
    return _scores(images, metadata)[:, 0]


def graded(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """1 - the edit distance from the text asked for, over its length; 1 exactly where `strict` is."""
    return _scores(images, metadata)[:, 1]


def _scores(images: Tensor, metadata: list[dict]) -> Tensor:
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    return torch.tensor([score(image, record) for image, record in zip(arrays, metadata, strict=True)])
