"""A trained transformer as the files of its base, with what was trained put in: W + B A for a LoRA, in the dtype of W.

    write_merged(model_class("sd3"), base, trained, output)

They are as many as the base's, and each is read, changed and written by itself: no more than one has to fit into memory. So
what reads the base's folder reads these, BAGEL's own code included. What was not trained stays bit for bit.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from fastgrpo.models.loading import TRANSFORMER, LoadedPipeline
from fastgrpo.models.lora_file import read_lora
from fastgrpo.models.lora_formats import Factors
from fastgrpo.tensor_files import read_tensors, write_tensors


def write_merged(family: type[LoadedPipeline], base: Path, trained: Path, output: Path) -> None:
    """Write them into a folder, a transformer/ as of a pipeline or BAGEL's ema.safetensors.

    base: the model's folder. trained: a LoRA, or a folder with a whole transformer/ that a run has written.
    ValueError: the base is not there as safetensors, or the LoRA is of another model.
    """
    files = family.weight_files(base)
    if not all(file.is_file() for file in files) or not files:
        raise ValueError(
            f"model.path = {base}: holds no transformer as files of safetensors; save it so with diffusers first"
        )
    _write(files, base, output, _changes(family, base, trained))


def _changes(family: type[LoadedPipeline], base: Path, trained: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """What becomes of a weight, by its name in the base's files."""
    if not (trained / TRANSFORMER).is_dir():
        layers = read_lora(trained, family.skeleton(base)).layers
        return {family.weight_name(f"{layer}.weight"): partial(_plus, factors) for layer, factors in layers.items()}
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for file in sorted((trained / TRANSFORMER).glob("*.safetensors")):
        for name, tensor in read_tensors(file)[0].items():
            changes[family.weight_name(name)] = partial(_in_place_of, tensor)
    return changes


def _plus(factors: Factors, weight: Tensor) -> Tensor:
    return (weight.float() + factors.b @ factors.a).to(weight.dtype)


def _in_place_of(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.to(weight.dtype)


def _write(files: list[Path], base: Path, output: Path, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    left = set(changes)
    for file in files:
        tensors, notes = read_tensors(file)
        for name in tensors.keys() & left:
            tensors[name] = changes[name](tensors[name])
            left.remove(name)
        target = output / file.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(target, tensors, notes)
    if left:
        raise ValueError(f"model.path = {base}: its files have no {min(left)}, which was trained")
    if files[0].parent != base:
        for beside in files[0].parent.glob("*.json"):  # the config, and which weight is in which file
            shutil.copy(beside, output / beside.relative_to(base))
