"""Embeddings on disk, a file a prompt, for good.

A file is named after what it was made from: the text encoders, the model's `encoder_settings` and the prompt. It holds the
conditioning without its padding (`fastgrpo.data.padding`) and, as metadata, the shapes with it.
"""

import functools
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.data.padding import trimmed
from fastgrpo.data.pictures import load_picture, picture_count
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.files import atomic_file, file_hash, json_value
from fastgrpo.policy import Model
from fastgrpo.tensor_files import read_tensors

FORMAT = 2  # of a file
Form = list[tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of each tensor of a conditioning


class Kept(NamedTuple):
    """The conditioning of one prompt as it is kept: on the host, without its padding."""

    tensors: tuple[Tensor, ...]  # (1, ...) each
    form: Form  # with the padding

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def kept(conditioning: tuple) -> Kept:
    """What is kept of the conditioning of one prompt."""
    form = [(tensor.dtype, tuple(tensor.shape)) for tensor in conditioning]
    return Kept(tuple(trimmed(tensor).cpu() for tensor in conditioning), form)


class EmbeddingFiles:
    """The files of one model's embeddings in a folder."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder

    def file(self, prompt: str | ImagePrompt) -> Path:
        """Where a prompt's embedding is, or would be."""
        text = prompt if isinstance(prompt, str) else "\n".join([prompt.text, *map(_content, prompt.images)])
        name = hashlib.sha256(f"{self.fingerprint}\n{text}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def write(self, prompt: str | ImagePrompt, one: Kept) -> None:
        """Writes a prompt's embedding; OSError where the system refuses."""
        path = self.file(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = self.model.Conditioning._fields
        shapes = {name: shape for name, (_, shape) in zip(names, one.form, strict=True)}
        with atomic_file(path) as partial:  # another process may be reading or writing the same prompt
            save_file(dict(zip(names, one.tensors, strict=True)), partial, metadata={"shapes": json.dumps(shapes)})

    def read(self, path: Path) -> Kept:
        """The embedding in such a file. ValueError with its name: it is no whole one."""
        names = self.model.Conditioning._fields
        tensors, notes = read_tensors(path)
        form = _form(tensors, notes, names)
        if form is None:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"{path}: holds {shapes} and not one prompt's {sorted(names)}; remove it, and it is made again")
        # Copies: they are the mapped file, which would be read only when they are used, and end the process if it is cut.
        return Kept(tuple(tensors[name].clone() for name in names), form)

    @property
    def fingerprint(self) -> str:
        """A hash of everything besides the prompt that an embedding depends on: settings, and samples of all the weights."""
        model = self.model
        settings = FORMAT, type(model).__name__, model.dtype, model.encoder_settings
        return hashlib.sha256(repr((settings, self._weights)).encode()).hexdigest()

    @cached_property
    def _weights(self) -> str:
        digest = hashlib.sha256()
        for encoder in self.model.encoders:
            for name, tensor in encoder.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                picked = tensor.flatten()[:: max(1, tensor.numel() // 256)]
                digest.update(picked.double().cpu().numpy().tobytes())
        return digest.hexdigest()


def _form(tensors: dict[str, Tensor], notes: dict[str, str], names: tuple[str, ...]) -> Form | None:
    """The form that a file's metadata says, if its tensors are a part of that; else None."""
    try:
        shapes: Any = json_value(notes.get("shapes", ""))
    except ValueError:
        return None
    if not isinstance(shapes, dict) or not tensors.keys() == shapes.keys() == set(names):
        return None
    if not all(_is_part(tensors[name], shapes[name]) for name in names):
        return None
    return [(tensors[name].dtype, tuple(shapes[name])) for name in names]


def _is_part(tensor: Tensor, shape: Any) -> bool:
    """Whether a tensor (1, ...) is no larger than a shape (1, ...), along any axis."""
    if not isinstance(shape, list) or len(shape) != tensor.ndim or not all(type(length) is int for length in shape):
        return False
    return tensor.shape[:1] == (1,) and shape[0] == 1 and all(map(int.__le__, tensor.shape, shape))


@functools.cache
def _content(image: Path) -> str:
    """A hash of the pixels that a model reads, so that another way of reading the file is another content.

    Most models read the first picture of an animation alone. What is in the others counts by the file's bytes.
    """
    picture = load_picture(image)
    others = file_hash(image) if picture_count(image) > 1 else ""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes() + others.encode()).hexdigest()
