"""How small an image's JPEG is (DDPO, arXiv 2305.13301): a reward that needs no model, to try a set-up with.

    compressibility = -bytes / 1000        incompressibility = bytes / 1000        at quality 95

Both are kilobytes, so their range is open; more is better.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.data.pixels import as_arrays

QUALITY = 95


def incompressibility(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """images (B, 3, H, W) uint8 -> (B,) kilobytes."""
    return torch.tensor([_bytes(image) / 1000 for image in as_arrays(images)])


def compressibility(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """images (B, 3, H, W) uint8 -> (B,) kilobytes, negative."""
    return -incompressibility(images, prompts, metadata)


def _bytes(pixels: np.ndarray) -> int:
    """The size of an image (H, W, 3) uint8 as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=QUALITY)
    return file.tell()
