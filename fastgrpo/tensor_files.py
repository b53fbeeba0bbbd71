"""Files of tensors (safetensors): what is read is looked at before anything is made of it, and equal content is equal files.

    tensors, notes = read_tensors(path, "cpu")
    write_tensors(path, tensors, notes)

Nothing in such a file is code. A file that is cut, or whose head has changed, is refused by its name.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata. ValueError: it cannot be read, or is no whole safetensors file."""
    try:
        with safe_open(path, "pt", device=str(device)) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: is no whole file of safetensors ({error}); get it again from where it came") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors and metadata. safetensors orders the metadata by chance; here they are sorted by name."""
    save_file(dict(tensors), path, metadata=dict(notes))
    with path.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        if notes:
            header["__metadata__"] = dict(sorted(notes.items()))
        opened.seek(8)
        # As compact as safetensors writes it, so as long; spaces at the end are its padding.
        opened.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))
