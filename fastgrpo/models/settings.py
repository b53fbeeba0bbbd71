"""The settings of a model: the keys of a configuration's `model` section that a model family reads."""

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is used, beside its weights. A family refuses a setting that it has no use for."""

    max_text_tokens: int = 256
    height: int | None = None  # pixels; None is the size that the transformer was made for
    width: int | None = None
    num_frames: int | None = None  # frames of a video
    distilled_guidance: float | None = None  # the guidance that a distilled model takes as an input
    experts: Literal["both", "high", "low"] = "both"  # of two networks, those that are trained
    idle_expert: Literal["device", "host"] = "device"  # where the one that nobody asks for keeps its frozen weights


def model_settings(section: Any) -> dict[str, Any]:
    """The `Settings` of a configuration's `model` section, by name."""
    return {field.name: getattr(section, field.name) for field in fields(Settings)}
