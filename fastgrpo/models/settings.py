"""The settings of a model: the keys of a configuration's `model` section that a model family reads.

A model may have other settings for a while, another size above all (`fastgrpo.models.loading.LoadedPipeline.sized`). So
what follows from them is a property, and what takes time to make is `cached_by_settings`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is used, beside its weights. A family refuses a setting that it has no use for."""

    max_text_tokens: int
    height: int | None = None  # pixels; None is the size that the transformer was made for
    width: int | None = None
    input_size: int | Literal["output"] | None = None  # of an input image: the side in pixels of the square of its area
    num_frames: int | None = None  # frames of a video
    strength: float | None = None  # of the changes to an input video: the share of the noise levels that is gone through
    distilled_guidance: float | None = None  # the guidance that a distilled model takes as an input
    experts: Literal["both", "high", "low"] = "both"  # of two networks, those that are trained
    idle_expert: Literal["device", "host"] = "device"  # where the one that nobody asks for keeps its frozen weights


def model_settings(section: Any) -> dict[str, Any]:
    """The `Settings` of a configuration's `model` section, by name."""
    return {field.name: getattr(section, field.name) for field in fields(Settings)}


def cached_by_settings(function: Callable[[Any], T]) -> property:
    """A property of a model that is made once for each of its settings and stays: captured graphs read it by address."""

    @wraps(function)
    def found(model: Any) -> T:
        made = vars(model).setdefault("_made", {})
        key = function, model.settings
        if key not in made:
            made[key] = function(model)
        return made[key]

    return property(found)
