"""Policy objectives: pure functions of a few moments of each sample, `(moments, step, advantages, weight) -> Loss`.

    policy_gradient.py    clip, guard, dppo       of stochastic transitions, whose log-prob is a Gaussian's
    matching.py           nft, awm, dpo, sft      of noised final samples: rollouts may be plain ODE

The heavy part, moments of (B, D) tensors and their gradient, is `fastgrpo_kernels.transition`, for all of them. A new
objective is a function and a row of `OBJECTIVES`; its keyword parameters besides clip_range and beta are the keys of
`objective.settings`.

Letters: B samples, D elements a sample.
"""

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastgrpo.config import schema
from fastgrpo.config.keys import ObjectiveConfig, StepWeight
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
    """Trains on final images that are noised again: with TargetMoments, sigma as `step.s`, and clip_range as it is."""
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


def settings_of(name: str, settings: Mapping[str, Any], prefix: str = "objective.settings.") -> dict[str, Any]:
    """The objective's own settings, those left out at their defaults; refuses what it does not take."""
    objective = OBJECTIVES[name]
    hints, parameters = typing.get_type_hints(objective.loss), inspect.signature(objective.loss).parameters
    own = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in ("clip_range", "beta")]
    for key in settings if not own else ():
        raise schema.ConfigError(f"{prefix}{key}: objective {name!r} has no settings of its own; leave it out")
    fields = [(p.name, hints[p.name], dataclasses.field(default=p.default)) for p in own]
    values = vars(schema.build(dataclasses.make_dataclass(name, fields), dict(settings), prefix))
    for key, value in values.items():
        zero = key in objective.may_be_zero
        if isinstance(value, float) and not (math.isfinite(value) and (value > 0 or zero and value == 0)):
            schema.refuse(prefix + key, value, f"it must be finite and {'at least' if zero else 'above'} 0")
    return dict(values)
