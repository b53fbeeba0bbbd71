"""Signs that a run learns nothing any more, each with its likely cause: pure functions of the lines of metrics.jsonl.

    watch = CollapseWatch(every=100, rounding=1e-6)
    for row in rows:
        for text in watch.warnings(row): ...

A sign counts when `IN_A_ROW` iterations show it one after the other, as a single one may be chance. It is then told once,
and again after `every` iterations at the earliest.
"""

from collections.abc import Mapping
from typing import Any

IN_A_ROW = 3
ALIKE = 1.0  # of 255 levels: images whose pixels differ by less look the same
LIKELY_CAUSES = {
    "constant reward": "every image scores the same. Look at the reward: does it read its images and prompts, does it fail "
    "in silence, is it already at its highest score?",
    "no group with spread": "in every group all images score the same, so there is nothing to learn from. The reward may be "
    "too coarse or already solved: take larger groups, harder prompts or a finer reward",
    "images alike": "the images of a group look all the same. The policy has collapsed, or rollout.noise_level is too low",
    "ratio off 1": "the first ratio of an update is off 1 by more than rounding explains. Rollout and update compute the "
    "velocity in different ways: set update.old_velocity=recompute",
    "weights at rest": "the trained weights do not move. update.learning_rate may be too low for their size, or no sample "
    "has a gradient",
    "loss scale falls": "the scale of the float16 loss keeps falling. Activations are close to float16's limit: take "
    "model.dtype=bfloat16",
}


class CollapseWatch:
    """Remembers since when each sign is there, and when it was told."""

    def __init__(self, *, every: int, rounding: float | None) -> None:
        """every: iterations between two warnings of one sign. rounding: see `signs`."""
        self.every, self.rounding = every, rounding
        self._before: Mapping[str, Any] | None = None
        self._shown: dict[str, int] = dict.fromkeys(LIKELY_CAUSES, 0)  # in how many iterations in a row
        self._told: dict[str, int] = {}  # in which iteration

    def warnings(self, row: Mapping[str, Any]) -> list[str]:
        """What is to be said after an iteration."""
        there, iteration, texts = signs(row, self._before, self.rounding), row["iteration"], []
        for sign, cause in LIKELY_CAUSES.items():
            self._shown[sign] = self._shown[sign] + 1 if sign in there else 0
            told = self._told.get(sign)
            if self._shown[sign] >= IN_A_ROW and (told is None or iteration >= told + self.every):
                self._told[sign] = iteration
                texts.append(f"for {self._shown[sign]} iterations now {cause}")
        self._before = row
        return texts


def signs(row: Mapping[str, Any], before: Mapping[str, Any] | None, rounding: float | None) -> set[str]:
    """The signs, keys of `LIKELY_CAUSES`, that an iteration's line shows; before: the line before it.

    rounding: how far the first ratio may be from 1; None: it need not be 1.
    """
    found = set()
    if row.get("reward_range") == 0:
        found.add("constant reward")
    elif row.get("zero_groups") == 1:
        found.add("no group with spread")
    if row.get("image_spread", ALIKE) < ALIKE:
        found.add("images alike")
    if rounding is not None and row["first_ratio_deviation"] > rounding:
        found.add("ratio off 1")
    # A step of float16 that was skipped to find the scale of the loss moves nothing either.
    skipped = row["skipped_steps"] > (before or {}).get("skipped_steps", 0)
    if row["weight_change"] == 0 and not skipped:
        found.add("weights at rest")
    if before is not None and "loss_scale" in row and row["loss_scale"] < before["loss_scale"]:
        found.add("loss scale falls")
    return found
