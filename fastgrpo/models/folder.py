"""Checks that a folder holds a pipeline that can be loaded, by its file names alone, before anything heavy starts."""

import json
from pathlib import Path

WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (".safetensors", ".bin")
WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor")


def check_folder(path: Path, pipeline_class: str) -> None:
    """Refuse a folder that holds no pipeline in the diffusers format, another family's, or an incomplete one: ValueError."""
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(f"model.path = {path}: holds no model_index.json, so it is no diffusers pipeline folder")
    parts = json.loads(index.read_text(encoding="utf-8"))
    if parts.get("_class_name") != pipeline_class:
        raise ValueError(
            f"model.path = {path}: holds a {parts.get('_class_name')}, and this model.name reads a {pipeline_class}"
        )
    for name, (library, kind) in ((k, v) for k, v in parts.items() if isinstance(v, list)):
        if library is not None:
            _check_part(path, name, kind)


def _check_part(path: Path, name: str, kind: str) -> None:
    folder = path / name
    if not folder.is_dir():
        raise ValueError(f"model.path = {path}: the folder {name}/ with its {kind} is missing")
    if any(word in kind for word in WITHOUT_WEIGHTS):
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path = {path}: {name}/config.json is missing")
    files = {file.name for file in folder.iterdir() if file.stat().st_size}
    for ending in ENDINGS:
        for stem in WEIGHTS:
            shards = folder / f"{stem}{ending}.index.json"
            if shards.is_file():
                _check_shards(path, name, shards, files)
                return
            if f"{stem}{ending}" in files:
                return
    raise ValueError(f"model.path = {path}: {name}/ holds no weights (.safetensors) or an empty file: was the download cut?")


def _check_shards(path: Path, name: str, index: Path, files: set[str]) -> None:
    missing = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) - files)
    if missing:
        raise ValueError(f"model.path = {path}: {name}/{missing[0]} is missing or empty, and {len(missing) - 1} more")
