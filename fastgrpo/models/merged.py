"""A trained transformer as the files of its base, with what was trained put in: W + B A for a LoRA, in the dtype of W.

    write_merged(model_class("sd3"), base, {"transformer": run / "pytorch_lora_weights.safetensors"}, output)

They are as many as the base's, and each is read, changed and written by itself: no more than one has to fit into memory. So
what reads the base's folder reads these, BAGEL's own code included. What was not trained stays bit for bit. Of two experts
each that was trained is written.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgrpo.files import json_value
from fastgrpo.models.loading import LoadedPipeline
from fastgrpo.models.lora_file import read_lora
from fastgrpo.models.lora_formats import Factors
from fastgrpo.tensor_files import read_tensors, write_tensors

Change = Callable[[Tensor], Tensor]


def write_merged(
    family: type[LoadedPipeline], base: Path, trained: Mapping[str, Path], output: Path, **sources: Any
) -> None:
    """Write them into a folder, a transformer/ as of a pipeline or BAGEL's ema.safetensors.

    base: the model's folder. trained: by network, its LoRA's file or the folder of its whole weights, as a run has written
    them. sources: `transformer` and `variant`, where the base's weights come from by them, as in `LoadedPipeline.load`.
    ValueError: the base's weights are not there as plain safetensors, or the LoRA is of another model.
    """
    for network, place in trained.items():
        files = family.weight_files(base, network, **sources)
        if any(file.suffix != ".safetensors" for file in files.values()):
            raise ValueError(
                f"model.path = {base}: holds no {network} as files of safetensors; save it so with diffusers first"
            )
        _write(files, output, _changes(family, base, network, place))


def _changes(family: type[LoadedPipeline], base: Path, network: str, trained: Path) -> dict[str, Change]:
    """What becomes of a weight, by its name in the base's files."""
    if trained.is_file():
        layers = read_lora(trained, family.skeleton(base, network)).layers
        return {family.weight_name(f"{layer}.weight"): partial(_plus, factors) for layer, factors in layers.items()}
    changes: dict[str, Change] = {}
    for file in sorted(trained.glob("*.safetensors")):
        for name, tensor in read_tensors(file)[0].items():
            changes[family.weight_name(name)] = partial(_in_place_of, tensor)
    return changes


def _plus(factors: Factors, weight: Tensor) -> Tensor:
    return (weight.float() + factors.b @ factors.a).to(weight.dtype)


def _in_place_of(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.to(weight.dtype)


def _write(files: Mapping[Path, Path], output: Path, changes: Mapping[str, Change]) -> None:
    """files: the base's, by their places in the output."""
    left = set(changes)
    for place, file in files.items():
        tensors, notes = read_tensors(file)
        for name in tensors.keys() & left:
            tensors[name] = changes[name](tensors[name])
            left.remove(name)
        (output / place).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(output / place, tensors, notes)
    if left:
        raise ValueError(f"{file.parent}: its files have no {min(left)}, which was trained")
    if place.parent.name:
        _copy_settings(file.parent, (output / place).parent)


def _copy_settings(folder: Path, output: Path) -> None:
    """A network's config, and which weight is in which file, as far as those files are there."""
    for beside in folder.glob("*.json"):
        content: Any = json_value(beside.read_bytes())
        shards = content.get("weight_map", {}).values() if isinstance(content, dict) else ()
        if all((output / shard).is_file() for shard in shards):
            shutil.copy(beside, output / beside.name)
