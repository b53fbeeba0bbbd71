"""The verifier: what is right passes, what is wrong in one thing does not, and nothing can be exploited."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from fastgrpo.tiny.render import BACKGROUND, coverage, render
from fastgrpo.tiny.verify import find_shapes, score
from fastgrpo.tiny.world import (
    COLORS,
    RELATIONS,
    SHAPES,
    TAGS,
    Shape,
    relation_holds,
    sample_scene,
    split_prompts,
)

pytestmark = pytest.mark.slow  # thousands of drawings
SCENES = 1200  # a category, or a kind of mistake
ALLOWED = SCENES // 1000  # may be judged wrongly
PROMPTS = sum(split_prompts(), [])
RED_CIRCLE = {"include": [{"class": "circle", "color": "red", "count": 1}]}
X, Y = np.meshgrid(np.arange(32) + 0.5 - 16, np.arange(32) + 0.5 - 16)  # from the middle


def records(*tags: str) -> list[dict]:
    return [record for record in PROMPTS if record["tag"] in tags]


def drawn(distance: np.ndarray, rgb: tuple[int, int, int] = COLORS["red"], opacity: float = 1.0) -> np.ndarray:
    """The inside of a signed distance (H, W), on the background."""
    alpha = opacity * np.clip(0.5 - distance, 0, 1)[..., None]
    return np.round(np.float64(BACKGROUND) * (1 - alpha) + np.float64(rgb) * alpha).astype(np.uint8)


def other(values, value, rng: np.random.Generator):
    return rng.choice([v for v in values if v != value]).item()


# True scenes


@pytest.mark.parametrize("tag", TAGS)
def test_true_scenes_pass(tag: str) -> None:
    rng = np.random.default_rng(TAGS.index(tag))
    prompts = records(tag)
    chosen = [prompts[n % len(prompts)] for n in range(SCENES)]
    failed = sum(score(render(sample_scene(record, rng)), record) != (1.0, 1.0) for record in chosen)
    assert failed <= ALLOWED


@pytest.mark.parametrize(
    "disturb",
    [
        lambda image, rng: image + rng.normal(0, 4, image.shape),
        lambda image, rng: ndimage.gaussian_filter(image, (0.5, 0.5, 0)),
        lambda image, rng: ndimage.gaussian_filter(image, (0.4, 0.4, 0)) + rng.normal(0, 6, image.shape),
        lambda image, rng: image * 0.96 + 4,
    ],
    ids=["noise", "blur", "blur and noise", "less contrast"],
)
def test_small_disturbances_do_no_harm(disturb: Callable) -> None:
    """More than an autoencoder does: the root of its mean squared error is about 3 of 255 levels."""
    rng = np.random.default_rng(7)
    for record in PROMPTS:
        image = disturb(render(sample_scene(record, rng)).astype(np.float64), rng)
        assert score(np.clip(image, 0, 255).round().astype(np.uint8), record) == (1.0, 1.0)


# One thing wrong


def wrong_count(record: dict, rng: np.random.Generator) -> dict:
    record["include"][0]["count"] = other((1, 2, 3, 4), record["include"][0]["count"], rng)
    return record


def wrong_color(record: dict, rng: np.random.Generator) -> dict:
    item = rng.choice([item for item in record["include"] if "color" in item])
    item["color"] = other(COLORS, item["color"], rng)
    return record


def wrong_shape(record: dict, rng: np.random.Generator) -> dict:
    item = rng.choice(record["include"])
    item["class"] = other(SHAPES, item["class"], rng)
    return record


def wrong_position(record: dict, rng: np.random.Generator) -> dict:
    return {**record, "relation": other(RELATIONS, record["relation"], rng)}


@pytest.mark.parametrize(
    "spoil, tags",
    [
        (wrong_count, ("counting", "single_object")),
        (wrong_color, TAGS),
        (wrong_shape, TAGS),
        (wrong_position, ("position",)),
    ],
    ids=["count", "colour", "shape", "position"],
)
def test_scenes_with_one_thing_wrong_fail(spoil: Callable, tags: tuple[str, ...]) -> None:
    rng = np.random.default_rng(11)
    prompts = records(*tags)
    strict = full = 0
    for n in range(SCENES):
        record = prompts[n % len(prompts)]
        scene = sample_scene(spoil(copy.deepcopy(record), rng), rng)
        one, graded = score(render(scene), record)
        strict, full = strict + one, full + (graded == 1.0)
    assert strict <= ALLOWED and full == strict


def test_swapped_colours_fail() -> None:
    rng = np.random.default_rng(12)
    for record in records("color_attr"):
        swapped = copy.deepcopy(record)
        first, second = swapped["include"]
        first["color"], second["color"] = second["color"], first["color"]
        strict, graded = score(render(sample_scene(swapped, rng)), record)
        assert strict == 0 and graded == 0.5


def test_relation_is_decided_by_the_larger_offset() -> None:
    expected = {(-5, 3): "left of", (5, -3): "right of", (3, -5): "above", (-3, 5): "below"}
    for offset, relation in expected.items():
        assert [name for name in RELATIONS if relation_holds(name, *offset)] == [relation]
    assert not any(relation_holds(name, 4, 4) for name in RELATIONS)


# The graded score


def test_graded_is_full_exactly_where_strict_is() -> None:
    """Any prompt with any scene: images of all degrees of wrongness."""
    rng = np.random.default_rng(13)
    values = set()
    for _ in range(600):
        record, shown = PROMPTS[rng.integers(len(PROMPTS))], PROMPTS[rng.integers(len(PROMPTS))]
        strict, graded = score(render(sample_scene(shown, rng)), record)
        assert strict in (0.0, 1.0) and 0 <= graded <= 1 and (strict == 1) == (graded == 1)
        values.add(graded)
    assert len(values) > 5


def test_graded_falls_with_each_thing_wrong() -> None:
    record = {
        "include": [{"class": c, "color": k, "count": 1} for c, k in (("circle", "red"), ("square", "blue"))],
        "relation": "left of",
    }
    left, right = Shape("circle", "red", 5, 16, 3.8), Shape("square", "blue", 26, 16, 3.8)
    steps = [
        ([left, right], 1.0),
        ([left, right, Shape("triangle", "green", 16, 26, 3.8)], 2 / 3),
        ([Shape("circle", "red", 26, 16, 3.8), Shape("square", "blue", 5, 16, 3.8)], 2 / 3),
        ([left, Shape("square", "green", 26, 16, 3.8)], 2.5 / 3),
        ([Shape("triangle", "red", 5, 16, 3.8), Shape("square", "green", 26, 16, 3.8)], 2 / 3),
        ([left], 1 / 3),
        ([Shape("triangle", "red", 5, 16, 3.8)], 0.5 / 3),
        ([Shape("triangle", "green", 5, 16, 3.8)], 0.0),
        ([], 0.0),
    ]
    for scene, expected in steps:
        strict, graded = score(render(scene), record)
        assert graded == pytest.approx(expected) and strict == (expected == 1.0), scene


@pytest.mark.parametrize("wanted, missing", [(4, 1), (4, 2), (4, 3), (2, 1)])
def test_graded_counts_what_is_missing_or_too_much(wanted: int, missing: int) -> None:
    places = [(5, 5), (26, 5), (5, 26), (26, 26)]
    scene = [Shape("circle", "red", x, y, 3.7) for x, y in places]
    item = {"class": "circle", "color": "red"}
    assert score(render(scene[: wanted - missing]), {"include": [{**item, "count": wanted}]}) == (
        0.0, (wanted - missing) / wanted,
    )  # fmt: skip
    surplus = {"include": [{**item, "count": wanted - missing}]}
    assert score(render(scene[:wanted]), surplus) == (0.0, max(0, wanted - 2 * missing) / (wanted - missing))


def test_points_do_not_depend_on_the_order_in_which_objects_are_found() -> None:
    """A red square could stand for either wanted object: it stands for the one that leaves more points."""
    record = {"include": [{"class": c, "color": k, "count": 1} for c, k in (("circle", "red"), ("square", "blue"))]}
    for places in ((5, 26), (26, 5)):
        scene = [Shape("square", "red", places[0], 16, 3.8), Shape("triangle", "red", places[1], 16, 3.8)]
        assert score(render(scene), record) == (0.0, 0.5)


# Nothing to exploit


def test_blank_and_garbage_fail_for_every_prompt() -> None:
    rng = np.random.default_rng(14)
    size = (32, 32, 3)
    blanks = [np.broadcast_to(np.uint8(rgb), size) for rgb in (BACKGROUND, (0, 0, 0), *COLORS.values())]
    garbage = [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(4)]
    smooth = [ndimage.gaussian_filter(rng.normal(128, 400, size), (2, 2, 0)).clip(0, 255) for _ in range(4)]
    assert score(blanks[0], RED_CIRCLE) == (0.0, 0.0)
    for image in (*blanks, *garbage, *(image.astype(np.uint8) for image in smooth)):
        assert not any(score(image, record)[0] for record in PROMPTS)


@pytest.mark.parametrize("offset", [4.8, 5.6, 6.4, 7.0])
@pytest.mark.parametrize("name", SHAPES)
def test_merged_shapes_are_neither_one_nor_two(name: str, offset: float) -> None:
    image = render([Shape(name, "red", 16 - offset / 2, 16, 3.7), Shape(name, "red", 16 + offset / 2, 16, 3.7)])
    for count in (1, 2):
        assert score(image, {"include": [{"class": name, "color": "red", "count": count}]})[0] == 0


@pytest.mark.parametrize("offset", [2.0, 3.0, 4.0])
def test_overlapping_shapes_of_two_colours_fail(offset: float) -> None:
    image = render([Shape("circle", "red", 16, 16, 3.8), Shape("square", "blue", 16 + offset, 16, 3.8)])
    items = [
        {"class": "circle", "color": "red", "count": 1},
        {"class": "square", "color": "blue", "count": 1},
    ]
    assert score(image, {"include": items})[0] == 0


def test_any_surplus_object_fails() -> None:
    rng = np.random.default_rng(15)
    for record in PROMPTS:
        scene = sample_scene(record, rng)
        cells = [(5.3, 5.3), (16, 5.3), (26.7, 5.3), (5.3, 16), (16, 16), (26.7, 16)]
        x, y = next(c for c in cells if all(np.hypot(c[0] - s.x, c[1] - s.y) > 9 for s in scene))
        surplus = Shape(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), x, y, 3.6)
        strict, graded = score(render([*scene, surplus]), record)
        assert strict == 0 and graded < 1


@pytest.mark.parametrize(
    "distance",
    [
        abs(np.hypot(X, Y) - 4) - 1.2,
        np.maximum(abs(X) - 5, abs(Y) - 2.5),
        np.minimum(np.maximum(abs(X) - 4, abs(Y) - 1.4), np.maximum(abs(X) - 1.4, abs(Y) - 4)),
        np.maximum(-Y - 4, (2 * abs(X) + Y - 4) / np.sqrt(5)),
        np.maximum(np.hypot(X, Y) - 4.5, Y),
        np.minimum(np.maximum(abs(X + 3) - 1.4, abs(Y) - 4), np.maximum(abs(X) - 4, abs(Y - 3) - 1.4)),
    ],
    ids=["ring", "bar", "plus", "triangle upside down", "half disc", "corner"],
)
def test_unknown_outline_is_no_object_of_the_world(distance: np.ndarray) -> None:
    image = drawn(distance)
    assert [seen.name for seen in find_shapes(image)] == [None]
    for name in SHAPES:
        assert score(image, {"include": [{"class": name, "count": 1}]})[0] == 0


@pytest.mark.parametrize("rgb", [(0, 0, 0), (128, 0, 128), (255, 0, 255), (0, 220, 220), (120, 70, 20)])
def test_unknown_colour_is_no_object_of_the_world(rgb: tuple[int, int, int]) -> None:
    image = drawn(np.hypot(X, Y) - 4, rgb)
    for color in COLORS:
        assert score(image, {"include": [{"class": "circle", "color": color, "count": 1}]})[0] == 0
    assert score(image, {"include": [{"class": "circle", "count": 1}]})[0] == 0


def test_object_of_two_colours_is_none() -> None:
    alpha = coverage("circle", 16, 16, 4)[:, :, None]
    paint = np.where(X[..., None] < 0, np.float64(COLORS["red"]), np.float64(COLORS["blue"]))
    image = np.round(np.float64(BACKGROUND) * (1 - alpha) + paint * alpha).astype(np.uint8)
    for color in COLORS:
        assert score(image, {"include": [{"class": "circle", "color": color, "count": 1}]})[0] == 0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("radius", [2.5, 3.7, 6.0, 11.0])
def test_shape_place_and_colour_are_found_at_any_size(name: str, radius: float) -> None:
    (seen,) = find_shapes(render([Shape(name, "green", 16.3, 15.8, radius)]))
    assert (seen.name, seen.color) == (name, "green")
    centroid = 15.8 + (radius / 3 if name == "triangle" else 0)
    assert (seen.x, seen.y) == pytest.approx((16.3, centroid), abs=0.3)


@pytest.mark.parametrize("outline", ["ellipse", "ring", "pentomino", "triangle upside down"])
def test_what_is_nearly_a_shape_is_none(outline: str) -> None:
    """Red on the background, of an object's size, and none of the three shapes."""
    y, x = np.mgrid[-15.5:16, -15.5:16]
    inside = {
        "ellipse": (x / 7) ** 2 + (y / 4.5) ** 2 < 1,
        "ring": (np.hypot(x, y) < 6) & (np.hypot(x, y) > 3.5),
        "pentomino": ((abs(x) < 2) & (abs(y) < 6)) | ((abs(y) < 2) & (abs(x) < 6)),
        "triangle upside down": (abs(y) < 5.5) & (2 * abs(x) + y < 5.5),
    }[outline]
    image = np.where(inside[..., None], np.uint8(COLORS["red"]), np.uint8(BACKGROUND))
    for name in SHAPES:
        assert score(image, {"include": [{"class": name, "color": "red", "count": 1}]})[0] == 0
