"""Which record of the prompt file each sample of an iteration has, known before any of them runs.

A sample is numbered by its place in the iteration over all ranks: group by group, or offline line by line.
"""

from collections.abc import Sequence

import numpy as np

from fastgrpo.config.keys import Config
from fastgrpo.data.images import image_records
from fastgrpo.data.prompts import PromptSet, prompt_probabilities, prompts_of_iteration, prompts_of_run


class Draws:
    """What a run draws of its prompts. image_fields: of an offline run, the images in a line; (): a run with rollouts.

    ValueError: the weights of categories fit neither the prompts nor the number of groups.
    """

    def __init__(self, prompts: PromptSet, config: Config, image_fields: Sequence[str] = ()) -> None:
        self._prompts, self._fields = prompts, image_fields
        self._seed, self._iterations, self._size = config.seed, config.iterations, config.rollout.group_size
        groups = config.rollout.groups
        probabilities = prompt_probabilities(prompts, config.prompts.weights, groups)
        self._probabilities = None if image_fields else probabilities
        self._lines = groups * self._size // len(image_fields) if image_fields else groups  # in an iteration

    def records(self, iteration: int) -> list[dict]:
        """The record of every sample of an iteration, from 1 on."""
        drawn = prompts_of_iteration(len(self._prompts), self._lines, iteration - 1, self._seed, self._probabilities)
        lines = self._of(drawn)
        return image_records(lines, self._fields) if self._fields else [line for line in lines for _ in range(self._size)]

    def of_run(self) -> list[dict]:
        """Every line of the prompt file that the run draws, in the file's order."""
        iterations = range(self._iterations)
        return self._of(prompts_of_run(len(self._prompts), self._lines, iterations, self._seed, self._probabilities))

    def _of(self, lines: np.ndarray) -> list[dict]:
        return [self._prompts.metadata[line] for line in lines]
