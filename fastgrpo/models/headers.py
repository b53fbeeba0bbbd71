"""What a file of weights holds, from its head alone: the name, the dtype and the shape of each tensor.

    held = read_header(Path("diffusion_pytorch_model.safetensors"))
    held["proj_out.weight"]                     Held(dtype="BF16", shape=(64, 3072))

It takes milliseconds, whatever the size of the file.
"""

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fastgrpo.files import json_value


class Held(NamedTuple):
    """A tensor as a file's head describes it."""

    dtype: str  # as safetensors or GGUF call it
    shape: tuple[int, ...]


Header = dict[str, Held]


def read_header(file: Path) -> Header:
    """The tensors of a .safetensors or a .gguf; empty for another ending. ValueError: it is not whole, with the reason."""
    if file.suffix == ".safetensors":
        return _safetensors(file)
    return _gguf(file) if file.suffix == ".gguf" else {}


def read_headers(files: Iterable[Path]) -> Header:
    """Those of all shards together."""
    return {name: held for file in files for name, held in read_header(file).items()}


def _safetensors(file: Path) -> Header:
    """The first 8 bytes are the length of the header, which says where each tensor ends."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            entries = json_value(opened.read(min(length, size)))
        entries.pop("__metadata__", None)
        held = {name: _held(entry) for name, entry in entries.items()}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, struct.error):
        raise ValueError("is no file of safetensors, or the beginning of one") from None
    if size != expected:
        raise ValueError(f"has {size} bytes and must have {expected}")
    return held


def _held(entry: dict[str, Any]) -> Held:
    """A tensor of safetensors; ValueError for a shape that its bytes cannot have, of which no number has less than a bit."""
    begin, end = entry["data_offsets"]
    shape = tuple(map(int, entry["shape"]))
    if min(shape, default=0) < 0 or math.prod(shape) > 8 * (end - begin):
        raise ValueError
    return Held(str(entry["dtype"]), shape)


def _gguf(file: Path) -> Header:
    from gguf import GGUFReader  # an optional package

    try:
        tensors = GGUFReader(file).tensors
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"is no file of GGUF, or the beginning of one ({error})") from None
    return {t.name: Held(t.tensor_type.name, tuple(int(side) for side in reversed(t.shape))) for t in tensors}
