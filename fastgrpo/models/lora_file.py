"""The file of a trained LoRA as it is read: checked against the transformer before PEFT sees any of it.

    transformer.LAYER.lora_A.weight (r, in)        transformer.LAYER.lora_B.weight (out, r)        y += alpha / r x A^T B^T

Of the metadata only r and alpha are taken, and what changes the formula is refused. PEFT would follow all of it, down to a
name of a module to import.
"""

import math
import re
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from fastgrpo.files import json_value
from fastgrpo.tensor_files import read_tensors

NAME = re.compile(r"transformer\.(.+)\.lora_([AB])\.weight")
# What makes another formula of it where it is not empty or false.
OTHER_FORMULAS = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")


def read_lora(file: Path, transformer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights by their names in the file, and PEFT's settings for them, both as `load_lora_adapter` takes them.

    Raises ValueError with the file's name where it is not whole, or not a LoRA of this transformer.
    """
    weights, notes = read_tensors(file)
    ranks = {_rank(file, name, tensor, transformer, weights) for name, tensor in weights.items()}
    if len(ranks) != 1:
        _refuse(file, f"its layers have the ranks {sorted(ranks)}" if ranks else "it holds no weights")
    (rank,) = ranks
    layers = sorted({name.partition(".")[2].rpartition(".lora_")[0] for name in weights})
    settings = {"r": rank, "lora_alpha": _alpha(file, rank, notes), "target_modules": layers}
    return weights, {f"transformer.{key}": value for key, value in settings.items()}


def _rank(file: Path, name: str, tensor: Tensor, transformer: nn.Module, weights: dict[str, Tensor]) -> int:
    """The rank of one of the matrices, if it is one of a layer of the transformer."""
    found = NAME.fullmatch(name)
    if found is None:
        _refuse(file, f"{name[:200]!r} is no weight of a LoRA")
    layer, side = found.groups()
    try:
        linear: Any = transformer.get_submodule(layer)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        _refuse(file, f"{type(transformer).__name__} has no linear layer {layer[:200]!r}")
    if f"transformer.{layer}.lora_{'BA'['AB'.index(side)]}.weight" not in weights:
        _refuse(file, f"{name!r} stands without its other half")
    width, axis = (linear.in_features, 1) if side == "A" else (linear.out_features, 0)
    if tensor.dim() != 2 or tensor.shape[axis] != width or not tensor.shape[1 - axis] or not tensor.is_floating_point():
        _refuse(file, f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, and the layer has {width} values on that side")
    return tensor.shape[1 - axis]


def _alpha(file: Path, rank: int, notes: dict[str, str]) -> float:
    """alpha as the metadata say it; without any it is the rank, as other readers have it."""
    try:
        said = json_value(notes.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        _refuse(file, f"its metadata are no JSON ({error})")
    if not isinstance(said, dict):
        _refuse(file, "its metadata are no mapping")
    said = {key.removeprefix("transformer."): value for key, value in said.items()}
    for key in OTHER_FORMULAS:
        if said.get(key):
            _refuse(file, f"its metadata say {key} = {str(said[key])[:200]}, and a plain LoRA is read here")
    alpha = said.get("lora_alpha", rank)
    if said.get("r", rank) != rank:
        _refuse(file, f"its metadata say rank {str(said['r'])[:200]}, and its weights have rank {rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9 or not math.isfinite(alpha):
        _refuse(file, f"its metadata say lora_alpha = {str(alpha)[:200]}, which is no number above 0")
    return alpha


def _refuse(file: Path, what: str) -> NoReturn:
    raise ValueError(
        f"{file}: {what}; take the file that a run of this model wrote, or --base for the model before training"
    )
