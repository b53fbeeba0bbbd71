"""Checks that a folder holds a pipeline that can be loaded, before anything heavy starts.

Every file that will be read is looked at, though no weights are: that it is there, whole and no pointer of git-lfs, from
its size and its head; a file of JSON is parsed. The tensors that the heads name are those that the networks read, see
`fastgrpo.models.fitting`.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgrpo.files import json_value
from fastgrpo.models import families_of
from fastgrpo.models.fitting import check_fit, is_of_diffusers, network_class
from fastgrpo.models.headers import read_header, read_headers
from fastgrpo.models.quantized import PACKAGES, check_package, quantization

WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (".safetensors", ".bin")
WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor")
POINTER = b"version https://git-lfs"  # how the text begins that stands for a file until `git lfs pull`
CUT = "was the download cut? Get it again"
# What a scheduler's config may say that this project does not do: the key, and the value that changes nothing.
SCHEDULED = {"num_train_timesteps": 1000, "stochastic_sampling": False, "invert_sigmas": False}


def check_folder(
    path: Path,
    pipeline_class: str,
    published_as: Sequence[str] = (),
    *,
    variant: str | None = None,
    elsewhere: tuple[str, ...] = (),
) -> None:
    """Refuse a folder that holds no pipeline in the diffusers format, another family's, or an incomplete one: ValueError.

    published_as: other classes that a folder of the family may name. variant: of a part's weights, where it has them.
    elsewhere: parts whose weights are not read from this folder.
    """
    with readable(where := f"model.path = {path}"):
        index = path / "model_index.json"
        if not index.is_file():
            raise ValueError(f"{where}: {_instead(path)}")
        parts = check_file(index, path, where)
        if (found := parts.get("_class_name")) not in (pipeline_class, *published_as):
            names = families_of(str(found))
            way_out = f"set model.name to {' or '.join(names)}" if names else "no model.name reads that"
            raise ValueError(f"{where}: holds a {found}, and this model.name reads a {pipeline_class}: {way_out}")
        listed = {name: kind for name, kind in parts.items() if isinstance(kind, list) and kind[0] is not None}
        for name, (library, kind) in listed.items():
            if name not in elsewhere:
                _check_part(path, name, (library, kind), where, variant)
        if variant and not any(_named(path / name, variant) for name in listed):
            raise ValueError(f"model.variant = {variant!r}: no part of {path} has weights of that variant; leave it out")


def _instead(path: Path) -> str:
    """What there is at a path that holds no pipeline, and what to do."""
    if path.is_file():
        return "is one file, and a pipeline has many: name the whole pipeline's folder, and this file in model.transformer"
    if not path.exists():
        name = str(path)
        get = f"; a repository of the Hub is read once it is here: `hf download {name} --local-dir models/{path.name}`"
        return f"there is no such folder{get if name.count('/') == 1 and not path.is_absolute() else ''}"
    if (path / "ema.safetensors").is_file() and (path / "llm_config.json").is_file():
        return "holds BAGEL as published: set model.name to bagel"
    if (path / "config.json").is_file():
        return "holds a single network: name the whole pipeline's folder, and this one in model.transformer"
    return "holds no model_index.json, so it is no diffusers pipeline folder"


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Inside, what the system does not let be read is a ValueError that names it. where: the key and its value."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{where}: {error.filename} cannot be read ({error.strerror})") from None


def check_file(file: Path, folder: Path, where: str) -> dict[str, Any]:
    """Refuse a file that is empty, cut or a pointer: ValueError. Returns what a file of JSON holds, else nothing.

    folder: the message names the file from here on. where: the key and its value, with which the message begins.
    """
    name = f"{where}: {file.relative_to(folder)}"
    with file.open("rb") as opened:
        head = opened.read(len(POINTER))
    if not head:
        raise ValueError(f"{name} is an empty file: {CUT}")
    if head == POINTER:
        raise ValueError(f"{name} is a pointer of git-lfs and not the file itself: run `git lfs pull` in {folder}")
    try:
        read_header(file)
    except ValueError as error:
        raise ValueError(f"{name} {error}: {CUT}") from None
    return _read_json(file, name) if file.suffix == ".json" else {}


def check_weights(part: Path, folder: Path, where: str, variant: str | None = None) -> list[Path]:
    """Refuse the folder of a network in which config.json or the weights are missing or not whole: ValueError.

    Returns the files of the weights that would be loaded.
    """
    name = part.relative_to(folder)
    if not (part / "config.json").is_file():
        raise ValueError(f"{where}: {name / 'config.json'} is missing")
    check_file(part / "config.json", folder, where)
    found = _named(part, variant) or _named(part, None)
    if found is None:
        raise ValueError(f"{where}: {name}/ {_no_weights(part)}")
    files = _shards(part, found, folder, where) if found.suffix == ".json" else [found]
    for file in files:
        check_file(file, folder, where)
    return files


def check_network(part: Path, folder: Path, kind: Any, where: str, variant: str | None = None) -> None:
    """Refuse the folder of a network of the class `kind` that cannot be loaded: ValueError. No weights are read."""
    files = check_weights(part, folder, where, variant)
    name = f"{where}:" if part == folder else f"{where}: {part.relative_to(folder)}/"
    method = quantization(part)
    if method is not None:  # its tensors are those that the quantisation makes of the network's
        if method in PACKAGES or is_of_diffusers(kind):  # transformers reads more methods
            check_package(method, name)
        return
    if files[0].suffix != ".safetensors":
        warnings.warn(f"{name} has its weights as .bin only, which tells nothing before all is loaded", stacklevel=2)
        return
    try:
        check_fit(kind, part, read_headers(files))
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def variant_of(part: Path, variant: str | None) -> str | None:
    """The variant, if the folder of a network has its weights in it."""
    return variant if _named(part, variant) else None


def _named(part: Path, variant: str | None) -> Path | None:
    """The file of a network's weights, or the index of its shards, of exactly this variant; None if there is none."""
    between = f".{variant}" if variant else ""
    for ending in ENDINGS:
        for stem in WEIGHTS:
            for file in (part / f"{stem}{ending}.index{between}.json", part / f"{stem}{between}{ending}"):
                if file.is_file():
                    return file
    return None


def _no_weights(part: Path) -> str:
    """What a folder without weights of the usual name holds instead."""
    stems = "|".join(WEIGHTS)
    names = (re.fullmatch(rf"(?:{stems})\.(\w+)(?:-\d+-of-\d+)?\.safetensors", file.name) for file in part.iterdir())
    variants = sorted({name[1] for name in names if name})
    if variants:
        return f"holds weights of the variant {' and '.join(variants)} only: set model.variant to {variants[0]}"
    packed = sorted(part.glob("*.gguf"))
    if packed:
        return f"holds no weights (.safetensors), but {packed[0].name}: set model.transformer to that file"
    return f"holds no weights (.safetensors): {CUT}"


def _check_part(path: Path, name: str, kind: tuple[str, str], where: str, variant: str | None) -> None:
    part = path / name
    if not part.is_dir():
        raise ValueError(f"{where}: the folder {name}/ with its {kind[1]} is missing")
    if not any(word in kind[1] for word in WITHOUT_WEIGHTS):
        try:
            network = network_class(*kind)
        except ValueError as error:
            raise ValueError(f"{where}: {name}/ {error}") from None
        check_network(part, path, network, where, variant)
        return
    files = [file for file in sorted(part.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise ValueError(f"{where}: the folder {name}/ with its {kind[1]} is empty: {CUT}")
    content = {file.name: check_file(file, path, where) for file in files}
    for key, value in content.get("scheduler_config.json", {}).items():
        if key in SCHEDULED and value is not None and value != SCHEDULED[key]:
            way_out = f"noise levels here are those of {key} = {SCHEDULED[key]}: give it that value, or take another folder"
            raise ValueError(f"{where}: {name}/scheduler_config.json says {key} = {value}; {way_out}")


def _shards(part: Path, index: Path, folder: Path, where: str) -> list[Path]:
    names = check_file(index, folder, where).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{where}: {index.relative_to(folder)} has no weight_map: {CUT}")
    shards = sorted({part / str(name) for name in names.values()})
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(f"{where}: {missing[0].relative_to(folder)} is missing, and {len(missing) - 1} more: {CUT}")
    if not shards:
        raise ValueError(f"{where}: {index.relative_to(folder)} names no file: {CUT}")
    return shards


def _read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        content = json_value(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}): {CUT}") from None
    return content if isinstance(content, dict) else {}
