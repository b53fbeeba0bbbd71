"""Offline training: existing images instead of rollouts.

    sft      a prompt with the image to draw, "target"; or a folder of images with their captions beside them
    dpo      a prompt with the better image, "chosen", and the worse, "rejected"

An iteration takes as many images as its rollouts would draw. The two images of a pair stand side by side.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgrpo.data.pictures import load_picture

TARGET_FIELDS = {"sft": ("target",), "dpo": ("chosen", "rejected")}  # objective -> the images in a line of prompts.train


def load_targets(records: Sequence[dict], size: tuple[int, int]) -> Tensor:
    """The "target" images of B records as (B, 3, H, W) uint8, scaled to cover the size (height, width) and cropped to it."""
    arrays = []
    for record in records:
        fitted = ImageOps.fit(load_picture(Path(record["target"])), size[::-1], Image.Resampling.BICUBIC)
        arrays.append(np.asarray(fitted))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def image_records(records: Sequence[dict], image_fields: Sequence[str]) -> list[dict]:
    """A record for each image, with the image's file as "target": the lines in turn, and in each line its image fields."""
    return [{**record, "target": record[field]} for record in records for field in image_fields]
