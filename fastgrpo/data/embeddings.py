"""The conditioning of prompts: made once for each, kept in memory or on disk."""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from fastgrpo.data.pictures import load_picture
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.files import atomic_file
from fastgrpo.policy import Model
from fastgrpo.records import Prompted, concatenate
from fastgrpo.tensor_files import read_tensors

IN_MEMORY = 1024  # prompts whose embeddings are kept in memory: 3 GB for SD3
IN_BYTES = 4 * 2**30  # that they may take, where a prompt's are larger


class Embeddings:
    """The conditioning of prompts: the latest in memory, and with `folder` all of them on disk and for good.

    A file is named after what it was made from: the text encoders, the model's `encoder_settings` and the prompt. Prompts
    are encoded one at a time: in a batch, the last bits would depend on which other prompts were new, and with them the
    whole run after a resume.
    """

    def __init__(self, model: Model, folder: Path | None = None) -> None:
        self._model, self._folder = model, folder
        # By the model's settings and the prompt; the one asked for last comes last.
        self.in_memory: OrderedDict[tuple[str, str | ImagePrompt], tuple] = OrderedDict()
        self._bytes = 0  # that they take
        self._forms: dict[
            str, list[tuple]
        ] = {}  # by settings: dtype and shape of each tensor, of the first one and all others

    def prompted(self, prompts: Sequence[str | ImagePrompt], guidance_scale: float) -> Prompted:
        """The conditioning of B prompts and, under guidance, that of the empty prompt beside each."""
        cond = concatenate([self._one(prompt) for prompt in prompts])
        if guidance_scale == 1:
            return Prompted(cond)
        if not isinstance(prompts[0], str):
            return Prompted(cond, concatenate([self._one(without_text(prompt)) for prompt in prompts]))
        empty = self._one("")
        return Prompted(cond, type(cond)(*(tensor.expand(len(prompts), *tensor.shape[1:]) for tensor in empty)))

    def prepare(self, prompts: Sequence[str | ImagePrompt], show: bool = True) -> None:
        """Puts the embeddings of all prompts into the folder, so that the text encoders are not asked again."""
        if self._folder is None:
            raise ValueError("these embeddings are kept in memory: give Embeddings a folder to prepare them in")
        for prompt in tqdm(prompts, desc="embeddings", disable=not show, dynamic_ncols=True):
            if not (path := self._file(self._folder, prompt)).exists():
                self._write(path, self._model.encode([prompt]))

    def _one(self, prompt: str | ImagePrompt) -> tuple:
        key = repr(self._model.encoder_settings), prompt
        if key not in self.in_memory:
            self.in_memory[key] = self._like_others(*key, self._read(prompt))
            self._bytes += _size(self.in_memory[key])
            while len(self.in_memory) > IN_MEMORY or (self._bytes > IN_BYTES and len(self.in_memory) > 1):
                self._bytes -= _size(self.in_memory.popitem(last=False)[1])
        self.in_memory.move_to_end(key)
        return self.in_memory[key]

    def _like_others(self, settings: str, prompt: str | ImagePrompt, conditioning: tuple) -> tuple:
        """The conditioning, which must be of one form with all others: ValueError, with the file if it is of one."""
        form = [(tensor.dtype, tensor.shape) for tensor in conditioning]
        others = self._forms.setdefault(settings, form)
        if form != others:
            place = prompt if self._folder is None else self._file(self._folder, prompt)
            raise ValueError(f"{place}: holds {form} and other prompts {others}; remove such files, and they are made again")
        return conditioning

    def _read(self, prompt: str | ImagePrompt) -> tuple:
        if self._folder is None:
            return self._model.encode([prompt])
        path = self._file(self._folder, prompt)
        if not path.exists():
            self._write(path, self._model.encode([prompt]))
        tensors = read_tensors(path, self._model.device)[0]
        fields = set(self._model.Conditioning._fields)
        if tensors.keys() != fields or any(tensor.shape[:1] != (1,) for tensor in tensors.values()):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(
                f"{path}: holds {shapes} and not one prompt's {sorted(fields)}; remove it, and it is made again"
            )
        return self._model.Conditioning(**tensors)

    def _file(self, folder: Path, prompt: str | ImagePrompt) -> Path:
        text = prompt if isinstance(prompt, str) else "\n".join([prompt.text, *map(_content, prompt.images)])
        name = hashlib.sha256(f"{self.fingerprint}\n{text}".encode()).hexdigest()
        return folder / name[:2] / f"{name}.safetensors"

    @property
    def fingerprint(self) -> str:
        """A hash of everything besides the prompt that an embedding depends on: settings, and samples of all the weights."""
        settings = type(self._model).__name__, self._model.dtype, self._model.encoder_settings
        return hashlib.sha256(repr((settings, self._weights)).encode()).hexdigest()

    @cached_property
    def _weights(self) -> str:
        digest = hashlib.sha256()
        for encoder in self._model.encoders:
            for name, tensor in encoder.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                picked = tensor.flatten()[:: max(1, tensor.numel() // 256)]
                digest.update(picked.double().cpu().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def _write(path: Path, conditioning: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:  # another process may be reading or writing the same prompt
            save_file({name: tensor.contiguous() for name, tensor in conditioning._asdict().items()}, partial)


def _size(conditioning: tuple) -> int:
    """In bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in conditioning)


def without_text(prompt: str | ImagePrompt) -> str | ImagePrompt:
    """The prompt that classifier-free guidance compares this one with."""
    return "" if isinstance(prompt, str) else prompt._replace(text="")


@functools.cache
def _content(image: Path) -> str:
    """A hash of the pixels that a model reads, so that another way of reading the file is another content."""
    picture = load_picture(image)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
