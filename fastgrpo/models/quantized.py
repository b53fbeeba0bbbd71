"""Bases whose weights are quantised: fewer bits a weight, in a package's own layout. They are trained with a LoRA only.

    a .gguf file                                 model.transformer, read with the package gguf
    quantization_config in config.json           torchao, bitsandbytes or quanto wrote the folder, and read it again

A quantised layer turns its weights into numbers of `model.dtype` each time that it runs.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgrpo.files import json_value

# Method -> the module that reads it, and the package that has the module.
PACKAGES = {
    "torchao": ("torchao", "torchao"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "gguf": ("gguf", "gguf"),
}


def quantization(folder: Path) -> str | None:
    """The method by which the network in a folder was quantised; None if its config.json names none."""
    config = json_value((folder / "config.json").read_bytes())
    section = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(section, dict):
        return None
    packed = section.get("load_in_4bit") or section.get("load_in_8bit")
    return "bitsandbytes" if packed else str(section.get("quant_method"))


def check_package(method: str, where: str) -> None:
    """Refuse a method whose package is not installed, or that needs a GPU where there is none: ValueError."""
    if method == "gguf" and not where.endswith(".gguf"):
        raise ValueError(f"{where} was made of a .gguf, which is read from that file alone: set model.transformer to it")
    if method not in PACKAGES:
        raise ValueError(f"{where} is quantised by {method}; take one by {', '.join(PACKAGES)}, or the plain weights")
    module, package = PACKAGES[method]
    if not _installed(module):
        raise ValueError(f"{where} is quantised by {method}: `pip install {package}`, or take the plain weights")
    if method == "bitsandbytes" and not torch.cuda.is_available():
        raise ValueError(f"{where} is quantised by bitsandbytes, which needs a GPU; take the plain weights")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def method_of(transformer: Any) -> str | None:
    """The method by which a loaded transformer is quantised; None: its weights are plain numbers."""
    quantizer = getattr(transformer, "hf_quantizer", None)
    return None if quantizer is None else str(quantizer.quantization_config.quant_method.value)


def hide(transformer: nn.Module) -> None:
    """Make weights of a package's own class, as torchao and GGUF have, plain attributes of their layers and no parameters.

    DeepSpeed moves, casts, sends and shards every parameter of what it wraps, and such tensors do not bear it. They are
    frozen, on their device, and the same on every rank.
    """
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if type(parameter.data) is not torch.Tensor:
                delattr(module, name)
                setattr(module, name, parameter.data)
