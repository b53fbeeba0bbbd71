"""Checks that a folder holds a pipeline that can be loaded, before anything heavy starts.

Every file that will be read is looked at, though no weights are: that it is there, whole and no pointer of git-lfs, from
its size and its head; a file of JSON is parsed.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgrpo.files import json_value

WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (".safetensors", ".bin")
WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor")
POINTER = b"version https://git-lfs"  # how the text begins that stands for a file until `git lfs pull`
CUT = "was the download cut? Get it again"


def check_folder(path: Path, pipeline_class: str, published_as: Sequence[str] = ()) -> None:
    """Refuse a folder that holds no pipeline in the diffusers format, another family's, or an incomplete one: ValueError.

    published_as: other classes that a folder of the family may name.
    """
    with readable(where := f"model.path = {path}"):
        index = path / "model_index.json"
        if not index.is_file():
            raise ValueError(f"{where}: holds no model_index.json, so it is no diffusers pipeline folder")
        parts = check_file(index, path, where)
        if parts.get("_class_name") not in (pipeline_class, *published_as):
            raise ValueError(f"{where}: holds a {parts.get('_class_name')}, and this model.name reads a {pipeline_class}")
        for name, (library, kind) in ((k, v) for k, v in parts.items() if isinstance(v, list)):
            if library is not None:
                _check_part(path, name, kind, where)


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
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(max(len(POINTER), 8))
    if not size:
        raise ValueError(f"{name} is an empty file: {CUT}")
    if head.startswith(POINTER):
        raise ValueError(f"{name} is a pointer of git-lfs and not the file itself: run `git lfs pull` in {folder}")
    if file.suffix == ".safetensors":
        _check_safetensors(file, head, size, name)
    return _read_json(file, name) if file.suffix == ".json" else {}


def check_weights(part: Path, folder: Path, where: str) -> None:
    """Refuse the folder of a network in which config.json or the weights are missing or not whole: ValueError."""
    name = part.relative_to(folder)
    if not (part / "config.json").is_file():
        raise ValueError(f"{where}: {name / 'config.json'} is missing")
    check_file(part / "config.json", folder, where)
    for ending in ENDINGS:
        for stem in WEIGHTS:
            shards = part / f"{stem}{ending}.index.json"
            if shards.is_file():
                _check_shards(part, shards, folder, where)
                return
            if (part / f"{stem}{ending}").is_file():
                check_file(part / f"{stem}{ending}", folder, where)
                return
    raise ValueError(f"{where}: {name}/ holds no weights (.safetensors): {CUT}")


def _check_part(path: Path, name: str, kind: str, where: str) -> None:
    part = path / name
    if not part.is_dir():
        raise ValueError(f"{where}: the folder {name}/ with its {kind} is missing")
    if not any(word in kind for word in WITHOUT_WEIGHTS):
        check_weights(part, path, where)
        return
    files = [file for file in sorted(part.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise ValueError(f"{where}: the folder {name}/ with its {kind} is empty: {CUT}")
    for file in files:
        check_file(file, path, where)


def _check_shards(part: Path, index: Path, folder: Path, where: str) -> None:
    names = check_file(index, folder, where).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{where}: {index.relative_to(folder)} has no weight_map: {CUT}")
    shards = sorted({part / str(name) for name in names.values()})
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(f"{where}: {missing[0].relative_to(folder)} is missing, and {len(missing) - 1} more: {CUT}")
    for shard in shards:
        check_file(shard, folder, where)


def _check_safetensors(file: Path, head: bytes, size: int, name: str) -> None:
    """Its first 8 bytes are the length of the header, which says where each tensor ends."""
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else size
    try:
        with file.open("rb") as opened:
            header = json_value(opened.read(8 + min(length, size))[8:])
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{name} is no file of safetensors, or the beginning of one: {CUT}") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{name} has {size} bytes and must have {expected}: {CUT}")


def _read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        content = json_value(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}): {CUT}") from None
    return content if isinstance(content, dict) else {}
