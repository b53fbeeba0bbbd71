"""A LoRA on disk: read from whoever wrote it, checked against the transformer before any of it is used, and written.

    lora = read_lora(path, network)             path: the file, or a folder that holds one
    lora.rank, lora.layers["transformer_blocks.0.attn.to_q"]        y += x A^T B^T
    write_lora(folder, "kohya", lora, network, name="cats")         cats.safetensors

Of what the file or PEFT's adapter_config.json says about it only r and alpha are taken, and what changes the formula is
refused. PEFT would follow all of it, down to a name of a module to import.
"""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import nn

from fastgrpo.files import json_text, json_value
from fastgrpo.finite import first_not_finite, in_words
from fastgrpo.models.lora_formats import LARGEST_ALPHA, Layers, read_layers, written
from fastgrpo.reporting.run_folder import LORAS
from fastgrpo.tensor_files import read_tensors, write_tensors

DIFFUSERS, PEFT, PEFT_SETTINGS = LORAS["transformer"], "adapter_model.safetensors", "adapter_config.json"
NOISE = {"transformer": "high_noise", "transformer_2": "low_noise"}  # what other programs call the two experts
# What makes another formula of it where it is not empty or false.
OTHER_FORMULAS = (
    "use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out",
)  # fmt: skip


class Lora(NamedTuple):
    """A LoRA of one rank, with alpha / r in its B."""

    rank: int
    layers: Layers  # float32, on the CPU


def find_lora(path: Path) -> Path:
    """The file of the LoRA at a path: it itself, or in a folder the one of the usual name, or the only one. ValueError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; name a LoRA's file of safetensors, or a folder that holds one")
    for name in (DIFFUSERS, PEFT):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        there = "several files of safetensors" if files else "no file of safetensors"
        raise ValueError(f"{path}: holds {there}, none of them called {DIFFUSERS} or {PEFT}; name the LoRA's file")
    return files[0]


def find_expert_lora(path: Path, network: str) -> Path | None:
    """The file of one expert's LoRA in a folder that may hold both: by a run's name or `NOISE`, or in PEFT's folder."""
    files = [path / LORAS[network], path / network / PEFT, *sorted(path.glob(f"*{NOISE[network]}*.safetensors"))]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        raise ValueError(f"{path}: {found[0].name} and {found[1].name} are both of the expert {network}; leave one there")
    return found[0] if found else None


def lora_files(path: Path) -> list[Path]:
    """The files that the LoRA at a path is read from: its weights, two where it is of two experts, and PEFT's settings.

    ValueError: there is none.
    """
    files = [file for network in LORAS if (file := find_expert_lora(path, network))] or [find_lora(path)]
    return [*files, *(file.with_name(PEFT_SETTINGS) for file in files if file.name == PEFT)]


def read_lora(path: Path, network: nn.Module) -> Lora:
    """The LoRA at a path. ValueError names the file where it is not whole, or is no plain LoRA of this transformer."""
    file = find_lora(path)
    weights, notes = read_tensors(file)
    try:
        said = _said(file, notes)
        layers = read_layers(weights, network, said.get("alpha"))
        ranks = sorted({len(factors.a) for factors in layers.values()})
        if len(ranks) != 1:
            raise ValueError(f"its layers have the ranks {ranks}" if ranks else "it holds no weights")
        if said.get("r", ranks[0]) != ranks[0]:
            raise ValueError(f"its settings say rank {str(said['r'])[:200]}, and its weights have rank {ranks[0]}")
        for layer, factors in layers.items():
            if (side := first_not_finite(factors._asdict())) is not None:
                raise ValueError(f"the {side.upper()} of {layer} is {in_words(factors._asdict()[side])}: was it damaged?")
    except ValueError as error:
        _refuse(file, error)
    return Lora(ranks[0], layers)


def write_lora(
    folder: Path, form: str, lora: Lora, network: nn.Module, name: str = "lora", *, weight_name: str = DIFFUSERS
) -> None:
    """Write a LoRA in one of the `FORMATS` into a folder. name: of the file, in formats whose readers look for none by name.
    weight_name: of the file in the format of diffusers.

    alpha is the rank, so readers that know no alpha apply it as it is. ValueError: the network has no such format.
    """
    weights = written(form, lora.layers, network)
    file = folder / {"diffusers": weight_name, "peft": PEFT}.get(form, f"{name}.safetensors")
    # No metadata on rank, alpha and layers: releases of diffusers up to 0.36 understand no settings but those of one PEFT.
    write_tensors(file, weights, {"format": "pt"})
    if form == "peft":
        # Only what every release of PEFT knows.
        settings = {
            "peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.rank, "target_modules": sorted(lora.layers),
            "bias": "none", "inference_mode": True, "base_model_name_or_path": None,
        }  # fmt: skip
        file.with_name(PEFT_SETTINGS).write_text(json_text(settings, indent=1) + "\n", encoding="utf-8")


def _said(file: Path, notes: dict[str, str]) -> dict[str, Any]:
    """r and alpha as diffusers' metadata or PEFT's settings say them; without any, alpha is the rank, as elsewhere."""
    settings = file.with_name(PEFT_SETTINGS)
    if file.name == PEFT and not settings.is_file():
        raise ValueError(f"{PEFT_SETTINGS} is missing beside it, which says its alpha")
    text = settings.read_bytes() if file.name == PEFT else notes.get("lora_adapter_metadata", "{}")
    try:
        said = json_value(text)
    except ValueError as error:
        raise ValueError(f"its settings are no JSON ({error})") from None
    if not isinstance(said, dict):
        raise ValueError("its settings are no mapping")
    said = {key.removeprefix("transformer."): value for key, value in said.items()}
    if said.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"its settings say peft_type = {str(said['peft_type'])[:200]}, and a plain LoRA is read here")
    for key in OTHER_FORMULAS:
        if said.get(key):
            raise ValueError(f"its settings say {key} = {str(said[key])[:200]}, and a plain LoRA is read here")
    alpha = said.get("lora_alpha", 1)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < LARGEST_ALPHA:
        raise ValueError(f"its settings say lora_alpha = {str(alpha)[:200]}, which is no number above 0")
    return {name: said[key] for name, key in (("r", "r"), ("alpha", "lora_alpha")) if key in said}


def _refuse(file: Path, error: ValueError) -> NoReturn:
    raise ValueError(
        f"{file}: {error}; take a LoRA of this model in one of the layouts that docs/running.md lists, or let diffusers "
        "rewrite it (load_lora_weights, then save_lora_weights)"
    ) from None
