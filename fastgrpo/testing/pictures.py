"""Small pictures as files, for the prompts of models that edit images."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """A folder that is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="fastgrpo_testing_")


def picture(
    name: str,
    size: tuple[int, int],  # width, height
    background: str,
    colour: str,
    box: tuple[int, int, int, int],  # left, top, right, bottom of the shape
    shape: Literal["ellipse", "rectangle"] = "ellipse",
) -> Path:
    """The file NAME.png with one shape on a background."""
    path = Path(_folder().name) / f"{name}.png"
    image = Image.new("RGB", size, background)
    getattr(ImageDraw.Draw(image), shape)(box, fill=colour)
    image.save(path)
    return path


def animation(name: str, frames: Sequence[Path]) -> Path:
    """The file NAME.webp that shows these pictures one after the other, with their pixels as they are."""
    path = Path(_folder().name) / f"{name}.webp"
    first, *others = (Image.open(frame) for frame in frames)
    first.save(path, save_all=True, append_images=others, lossless=True)
    return path
