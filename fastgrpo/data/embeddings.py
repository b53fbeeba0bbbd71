"""The conditioning of prompts: made once for each, kept on the host and, with a folder, on disk.

    embeddings = Embeddings(model, folder)
    embeddings.prepare(prompts, ranks)          those that are not there are made and written
    embeddings.read_ahead(prompts, scale)       begins to read them from the disk, beside what comes next
    embeddings.prompted(prompts, scale)         `Prompted` on the model's device: a row for each different prompt

On the host and on disk a conditioning is without its padding, see `fastgrpo.data.padding`; on the device it is whole.
"""

import shutil
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.config.schema import ConfigError
from fastgrpo.daemon_pool import DaemonPool
from fastgrpo.data.embedding_files import EmbeddingFiles, Form, Kept, kept
from fastgrpo.data.padding import fill
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.engine.ranks import Ranks
from fastgrpo.measure import GIB
from fastgrpo.policy import Model
from fastgrpo.records import Prompted

IN_MEMORY = 4.0  # GiB, where nobody says otherwise


class Key(NamedTuple):
    """By which an embedding is kept: the same prompt is read otherwise for an image of another size."""

    prompt: str | ImagePrompt
    settings: str  # of the model, that an embedding depends on
    file: Path | None  # on the disk, where there is a folder


class Embeddings:
    """The conditioning of prompts: the latest on the host, and with `folder` all of them on disk and for good.

    Prompts are encoded one at a time: in a batch, the last bits would depend on which other prompts were new, and with them
    the whole run after a resume.

    negative_prompt: the text that guidance compares with; "": none. in_memory: GiB that the host keeps.
    """

    def __init__(
        self, model: Model, folder: Path | None = None, *, negative_prompt: str = "", in_memory: float = IN_MEMORY
    ) -> None:
        self.model, self.negative_prompt = model, negative_prompt
        self.files = None if folder is None else EmbeddingFiles(model, folder)
        self.in_memory: OrderedDict[Key, Kept] = OrderedDict()  # the one asked for last comes last
        self._bytes, self._most = 0, in_memory * GIB  # that they take, and may take
        self._forms: dict[str, Form] = {}  # by settings: of the first one, and of all others too
        self._reader = DaemonPool(1, "embeddings")
        self._ahead: Future[None] | None = None  # what it reads

    def prompted(self, prompts: Sequence[str | ImagePrompt], guidance_scale: float) -> Prompted:
        """The conditioning of B prompts and, under guidance, what it is compared with."""
        self.wait()
        different = self.asked(prompts, guidance_scale)
        place = {prompt: i for i, prompt in enumerate(different)}
        rows = self._rows([self._one(key) for key in self._keys(different)])

        def placed(these: Sequence[str | ImagePrompt]) -> Tensor:
            return torch.tensor([place[prompt] for prompt in these], device=self.model.device)

        if guidance_scale == 1:
            return Prompted(rows, placed(prompts))
        return Prompted(rows, placed(prompts), placed([self._compared(prompt) for prompt in prompts]))

    def asked(self, prompts: Sequence[str | ImagePrompt], guidance_scale: float) -> list[str | ImagePrompt]:
        """The different ones of these prompts and, under guidance, of those that they are compared with."""
        compared = [] if guidance_scale == 1 else [self._compared(prompt) for prompt in prompts]
        return list(dict.fromkeys([*prompts, *compared]))

    def prepare(self, prompts: Sequence[str | ImagePrompt], ranks: Ranks) -> None:
        """Puts the embeddings of prompts into the folder, each rank its share, so that the encoders are not asked again.

        Rank 0 says what they will take; ConfigError if the disk has less. Collective.
        """
        files = self._in_folder
        with ranks.together(ValueError):  # no rank writes before all have looked
            missing = self._missing(files, prompts)
        with ranks.together(ValueError):
            said = self._room_for(files, missing) if missing else ""
        if said and ranks.rank == 0:
            tqdm.write(said, file=sys.stderr)
        mine = self._missing(files, missing[ranks.rank :: ranks.world_size])
        for prompt in tqdm(mine, desc="embeddings", disable=ranks.rank != 0 or not mine, dynamic_ncols=True):
            files.write(prompt, self._encoded(prompt))
        ranks.barrier()

    @staticmethod
    def _missing(files: EmbeddingFiles, prompts: Sequence[str | ImagePrompt]) -> list[str | ImagePrompt]:
        """Those of the prompts that are not in the folder, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if not files.file(prompt).exists()]

    def _room_for(self, files: EmbeddingFiles, missing: Sequence[str | ImagePrompt]) -> str:
        """Makes the first of these prompts, and says what all of them will take; ConfigError if the disk has less."""
        files.write(missing[0], self._encoded(missing[0]))
        needed, free = files.file(missing[0]).stat().st_size * len(missing), shutil.disk_usage(files.folder).free
        said = f"embeddings of {len(missing)} prompts take about {needed / 1e9:.3g} GB"
        if needed > free:
            raise ConfigError(
                f"prompts.cache = {files.folder}: {said}, and {free / 1e9:.3g} GB are free; name a folder on a larger disk, "
                "or leave it out, and prompts are encoded when they are drawn"
            )
        return f"{said} in {files.folder}"

    def read_ahead(self, prompts: Sequence[str | ImagePrompt], guidance_scale: float) -> None:
        """Begins to read from the disk what `prompted` will be asked for next; what fails here will fail there."""
        self.wait()
        if self.files is not None:
            self._ahead = self._reader.submit(self._read_ahead, self._keys(self.asked(prompts, guidance_scale)))

    def _read_ahead(self, keys: Sequence[Key]) -> None:
        read = 0
        with suppress(Exception):
            for key in keys:
                if key not in self.in_memory and not (key.file and key.file.exists()):
                    continue  # it is not for this thread to encode
                read += self._one(key).nbytes
                if read > self._most:  # one more would take the place of the first
                    return

    def wait(self) -> None:
        """Until nothing is read ahead, so that one thread at a time is at the memory."""
        if self._ahead is not None:
            self._ahead.result()
            self._ahead = None

    @property
    def _in_folder(self) -> EmbeddingFiles:
        if self.files is None:
            raise ValueError("these embeddings are kept in memory: give Embeddings a folder to prepare them in")
        return self.files

    def _compared(self, prompt: str | ImagePrompt) -> str | ImagePrompt:
        """The prompt that guidance compares this one with."""
        return compared_with(prompt, self.negative_prompt)

    def _rows(self, found: Sequence[Kept]) -> tuple:
        """A whole row on the device for each: tensors (P, ...)."""
        form = found[0].form
        rows = [torch.zeros(len(found), *shape[1:], dtype=dtype, device=self.model.device) for dtype, shape in form]
        for i, one in enumerate(found):
            for row, tensor in zip(rows, one.tensors, strict=True):
                fill(row[i], tensor)
        return self.model.Conditioning(*rows)

    def _keys(self, prompts: Sequence[str | ImagePrompt]) -> list[Key]:
        """By which each is kept, as the model is set now."""
        settings, files = repr(self.model.encoder_settings), self.files
        return [Key(prompt, settings, None if files is None else files.file(prompt)) for prompt in prompts]

    def _one(self, key: Key) -> Kept:
        if key not in self.in_memory:
            self.in_memory[key] = one = self._pinned(self._like_others(key, self._found(key)))
            self._bytes += one.nbytes
            while self._bytes > self._most and len(self.in_memory) > 1:
                self._bytes -= self.in_memory.popitem(last=False)[1].nbytes
        self.in_memory.move_to_end(key)
        return self.in_memory[key]

    def _found(self, key: Key) -> Kept:
        """From the folder, where there is one, else from the encoders."""
        if self.files is None or key.file is None:
            return self._encoded(key.prompt)
        if not key.file.exists():
            self.files.write(key.prompt, self._encoded(key.prompt))
        return self.files.read(key.file)

    def _encoded(self, prompt: str | ImagePrompt) -> Kept:
        return kept(self.model.encode([prompt]))

    def _like_others(self, key: Key, one: Kept) -> Kept:
        """The conditioning, which must be of one form with all others: ValueError, with the file if it is of one."""
        form = self._forms.setdefault(key.settings, one.form)
        if one.form != form:
            raise ValueError(
                f"{key.file or key.prompt}: holds {one.form} and other prompts {form}; remove such files, and they are made "
                "again"
            )
        return one

    def _pinned(self, one: Kept) -> Kept:
        """In memory that a GPU reads by itself."""
        if self.model.device.type != "cuda":
            return one
        return one._replace(tensors=tuple(tensor.pin_memory() for tensor in one.tensors))


def compared_with(prompt: str | ImagePrompt, negative_prompt: str = "") -> str | ImagePrompt:
    """The prompt that classifier-free guidance compares this one with: of the same images, with another text."""
    return negative_prompt if isinstance(prompt, str) else prompt._replace(text=negative_prompt)
