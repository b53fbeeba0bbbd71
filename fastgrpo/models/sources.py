"""Where a transformer comes from when `model.transformer` names a place beside the pipeline's folder.

    FOLDER              config.json and weights in the diffusers format: what `model.train: full` wrote as RUN/transformer,
                        a fine-tuned model's folder `transformer`, or one that torchao or bitsandbytes quantised
    FILE.safetensors    all weights in one file, under diffusers' names or those of the model's own code, as ComfyUI has them
    FILE.gguf           the same, quantised

A file has no config: that of the pipeline's own transformer holds for it.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch

from fastgrpo.files import json_value
from fastgrpo.models.fitting import check_fit
from fastgrpo.models.folder import check_file, check_network, readable, variant_of
from fastgrpo.models.headers import read_header
from fastgrpo.models.quantized import check_package

ENDINGS = (".safetensors", ".gguf")


def check_transformer(source: Path, pipeline: Path, variant: str | None = None) -> None:
    """Refuse a transformer that cannot be loaded in place of the one in the pipeline's folder: ValueError."""
    kind = transformer_class(pipeline)
    with readable(where := f"model.transformer = {source}"):
        if source.is_dir():
            _check_folder(source, kind, where, variant)
        elif not source.is_file():
            raise ValueError(f"{where}: there is no such folder or file")
        elif source.suffix not in ENDINGS:
            raise ValueError(f"{where}: is no {' or '.join(ENDINGS)} file, and no folder")
        else:
            _check_one_file(source, pipeline, kind, where)


def load_transformer(source: Path, pipeline: Path, *, dtype: torch.dtype, variant: str | None = None) -> Any:
    """The transformer that `check_transformer` let pass, on the CPU."""
    kind = transformer_class(pipeline)
    if source.is_dir():
        return kind.from_pretrained(source, dtype=dtype, variant=variant_of(source, variant), local_files_only=True)
    own: dict[str, Any] = {"config": str(pipeline / "transformer"), "local_files_only": True}
    if source.suffix == ".gguf":
        packed = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        return kind.from_single_file(str(source), quantization_config=packed, dtype=dtype, **own)
    network = kind.from_single_file(str(source), **own)
    # As `from_pretrained` does it; `from_single_file` would cast those as well that a class wants in float32.
    exact = set(kind._keep_in_fp32_modules or ())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if exact & set(name.split(".")) else dtype)
    return network


def transformer_class(pipeline: Path) -> Any:
    """The class of the transformer in a pipeline's folder."""
    return getattr(diffusers, json_value((pipeline / "model_index.json").read_bytes())["transformer"][1])


def _check_folder(source: Path, kind: Any, where: str, variant: str | None) -> None:
    if not (source / "config.json").is_file():
        inside = source / "transformer"
        way_out = f"name {inside}" if inside.is_dir() else "name a folder with a transformer's config.json and weights"
        raise ValueError(f"{where}: holds no config.json; {way_out}")
    found = check_file(source / "config.json", source, where).get("_class_name")
    if found != kind.__name__:
        raise ValueError(f"{where}: holds a {found}, and the pipeline's transformer is a {kind.__name__}")
    check_network(source, source, kind, where, variant)


def _check_one_file(source: Path, pipeline: Path, kind: Any, where: str) -> None:
    config = pipeline / "transformer" / "config.json"
    if not config.is_file():
        raise ValueError(f"{where}: has no config of its own, and {config}, which would hold for it, is missing")
    if source.suffix == ".gguf":
        check_package("gguf", where)
    check_file(source, source.parent, where)
    try:
        check_fit(kind, config.parent, read_header(source), single_file=True)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
