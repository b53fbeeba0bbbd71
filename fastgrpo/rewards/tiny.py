"""Rewards of the embedded worlds, from their exact verifiers: 0 to 1, more is better.

Each world's verifier gives a strict score, 1 where the image is exactly what was asked for and else 0, which is what
evaluation reports; and a graded one, with credit for parts, that is 1 exactly where the strict one is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgrpo.data.pixels import as_arrays
from fastgrpo.tiny import verify as shapes_verifier
from fastgrpo.tiny.text import verify as text_verifier


def shapes(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """images (B, 3, H, W) uint8 -> (B,): 1 where all objects, and no others, are there as asked."""
    return _scores(shapes_verifier.score, images, metadata)[:, 0]


def shapes_graded(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """With credit for shapes, colours, counts and relation."""
    return _scores(shapes_verifier.score, images, metadata)[:, 1]


def text(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """images (B, 3, H, W) uint8 -> (B,): 1 where every character is right."""
    return _scores(text_verifier.score, images, metadata)[:, 0]


def text_graded(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """1 - the edit distance from the text asked for, over its length."""
    return _scores(text_verifier.score, images, metadata)[:, 1]


for _reward in (shapes, shapes_graded, text, text_graded):
    _reward.low, _reward.high = 0.0, 1.0


def _scores(score: Callable, images: Tensor, metadata: list[dict]) -> Tensor:
    """(B, 2), strict and graded."""
    arrays = as_arrays(images)
    return torch.tensor([score(image, record) for image, record in zip(arrays, metadata, strict=True)])
