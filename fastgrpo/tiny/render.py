"""Draws scenes of the tiny shapes world: anti-aliased, straight from signed distances."""

import numpy as np

from fastgrpo.tiny.world import COLORS, IMAGE_SIZE, Shape

BACKGROUND = (238, 238, 232)
_CENTERS = np.arange(IMAGE_SIZE) + 0.5  # of the pixels
_SLOPE = np.sqrt(5.0)  # length of the normal (2, 1) of the triangle's sides


def coverage(name: str, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers: (IMAGE_SIZE, IMAGE_SIZE) in [0, 1], rows are y.

    A circle of that radius; a square of nearly the same area; a triangle that points up, in a box of 2 radius.
    """
    dx, dy = _CENTERS[None, :] - x, _CENTERS[:, None] - y
    if name == "circle":
        distance = np.hypot(dx, dy) - radius
    elif name == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    elif name == "triangle":
        distance = np.maximum(dy - radius, (2 * np.abs(dx) - dy - radius) / _SLOPE)
    else:
        raise ValueError(f"shape {name!r} is not one of circle, square, triangle")
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: list[Shape]) -> np.ndarray:
    """A scene as an image: (IMAGE_SIZE, IMAGE_SIZE, 3) uint8."""
    image = np.broadcast_to(np.float64(BACKGROUND), (IMAGE_SIZE, IMAGE_SIZE, 3))
    for shape in scene:
        alpha = coverage(shape.name, shape.x, shape.y, shape.radius)[:, :, None]
        image = image * (1 - alpha) + np.float64(COLORS[shape.color]) * alpha
    return np.round(image).astype(np.uint8)
