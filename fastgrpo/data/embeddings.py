"""The conditioning of prompts: made once for each, kept in memory or on disk."""

import functools
import hashlib
import os
import socket
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file, save_file
from tqdm import tqdm

from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.policy import Model
from fastgrpo.records import concatenate, with_unconditional

IN_MEMORY = 1024  # prompts whose embeddings are kept in memory when they are also on disk: a few GB for SD3


class Embeddings:
    """The conditioning of prompts, computed once for each: in memory, or with `folder` on disk and for good.

    A file is named after what it was made from: the text encoders, their settings and the prompt. Prompts are encoded one
    at a time: in a batch, the last bits would depend on which other prompts were new, and with them the whole run after a
    resume.
    """

    def __init__(self, model: Model, folder: Path | None = None) -> None:
        self._model, self._folder = model, folder
        self._known: OrderedDict[str, tuple] = OrderedDict()

    def __call__(self, prompts: Sequence[str | ImagePrompt], *, guidance_scale: float) -> tuple:
        """Rows for `rollout`: the prompts', and under guidance those of the empty prompt before them."""
        conditioning = concatenate([self._one(prompt) for prompt in prompts])
        if guidance_scale == 1:
            return conditioning
        if isinstance(prompts[0], str):
            return with_unconditional(conditioning, self._one(""))
        return concatenate([*(self._one(without_text(prompt)) for prompt in prompts), conditioning])

    def prepare(self, prompts: Sequence[str | ImagePrompt], show: bool = True) -> None:
        """Puts the embeddings of all prompts on disk, so that the text encoders are not asked again."""
        for prompt in tqdm(prompts, desc="embeddings", disable=not show, dynamic_ncols=True):
            if not self._file(prompt).exists():
                self._write(self._file(prompt), self._model.encode([prompt]))

    def _one(self, prompt: str | ImagePrompt) -> tuple:
        if prompt not in self._known:
            self._known[prompt] = self._read(prompt)
            if len(self._known) > IN_MEMORY and self._folder is not None:
                self._known.popitem(last=False)
        self._known.move_to_end(prompt)
        return self._known[prompt]

    def _read(self, prompt: str | ImagePrompt) -> tuple:
        if self._folder is None:
            return self._model.encode([prompt])
        path = self._file(prompt)
        if not path.exists():
            self._write(path, self._model.encode([prompt]))
        return self._model.Conditioning(**load_file(path, device=str(self._model.device)))

    def _file(self, prompt: str | ImagePrompt) -> Path:
        text = prompt if isinstance(prompt, str) else f"{prompt.text}\n{_content(prompt.image)}"
        name = hashlib.sha256(f"{self._fingerprint}\n{text}".encode()).hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"

    @cached_property
    def _fingerprint(self) -> str:
        """Of everything besides the prompt that an embedding depends on: settings, and samples of all the weights."""
        digest = hashlib.sha256(repr((type(self._model).__name__, self._model.dtype, self._model.encoder_settings)).encode())
        for encoder in self._model.encoders:
            for name, tensor in encoder.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                picked = tensor.flatten()[:: max(1, tensor.numel() // 256)]
                digest.update(picked.double().cpu().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def _write(path: Path, conditioning: tuple) -> None:
        """Whole or not at all: another process may be reading or writing the same prompt."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{socket.gethostname()}.{os.getpid()}.partial")
        save_file({name: tensor.contiguous() for name, tensor in conditioning._asdict().items()}, partial)
        os.replace(partial, path)


def without_text(prompt: str | ImagePrompt) -> str | ImagePrompt:
    """What classifier-free guidance compares a prompt with."""
    return "" if isinstance(prompt, str) else prompt._replace(text="")


@functools.cache
def _content(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()
