"""From images to what a CLIP-like network sees: a square of S pixels, by CLIP's mean and deviation.

There are two published ways, alike but for roundings: the processor of transformers, and the transforms of torchvision.
"""

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def preprocess(images: Tensor, size: int) -> Tensor:
    """transformers: PIL's bicubic to the shorter side, centre crop. (B, 3, H, W) uint8 -> (B, 3, S, S) float32, CPU."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    arrays = list(images.cpu().numpy())
    return torch.as_tensor(processor(arrays, input_data_format="channels_first", return_tensors="pt")["pixel_values"])


def shorter_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after torchvision's Resize(size): the longer side is rounded down."""
    short, long = sorted((height, width))
    other = int(size * long / short)
    return (size, other) if height <= width else (other, size)


def crop_and_normalize(pixels: Tensor, size: int) -> Tensor:
    """torchvision's CenterCrop and Normalize: (B, 3, H, W) float32, 0 to 1 -> (B, 3, S, S).

    Where half a pixel is left over, torchvision cuts at the even side and transformers at the lower."""
    top, left = (round((length - size) / 2) for length in pixels.shape[-2:])
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels[..., top : top + size, left : left + size] - mean) / std
