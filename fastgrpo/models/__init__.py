"""Model adapters by name. The names are strings, so that a family's libraries load only when it is used.

A new family is one file here, a class as `fastgrpo.models.adapter` says, and one line in `MODELS`.
"""

import importlib
import logging
from typing import Any

MODELS = {
    "sd3": "fastgrpo.models.sd3:SD3",
    "flux": "fastgrpo.models.flux:Flux",
    "flux_kontext": "fastgrpo.models.flux:FluxKontext",
    "qwen_image": "fastgrpo.models.qwen_image:QwenImage",
    "qwen_image_edit": "fastgrpo.models.qwen_image:QwenImageEdit",
    "wan": "fastgrpo.models.wan:Wan",
    "bagel": "fastgrpo.models.bagel:Bagel",
    "flux2": "fastgrpo.models.flux2:Flux2",
    "flux2_klein": "fastgrpo.models.flux2:Flux2Klein",
    "z_image": "fastgrpo.models.z_image:ZImage",
}


SETTINGS = ("max_text_tokens", "height", "width", "num_frames", "distilled_guidance")


def model_class(name: str) -> type:
    """The adapter's class; none of its libraries loads weights."""
    # diffusers asks transformers for image processors that no text-to-image model needs, which says so at every start.
    logging.getLogger("transformers.utils.import_utils").addFilter(lambda r: "requires torchvision" not in r.getMessage())
    module, _, attribute = MODELS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_model(name: str, **arguments: Any) -> Any:
    """The adapter called `name`, from its class's own `load`."""
    return model_class(name).load(**arguments)


def configured_model(section: Any, device: Any) -> Any:
    """The adapter that a configuration's `model` section asks for, with nothing to train yet."""
    import torch

    settings = {key: getattr(section, key) for key in SETTINGS}
    dtype = getattr(torch, section.dtype)
    if section.random_weights:
        return model_class(section.name).random(section.architecture, dtype=dtype, device=device, **settings)
    return load_model(section.name, path=section.path, dtype=dtype, device=device, **settings)
