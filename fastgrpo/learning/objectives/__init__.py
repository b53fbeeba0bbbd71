"""Policy objectives: pure functions of a few moments of each sample, `(moments, rows, advantages, weight) -> Loss`.

    policy_gradient.py    clip, guard, dppo       of stochastic transitions, whose log-prob is a Gaussian's
    matching.py           nft, awm, dpo, sft      of noised final samples: rollouts may be plain ODE

The heavy part, moments of (B, D) tensors and their gradient, is `fastgrpo_kernels.transition`, for all of them. A new
objective is a function and a row of `OBJECTIVES`; its keyword parameters besides clip_range and beta are the keys of
`objective.settings`.

Letters: B samples, D elements a sample.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastgrpo.config import schema
from fastgrpo.config.keys import ObjectiveConfig, StepWeight
from fastgrpo.config.settings import settings_from_signature
from fastgrpo.learning.objectives.loss import Loss, Moments, StepRows, TargetMoments, effective_clip_range
from fastgrpo.learning.objectives.matching import awm, dpo, nft, sft
from fastgrpo.learning.objectives.policy_gradient import clip, dppo, guard
from fastgrpo.sampling.schedule import Weighting

__all__ = [
    "OBJECTIVES", "Loss", "Moments", "Objective", "StepRows", "TargetMoments", "effective_clip_range", "settings_of",
    "weighting", "clip", "guard", "dppo", "nft", "awm", "dpo", "sft",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective and what it asks of a trainer."""

    loss: Callable[..., Loss]
    on_final_images: bool = False
    """Trains on final images that are noised again: with TargetMoments, sigma as `rows.s`, and clip_range as it is."""
    old: Literal["behaviour", "reference", "zero"] = "behaviour"
    """Source of v_old: the policy that sampled, the model before training, or zero."""
    pairs: bool = False
    """Rows 2i and 2i + 1 are a chosen and a rejected sample of one prompt, with one t and one noise."""
    step_weight: StepWeight = "uniform"
    """Weight of a step's policy loss where the configuration names none."""
    may_be_zero: tuple[str, ...] = ()
    """Settings that may be 0; all other numbers must be above it."""


OBJECTIVES: dict[str, Objective] = {
    "clip": Objective(loss=clip),
    "guard": Objective(loss=guard, step_weight="guard"),
    "dppo": Objective(loss=dppo),
    "nft": Objective(loss=nft, on_final_images=True),
    "awm": Objective(loss=awm, on_final_images=True, may_be_zero=("time_power", "ema_beta")),
    "dpo": Objective(loss=dpo, on_final_images=True, old="reference", pairs=True),
    "sft": Objective(loss=sft, on_final_images=True, old="zero"),
}


def weighting(config: ObjectiveConfig) -> Weighting | None:
    """How the configured objective weighs the steps of a rollout; None where it trains on final images."""
    objective = OBJECTIVES[config.name]
    if objective.on_final_images:
        return None
    return Weighting(log_prob=config.log_prob_weight, kl=config.kl, step=config.step_weight or objective.step_weight)


def settings_of(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The objective's own settings, those left out at their defaults; refuses what it does not take."""
    objective, path = OBJECTIVES[name], "objective.settings"
    parameters = inspect.signature(objective.loss).parameters.values()
    passed = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] + ["clip_range", "beta"]
    values = settings_from_signature(objective.loss, settings, path, owner=f"objective {name!r}", passed=passed)
    for key, value in values.items():
        zero = key in objective.may_be_zero
        if isinstance(value, float) and not (value > 0 or zero and value == 0):
            schema.refuse(f"{path}.{key}", value, f"must be {'at least' if zero else 'above'} 0")
    return values
