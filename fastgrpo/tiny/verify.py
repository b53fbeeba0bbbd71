"""Decides whether an image of the tiny shapes world shows what its prompt asked for.

Pixels are unmixed into background and the nearest colour, each colour is split into connected components,
and a component is the shape whose ideal drawing, placed by the component's area and centroid, overlaps it
best. No learned part, so no reward to hack by confusing a detector: what is not clearly one of the world's
shapes, in one of its colours, counts as an unknown object, and fails the image.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from fastgrpo.tiny.render import BACKGROUND, coverage
from fastgrpo.tiny.world import COLORS, RELATIONS, SHAPES, relation_holds

MIN_AREA = 4  # pixels: smaller specks are what anti-aliasing leaves, not objects
MAX_AREA = 512  # pixels, half the image: one filled with a colour is no square
MIN_OVERLAP = 0.85  # intersection over union with the ideal drawing: a component below it is no known shape
MAX_TINT = 80  # RGB levels, mean over a component: one farther from its colour's blends has no known colour
_BACKGROUND = np.float32(BACKGROUND)
_AXES = np.float32(list(COLORS.values())) - _BACKGROUND  # (colours, 3): from the background to each colour


@dataclass(frozen=True)
class Found:
    """An object seen in an image; `name` is None where outline or colour are none of the world's."""

    name: str | None
    color: str
    x: float
    y: float


def find_shapes(image: np.ndarray) -> list[Found]:
    """The objects in an image (H, W, 3) uint8."""
    color, alpha, tint = unmix(image)
    found = []
    for index, name in enumerate(COLORS):
        own = np.where(color == index, alpha, 0.0)  # a neighbour must not fill in what it hides
        components, count = ndimage.label(own > 0.5)
        sizes = np.bincount(components.ravel())
        masks = (components == i for i in range(1, count + 1) if sizes[i] >= MIN_AREA)
        found += [_recognise(own, mask, name, tint[mask].mean() <= MAX_TINT) for mask in masks]
    return found


def unmix(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pixel as a blend of the background and the colour that explains it best.

    Returns that colour's index, its share, and how far in RGB the pixel is from the blend.

    Nearest palette entry would not do: half red on the background lies closer to yellow than to either.
    """
    offset = image.astype(np.float32) - _BACKGROUND  # (H, W, 3)
    share = np.clip(offset @ _AXES.T / (_AXES**2).sum(1), 0.0, 1.0)  # (H, W, colours)
    residual = ((offset[:, :, None] - share[..., None] * _AXES) ** 2).sum(-1)
    color = residual.argmin(-1)
    return color, np.take_along_axis(share, color[..., None], -1)[..., 0], np.sqrt(residual.min(-1))


def _recognise(alpha: np.ndarray, mask: np.ndarray, color: str, known_color: bool) -> Found:
    alpha = alpha * ndimage.binary_dilation(mask)  # soft edges carry the sub-pixel outline
    area = alpha.sum()
    rows, columns = np.arange(mask.shape[0]) + 0.5, np.arange(mask.shape[1]) + 0.5
    x, y = (alpha.sum(0) @ columns) / area, (alpha.sum(1) @ rows) / area
    overlap = {}
    for name in SHAPES:
        ideal = coverage(name, *_centre_and_radius(name, x, y, area))
        overlap[name] = np.minimum(alpha, ideal).sum() / np.maximum(alpha, ideal).sum()
    best = max(overlap, key=overlap.__getitem__)
    known = known_color and area <= MAX_AREA and overlap[best] >= MIN_OVERLAP
    return Found(best if known else None, color, float(x), float(y))


def _centre_and_radius(name: str, x: float, y: float, area: float) -> tuple[float, float, float]:
    """Centre and radius with which `coverage` draws `name` of this area and centroid."""
    if name == "circle":
        return x, y, float(np.sqrt(area / np.pi))
    if name == "square":
        return x, y, float(np.sqrt(area) / 1.8)
    radius = float(np.sqrt(area / 2))
    return x, y - radius / 3, radius  # a triangle's centroid lies a third of its height above the base


def check_record(record: dict) -> None:
    """Refuse a record that does not say, in this world's words, what an image shall show."""
    wanted = record.get("include")
    if not isinstance(wanted, list) or not wanted or not all(isinstance(item, dict) for item in wanted):
        raise ValueError(f'"include" is {wanted!r}: expected a list of {{"class", "color", "count"}}, as in tiny_shapes')
    for item in wanted:
        for key, choices in (("class", SHAPES), ("color", tuple(COLORS))):
            # Prompts that count name no colour.
            if item.get(key, choices[0] if key == "color" else None) not in choices:
                raise ValueError(f'"{key}" is {item.get(key)!r}: one of {", ".join(choices)}')
        if type(item.get("count")) is not int or item["count"] < 1:
            raise ValueError(f'"count" is {item.get("count")!r}: a whole number from 1')
    relation = record.get("relation")
    if relation and (relation not in RELATIONS or sum(item["count"] for item in wanted) < 2):
        raise ValueError(f'"relation" is {relation!r}: one of {", ".join(RELATIONS)}, between two objects')


def score(image: np.ndarray, record: dict) -> tuple[float, float]:
    """The strict score, 0 or 1, and the graded one in [0, 1], of an image (H, W, 3) uint8 for a record.

    Strict: exactly the objects asked for, nothing else, in the relation asked for. Graded: half a point for
    each wanted object's shape and half for its colour, one for the relation, over all that was wanted; every
    surplus object costs one.
    """
    found = find_shapes(image)
    wanted = [item for item in record["include"] for _ in range(item["count"])]
    matched, points = _match(wanted, found)
    possible = float(len(wanted))
    if relation := record.get("relation"):
        possible += 1
        if None not in matched[:2]:
            first, second = (found[i] for i in matched[:2])
            points += relation_holds(relation, first.x - second.x, first.y - second.y)
    surplus = max(0, len(found) - len(wanted))
    strict = len(found) == len(wanted) and points == possible
    return float(strict), max(0.0, points - surplus) / possible


def _match(wanted: list[dict], found: list[Found]) -> tuple[list[int | None], float]:
    """The found object that stands for each wanted one, so that the points for all are the most possible."""
    matched: list[int | None] = [None] * len(wanted)
    if not found:
        return matched, 0.0
    likeness = np.array([[_likeness(item, seen) for seen in found] for item in wanted])
    rows, columns = linear_sum_assignment(likeness, maximize=True)
    for w, f in zip(rows.tolist(), columns.tolist(), strict=True):
        if likeness[w, f] > 0:
            matched[w] = f
    return matched, float(likeness[rows, columns].sum())


def _likeness(item: dict, seen: Found) -> float:
    return 0.5 * (item["class"] == seen.name) + 0.5 * (item.get("color", seen.color) == seen.color)
