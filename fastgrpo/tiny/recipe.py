"""What `fastgrpo.tiny.pretrain` has to know of a world, and the shapes world's own recipe."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastgrpo.tiny.render import render
from fastgrpo.tiny.world import COLORS, IMAGE_SIZE, RELATIONS, SHAPES, sample_scene, split_prompts, words


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own captions and its own one-cycle schedule."""

    steps: int
    lr: float
    correct: dict[str, float]  # share of right captions by category


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A world as the pretraining sees it, and what it is trained with. Records are what `split_prompts` returns."""

    split_prompts: Callable[[], tuple[list[dict], list[dict]]]
    words: Callable[[], list[str]]  # one token each
    max_tokens: int  # of the longest prompt, with its start and end
    draw: Callable[[dict, np.random.Generator], np.ndarray]  # a random image (H, W, 3) uint8 that shows a record
    image_size: tuple[int, int]  # (H, W)
    mislabel: Callable[[dict, np.random.Generator], dict]  # what is really shown under a wrong caption
    tag_share: dict[str, float]  # of the images, by category
    stages: tuple[Stage, ...]
    heads: int = 4  # of the transformer, of 32 channels each
    batch: int = 96


def mislabel(record: dict, rng: np.random.Generator) -> dict:
    """What is really shown under a wrong caption: the record with one thing about it changed."""
    include = copy.deepcopy(record["include"])
    changed = {**record, "include": include}
    tag = record["tag"]
    if tag == "position":
        changed["relation"] = str(rng.choice([r for r in RELATIONS if r != record["relation"]]))
    elif tag == "counting":
        include[0]["count"] = int(rng.choice([n for n in (1, 2, 3, 4) if n != include[0]["count"]]))
    elif tag == "color_attr" and rng.random() < 0.6:
        include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]
    elif tag == "two_object" and rng.random() < 0.5:
        del include[rng.integers(2)]
    else:
        item = include[rng.integers(len(include))]
        key, values = ("color", COLORS) if "color" in item and rng.random() < 0.5 else ("class", SHAPES)
        item[key] = str(rng.choice([value for value in values if value != item[key]]))
    return changed


RECIPE = Recipe(
    split_prompts=split_prompts,
    words=words,
    max_tokens=10,
    draw=lambda record, rng: render(sample_scene(record, rng)),
    image_size=(IMAGE_SIZE, IMAGE_SIZE),
    mislabel=mislabel,
    tag_share=dict(single_object=0.1, two_object=0.2, counting=0.2, position=0.3, color_attr=0.2),
    stages=(
        Stage(8000, 1.5e-3, dict(single_object=1.0, two_object=1.0, counting=1.0, position=1.0, color_attr=1.0)),
        Stage(2000, 5.0e-4, dict(single_object=0.95, two_object=0.6, counting=0.45, position=0.35, color_attr=0.45)),
    ),
)
