"""The sizes of a run's images: of each iteration, and of evaluations.

    place(i) = u + i (sqrt(5) - 1) / 2, its fractional part        u in [0, 1) follows from the seed

Each size has a part of [0, 1) as long as its weight, and iteration i has the size in whose part its place lies. Multiples of
the golden ratio lie evenly, however many there are, so that any stretch of iterations has each size about as often as its
weight says. Nothing is remembered: all ranks agree, and so does a run that goes on.
"""

import math
import random
from bisect import bisect
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

from fastgrpo.config.keys import Config, SizeConfig

GOLDEN = (math.sqrt(5) - 1) / 2


class Size(NamedTuple):
    """The size of images or videos. What is None is as the model has it."""

    height: int | None = None  # pixels
    width: int | None = None
    num_frames: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What it says, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def __str__(self) -> str:
        return "x".join(map(str, self.given.values()))


def training_sizes(config: Config) -> dict[Size, float]:
    """The sizes of training images with the share of iterations that have each; without `rollout.sizes` the model's own."""
    listed = [
        one if isinstance(one, SizeConfig) else SizeConfig(height=one[0], width=one[1]) for one in config.rollout.sizes
    ]
    total = sum(one.weight for one in listed)
    return {Size(one.height, one.width, one.num_frames): one.weight / total for one in listed} or {Size(): 1.0}


def iteration_size(config: Config, iteration: int) -> Size:
    """The size of an iteration's images."""
    sizes = training_sizes(config)
    place = (random.Random(config.seed).random() + iteration * GOLDEN) % 1
    *ends, _ = accumulate(sizes.values())  # the last part ends at 1, whatever the sum has rounded to
    return list(sizes)[bisect(ends, place)]


def evaluation_size(config: Config) -> Size:
    """The size of an evaluation's images."""
    return Size(config.evaluation.height, config.evaluation.width, config.evaluation.num_frames)


def named_sizes(config: Config) -> Mapping[str, Size]:
    """Every size that the configuration asks for beside the model's own, by the key that does."""
    training, evaluation = training_sizes(config), evaluation_size(config)
    named = {f"rollout.sizes[{i}]": size for i, size in enumerate(training)}
    named[", ".join(f"evaluation.{name}" for name in evaluation.given)] = evaluation
    return {key: size for key, size in named.items() if size.given}


def at_size(config: Config, size: Size) -> Config:
    """The configuration with one size, as the model's own."""
    return replace(config, model=replace(config.model, **size.given), rollout=replace(config.rollout, sizes=()))
