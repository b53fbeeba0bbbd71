"""Model families by name. The names are strings, so that a family's libraries load only when it is used.

A family is one file here, with a class as `fastgrpo.models.adapter` describes it, and one line in `MODELS`.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from fastgrpo.models.settings import model_settings

if TYPE_CHECKING:
    import torch

    from fastgrpo.models.adapter import Adapter
    from fastgrpo.policy import Model

MODELS = {
    "sd3": "fastgrpo.models.sd3:SD3",
    "flux": "fastgrpo.models.flux:Flux",
    "flux_kontext": "fastgrpo.models.flux:FluxKontext",
    "qwen_image": "fastgrpo.models.qwen_image:QwenImage",
    "qwen_image_edit": "fastgrpo.models.qwen_image_edit:QwenImageEdit",
    "qwen_image_edit_plus": "fastgrpo.models.qwen_image_edit:QwenImageEditPlus",
    "qwen_image_21": "fastgrpo.models.qwen_image_21:QwenImage21",
    "wan": "fastgrpo.models.wan:Wan",
    "wan_image": "fastgrpo.models.wan_image:WanImage",
    "wan_video": "fastgrpo.models.wan_video:WanVideo",
    "bagel": "fastgrpo.models.bagel:Bagel",
    "flux2": "fastgrpo.models.flux2:Flux2",
    "flux2_klein": "fastgrpo.models.flux2:Flux2Klein",
    "z_image": "fastgrpo.models.z_image:ZImage",
}


def model_class(name: str) -> "type[Adapter]":
    """The class of a model family. Importing it loads no weights."""
    # diffusers asks transformers for image processors that no text-to-image model needs, and transformers then complains at
    # every start that torchvision is missing.
    logging.getLogger("transformers.utils.import_utils").addFilter(lambda r: "requires torchvision" not in r.getMessage())
    module, _, attribute = MODELS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def families_of(pipeline_class: str) -> list[str]:
    """The names of the families that read pipelines of a class of diffusers."""
    return [name for name in MODELS if model_class(name).pipeline_class == pipeline_class]


def load_model(name: str, **arguments: Any) -> "Adapter":
    """A pretrained model of the family `name`, made by its class's `load`. ValueError: a weight in it is not finite.

        load_model("sd3", path=Path("stable-diffusion-3.5-medium"), dtype=torch.bfloat16, device=torch.device("cuda"))

    transformer=FOLDER_OR_FILE takes the transformer from there, variant="fp16" the weights of that variant. Further
    arguments are the fields of `fastgrpo.models.settings.Settings`, such as height=512.
    """
    model = model_class(name).load(**arguments)
    model.check_numbers(f"model.path = {arguments.get('path')}")
    return model


def base_of(section: Any) -> dict[str, Any]:
    """Where the weights come from beside `model.path`, as arguments of a family's `load` and `check_files`."""
    return {key: value for key in ("transformer", "variant") if (value := getattr(section, key)) is not None}


def configured_model(section: Any, device: "torch.device") -> "Model":
    """The model that a configuration's `model` section asks for. Nothing in it is trainable yet."""
    import torch

    settings = model_settings(section)
    dtype = getattr(torch, section.dtype)
    if section.random_weights:
        return model_class(section.name).random(section.architecture, dtype=dtype, device=device, **settings)
    return load_model(section.name, path=section.path, dtype=dtype, device=device, **base_of(section), **settings)
