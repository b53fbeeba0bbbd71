"""Complete tiny pipelines with random weights, made offline: the real classes of each model family, in megabytes.

    family = load_family("flux")
    family.save(folder)                     a folder in the diffusers format, as a downloaded one
    model = load_model("flux", path=folder, dtype=torch.float32, device=torch.device("cpu"), **family.settings)

For tests of this project and of yours: a reward, a sampler or an objective can be tried on every family in seconds.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    "wan": "fastgrpo.testing.wan:FAMILY",
    "bagel": "fastgrpo.testing.bagel:FAMILY",
    "flux2": "fastgrpo.testing.flux2:DEV",
    "flux2_klein": "fastgrpo.testing.flux2:KLEIN",
    "z_image": "fastgrpo.testing.z_image:FAMILY",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny pipeline, and how the stock one is called."""

    make: Callable[[], Any]  # seeded
    # (pipeline, prompts, latents (B, *D), num_steps, guidance_scale) -> (B, 3, H, W) or (B, T, 3, H, W) float, 0 to 1
    call: Callable[[Any, Sequence[Any], Tensor, int, float], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)  # of the adapter
    guidance: tuple[float, ...] = (1.0, 3.0)  # scales that the family can do
    guided_together: bool = False  # whether the stock pipeline runs both halves of guidance as one batch
    prompts: tuple[Any, ...] = ("a red circle", "two blue squares left of a cat")
    tolerance: float = 0.0  # of a velocity, where `call` is not the same sequence of operations
    fully_trained: str = ""  # what the names of the weights have in common that full fine-tuning trains

    def save(self, folder: Path) -> None:
        """As a folder in the diffusers format, or as the family is published."""
        with quiet("diffusers", "transformers"):
            self.make().save_pretrained(folder)


def load_family(name: str) -> Family:
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
