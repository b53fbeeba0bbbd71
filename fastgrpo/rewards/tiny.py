"""Rewards of the embedded worlds, from their exact verifiers: 0 to 1, more is better.

Each world's verifier gives a strict score, 1 where the image is exactly what the prompt says and else 0, which is what
evaluation reports; and a graded one, with credit for parts, that is 1 exactly where the strict one is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastgrpo.data.pixels import as_arrays
from fastgrpo.tiny import verify as shapes_verifier
from fastgrpo.tiny.text import verify as text_verifier


@dataclass(frozen=True)
class Verified:
    """A world's verifier as a reward: images (B, 3, H, W) uint8 -> (B,)."""

    score: Callable[[np.ndarray, dict], tuple[float, float]]  # image (H, W, 3), record -> strict, graded
    check_record: Callable[[dict], None]  # ValueError for a record that is not of its world
    graded: bool = False
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    percent: ClassVar[bool] = True

    def check(self, prompts: list[str], metadata: list[dict]) -> None:
        """Refuse prompts of another world."""
        for record in metadata:
            self.check_record(record)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        pairs = zip(as_arrays(images), metadata, strict=True)
        return torch.tensor([self.score(image, record) for image, record in pairs])[:, int(self.graded)]


shapes = Verified(
    shapes_verifier.score, shapes_verifier.check_record
)  # 1 where all objects, and no others, are there as the prompt says
shapes_graded = Verified(
    shapes_verifier.score, shapes_verifier.check_record, graded=True
)  # with credit for shapes, colours, counts and relation
text = Verified(text_verifier.score, text_verifier.check_record)  # 1 where every character is right
text_graded = Verified(
    text_verifier.score, text_verifier.check_record, graded=True
)  # 1 - the edit distance from the prompt's text, over its length
