"""How far a run may go: pure functions of its lines of numbers and of the section `guard`.

    check_limits(row, guard)                one line of metrics.jsonl
    check_score(evaluations, guard)         all lines of evaluations.jsonl so far, the newest last

Both raise `LimitPassed` with the value, the limit and the usual cause. A held-out score has fallen too far when

    score < best - score_drop max(|best|, |base|)

with the base's and the best of all evaluations. For a score from 0 up, such as a share of images, that is the fraction
`score_drop` of its best. It holds in any unit and for scores below 0. Scores that lie far from 0 and close together want a
small fraction.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastgrpo.config.keys import GuardConfig
from fastgrpo.finite import Diverged

HALF = 0.5  # the fall of a held-out score that is warned of whatever the limit


class LimitPassed(Diverged):
    """A key of the section `guard` ended the run."""


# Metric -> what is usually the cause of a value above its limit.
USUAL_CAUSES = {
    "kl": "the policy leaves the model that it started from: lower update.learning_rate or raise objective.beta",
    "drift": "updates go far beyond what was sampled: lower update.learning_rate, update.steps_per_rollout or inner_epochs",
    "score": "the policy has learned to please the training reward alone: take an earlier checkpoint, lower "
    "update.learning_rate, raise objective.beta or add a reward that notices",
}


def check_limits(row: Mapping[str, Any], guard: GuardConfig) -> None:
    """Raises LimitPassed where an iteration's KL or drift is above its limit."""
    for metric, limit in (("kl", guard.max_kl), ("drift", guard.max_drift)):
        if limit is not None and row[metric] > limit:
            raise LimitPassed(
                f"the {metric} is {row[metric]:.4g}, above guard.max_{metric} = {limit:g}; {USUAL_CAUSES[metric]}"
            )


def check_score(evaluations: Sequence[Mapping[str, Any]], guard: GuardConfig) -> None:
    """Raises LimitPassed where the newest overall score has fallen too far."""
    fall = None if guard.score_drop is None else score_fall(evaluations, guard.score_drop)
    if fall is not None:
        raise LimitPassed(f"{fall} (guard.score_drop = {guard.score_drop:g})")


def score_fall(evaluations: Sequence[Mapping[str, Any]], drop: float) -> str | None:
    """In words that the newest overall score has fallen further than `drop` allows; None if it has not."""
    scores = [row["accuracy"]["overall"] for row in evaluations]
    base, best, newest = scores[0], max(scores), scores[-1]
    lowest = best - drop * max(abs(best), abs(base))
    if newest >= lowest:
        return None
    return (
        f"the held-out score is {newest:.4g}, below {lowest:.4g}; the base had {base:.4g} and the best {best:.4g}; "
        f"{USUAL_CAUSES['score']}"
    )
