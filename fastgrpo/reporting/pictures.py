"""Images and clips as pictures for people: frames side by side, many images as one grid."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SCALE_BELOW = 128  # pixels: smaller images are enlarged in the grid, so that a person can see them


def as_pictures(images: Tensor, frames: int = 4) -> Tensor:
    """Returns images (N, 3, H, W) as they are; of videos (N, T, 3, H, W) some frames side by side, (N, 3, H, frames W).

    The frames are evenly spaced, with the first and the last; a video of fewer repeats some.
    """
    if images.dim() == 4:
        return images
    chosen = [round(i * (images.shape[1] - 1) / max(1, frames - 1)) for i in range(frames)]
    return torch.cat([images[:, frame] for frame in chosen], dim=-1)


def save_grid(
    path: Path,
    images: np.ndarray,  # (N, H, W, 3) uint8
    gap: int = 2,  # white pixels between two images
) -> None:
    """Saves all images as one picture, row by row from left to right."""
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count * 1.5))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = row * (height + gap) + gap, column * (width + gap) + gap
        sheet[top : top + height, left : left + width] = image
    factor = max(1, SCALE_BELOW // max(height, width))
    Image.fromarray(sheet.repeat(factor, 0).repeat(factor, 1)).save(path)
