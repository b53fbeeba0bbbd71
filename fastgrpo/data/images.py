"""Training on images that are there already, instead of rollouts: the last stage of data in a trainer of its own kind.

    sft      a prompt and the image to draw, "target"; or a folder of images with their captions beside them
    dpo      a prompt with the better image, "chosen", and the worse, "rejected"

An iteration takes as many images as one of rollouts would draw; the two of a pair stand side by side.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

DATA = {"sft": ("target",), "dpo": ("chosen", "rejected")}  # by objective: what the images are called in a line


def pictures(records: Sequence[dict], size: tuple[int, int]) -> Tensor:
    """The targets of records as (B, 3, H, W) uint8: scaled to cover the size (height, width), and cut in the middle."""
    arrays = []
    for record in records:
        with Image.open(record["target"]) as image:
            fitted = ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.BICUBIC)
            arrays.append(np.asarray(fitted))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def image_records(records: Sequence[dict], keys: Sequence[str]) -> list[dict]:
    """A record for each image, its file as "target": the line's own, or its two one after the other."""
    return [{**record, "target": record[key]} for record in records for key in keys]
