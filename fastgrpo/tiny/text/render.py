"""Draws lines of the tiny text world: letters as capitals, of straight strokes, anti-aliased from their distances."""

import numpy as np

from fastgrpo.tiny.render import BACKGROUND
from fastgrpo.tiny.text.world import CELL, COLUMNS, IMAGE_SIZE, Line
from fastgrpo.tiny.world import COLORS

STROKE = 1.7  # pixels
LEFT, MIDDLE, RIGHT = 1.7, 4.0, 6.3  # of the strokes' ends, in pixels of a cell
TOP, CENTER, BOTTOM = 1.5, 8.0, 14.5
# The ends (x0, y0, x1, y1) of each character's strokes.
STROKES = {
    "a": [(LEFT, BOTTOM, MIDDLE, TOP), (MIDDLE, TOP, RIGHT, BOTTOM), (2.5, 10.5, 5.5, 10.5)],
    "e": [(LEFT, TOP, LEFT, BOTTOM), *((LEFT, y, RIGHT, y) for y in (TOP, CENTER, BOTTOM))],
    "k": [(LEFT, TOP, LEFT, BOTTOM), (LEFT, CENTER, RIGHT, TOP), (LEFT, CENTER, RIGHT, BOTTOM)],
    "l": [(LEFT, TOP, LEFT, BOTTOM), (LEFT, BOTTOM, RIGHT, BOTTOM)],
    "n": [(LEFT, BOTTOM, LEFT, TOP), (LEFT, TOP, RIGHT, BOTTOM), (RIGHT, BOTTOM, RIGHT, TOP)],
    "o": [*((x, TOP, x, BOTTOM) for x in (LEFT, RIGHT)), *((LEFT, y, RIGHT, y) for y in (TOP, BOTTOM))],
    "t": [(LEFT, TOP, RIGHT, TOP), (MIDDLE, TOP, MIDDLE, BOTTOM)],
    "u": [*((x, TOP, x, BOTTOM) for x in (LEFT, RIGHT)), (LEFT, BOTTOM, RIGHT, BOTTOM)],
    "y": [(LEFT, TOP, MIDDLE, 9.5), (RIGHT, TOP, MIDDLE, 9.5), (MIDDLE, 9.5, MIDDLE, BOTTOM)],
    "z": [(LEFT, TOP, RIGHT, TOP), (RIGHT, TOP, LEFT, BOTTOM), (LEFT, BOTTOM, RIGHT, BOTTOM)],
    "4": [(LEFT, TOP, LEFT, CENTER), (LEFT, CENTER, RIGHT, CENTER), (RIGHT, TOP, RIGHT, BOTTOM)],
    "7": [(LEFT, TOP, RIGHT, TOP), (RIGHT, TOP, 2.5, BOTTOM)],
}
_X, _Y = np.meshgrid(np.arange(CELL[1]) + 0.5, np.arange(CELL[0]) + 0.5)  # the pixels' centres in a cell


def coverage(character: str, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """How much of each pixel of a cell a character covers: (16, 8) in [0, 1]; " " covers nothing."""
    if character == " ":
        return np.zeros(CELL)
    if character not in STROKES:
        raise ValueError(f"character {character!r} is not one of {''.join(STROKES)}")
    x0, y0, x1, y1 = (end[:, None, None] for end in np.array(STROKES[character]).T)  # (S, 1, 1)
    x, y = _X - dx - x0, _Y - dy - y0  # (S, 16, 8)
    along = np.clip((x * (x1 - x0) + y * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
    distance = np.hypot(x - along * (x1 - x0), y - along * (y1 - y0)).min(0) - STROKE / 2
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(line: Line) -> np.ndarray:
    """A line as an image: (16, 32, 3) uint8."""
    if line.column < 0 or line.column + len(line.text) > COLUMNS:
        raise ValueError(f"{line.text!r} from column {line.column} on does not fit into {COLUMNS} columns")
    alpha = np.zeros(IMAGE_SIZE)
    for i, character in enumerate(line.text, line.column):
        alpha[:, i * CELL[1] : (i + 1) * CELL[1]] = coverage(character, line.dx, line.dy)
    image = np.float64(BACKGROUND) * (1 - alpha[..., None]) + np.float64(COLORS[line.ink]) * alpha[..., None]
    return np.round(image).astype(np.uint8)
