"""Reads the text in an image of the tiny text world.

Pixels are unmixed into background and ink. Each cell is read as the character, or the blank, whose ideal drawing it differs
from the least, where it may be moved a little:

    fault = max over patches of 4 x 4 pixels of |mean(ink - ideal ink)|

A missing or surplus piece of a stroke is a fault somewhere, soft edges are none anywhere. A cell whose least fault is too
large is unknown: it is read as "?", which no prompt asks for. No learned part.
"""

import itertools

import numpy as np
from scipy import ndimage

from fastgrpo.edit_distance import levenshtein
from fastgrpo.tiny.text.render import coverage
from fastgrpo.tiny.text.world import ALPHABET, CELL, COLUMNS
from fastgrpo.tiny.verify import unmix
from fastgrpo.tiny.world import COLORS

UNKNOWN = "?"
PATCH = 4  # pixels
MAX_FAULT = 0.125  # share of a patch: less than half of what tells any two characters apart
MAX_TINT = 60  # RGB levels: a pixel farther from every ink's blends with the background is in no known ink
OFFSETS = np.linspace(-0.6, 0.6, 5)  # pixels that a character may be moved


def _patches(ink: np.ndarray) -> np.ndarray:
    """The mean of each patch, (..., 16, 8)."""
    return ndimage.uniform_filter(ink.astype(np.float32), (PATCH, PATCH), mode="constant", axes=(-2, -1))


_DRAWN = [(" ", 0.0, 0.0), *itertools.product(ALPHABET, OFFSETS, OFFSETS)]
_IDEAL = _patches(np.stack([coverage(*drawn) for drawn in _DRAWN]))  # (D, 16, 8)


def read(image: np.ndarray) -> str:
    """The text in an image (16, 32, 3) uint8, without the blanks around it."""
    color, ink, tint = unmix(image)
    known = tint <= MAX_TINT
    cells = np.split(np.arange(COLUMNS * CELL[1]), COLUMNS)
    return "".join(_read_cell(color[:, c], ink[:, c], known[:, c]) for c in cells).strip()


def _read_cell(color: np.ndarray, ink: np.ndarray, known: np.ndarray) -> str:
    main = np.bincount(color.ravel(), (ink * known).ravel(), minlength=len(COLORS)).argmax()
    own = _patches(np.where(known & (color == main), ink, 0.0))
    other = _patches(np.where(known & (color == main), 0.0, np.where(known, ink, 1.0)))  # no part of a character
    faults = np.abs(own - _IDEAL).max((1, 2))
    best = faults.argmin()
    return _DRAWN[best][0] if max(faults[best], other.max()) <= MAX_FAULT else UNKNOWN


def check_record(record: dict) -> None:
    """Refuse a record without a text that an image of this world can show."""
    text = record.get("text")
    if not isinstance(text, str) or not 0 < len(text) <= COLUMNS or not set(text) <= set(ALPHABET):
        raise ValueError(f'"text" is {text!r}: expected 1 to {COLUMNS} characters of {ALPHABET}, as in tiny_text')


def score(image: np.ndarray, record: dict) -> tuple[float, float]:
    """The strict score, 0 or 1, and the graded one in [0, 1], of an image (16, 32, 3) uint8 for a record.

    Strict: exactly the text asked for. Graded: less by each character to change, 0 where all of them are.
    """
    text, target = read(image), record["text"]
    return float(text == target), max(0.0, 1 - levenshtein(text, target) / len(target))
