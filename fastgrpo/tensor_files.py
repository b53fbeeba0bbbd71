"""Files of tensors (safetensors) as they are read: each is looked at before anything is made of it.

    tensors, notes = read_tensors(path, "cpu")

Nothing in such a file is code. A file that is cut, or whose head has changed, is refused by its name.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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
