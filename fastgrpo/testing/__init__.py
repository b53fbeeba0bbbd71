"""Complete tiny pipelines with random weights, made offline: the real classes of each model family, a few megabytes each.

    family = load_family("flux")
    family.save(folder)                     a folder like a downloaded one, in the diffusers format
    model = load_model(family.model, path=folder, dtype=torch.float32, device=torch.device("cpu"), **family.settings)

They serve the tests of this project and of yours: a reward, a sampler or an objective runs on every family in seconds.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgrpo.quiet import quiet

FAMILIES = {
    "sd3": "fastgrpo.testing.sd3:FAMILY",
    "flux": "fastgrpo.testing.flux:FAMILY",
    "flux_kontext": "fastgrpo.testing.flux:KONTEXT",
    "qwen_image": "fastgrpo.testing.qwen_image:FAMILY",
    "qwen_image_edit": "fastgrpo.testing.qwen_image:EDIT",
    "qwen_image_edit_plus": "fastgrpo.testing.qwen_image:EDIT_PLUS",
    "qwen_image_21": "fastgrpo.testing.qwen_image_21:FAMILY",
    "wan": "fastgrpo.testing.wan:FAMILY",
    "wan_image": "fastgrpo.testing.wan_image:FAMILY",
    "wan_video": "fastgrpo.testing.wan_video:FAMILY",
    "wan_experts": "fastgrpo.testing.wan:EXPERTS",
    "wan_image_experts": "fastgrpo.testing.wan_image:EXPERTS",
    "bagel": "fastgrpo.testing.bagel:FAMILY",
    "flux2": "fastgrpo.testing.flux2:DEV",
    "flux2_klein": "fastgrpo.testing.flux2:KLEIN",
    "z_image": "fastgrpo.testing.z_image:FAMILY",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny pipeline of a model family, and how to run it as the stock pipeline."""

    make: Callable[[], Any]  # makes the pipeline, always with the same weights
    # (pipeline, prompts, latents (B, *D), num_steps, guidance_scale) -> (B, 3, H, W) or (B, T, 3, H, W) float, 0 to 1;
    # some take height, width and num_frames besides
    call: Callable[..., Tensor]
    model: str = ""  # the family that reads it, in `fastgrpo.models`; left out: called as here
    settings: dict[str, Any] = field(default_factory=dict)  # the settings that its model is loaded with
    guidance: tuple[float, ...] = (1.0, 3.0)  # guidance scales that the family is capable of
    guided_together: bool = False  # whether the stock pipeline runs both halves of guidance as one batch
    prompts: tuple[Any, ...] = ("a red circle", "two blue squares left of a cat")
    tolerance: float = 0.0  # how far a velocity may differ, where `call` runs other operations than the model
    fully_trained: str = ""  # a part of the name of each weight that full fine-tuning trains, and of no other

    def save(self, folder: Path) -> None:
        """Write it to a folder in the diffusers format, or in the format in which the family is published."""
        with quiet("diffusers", "transformers"):
            self.make().save_pretrained(folder)


def load_family(name: str) -> Family:
    """The tiny pipeline called `name` in `FAMILIES`."""
    module, _, attribute = FAMILIES[name].partition(":")
    family: Family = getattr(importlib.import_module(module), attribute)
    return replace(family, model=family.model or name)
