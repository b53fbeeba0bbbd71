"""What training goes on from, a file from each rank, for any number of ranks to read: safetensors and JSON, no pickle.

    write_shard(engine.state(), folder / f"rank_{rank:05d}.safetensors")         each of the W ranks
    engine.load_state(SavedShards(sorted(folder.glob("rank_*.safetensors"))))    each of any number of ranks

A rank holds of every flattened weight, and of AdamW's two moments of it, the stretch that it steps itself. Each stretch lies
in the file with the place where it begins. Whoever reads asks for any stretch by name, which is put together from those that
cover it, so how many ranks there were, and how ZeRO had split the weights among them, does not matter.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "fastgrpo_shard"  # of the metadata, one alone: safetensors orders several by chance


@dataclass(frozen=True)
class Shard:
    """One rank's part of what training goes on from."""

    tensors: dict[str, Tensor]
    """"master/NAME", "exp_avg/NAME", "exp_avg_sq/NAME" -> a stretch (n,) float32 of the flattened tensor, on the CPU."""
    starts: dict[str, int]
    """The same names -> where in the flattened tensor the stretch begins."""
    numbers: dict[str, Any]
    """What is the same on all ranks, as JSON has it: counts, shapes, the loss scale."""


def write_shard(shard: Shard, file: Path) -> None:
    """Writes one safetensors file; equal shards are equal files."""
    said = json.dumps({"starts": shard.starts, "numbers": shard.numbers}, sort_keys=True)
    save_file(shard.tensors, file, {KEY: said})


class SavedShards:
    """The files of all ranks of one save, of which only the headers are read until something is asked for.

    ValueError with the file's name for what is no shard, and where the files are not of one save.
    """

    numbers: dict[str, Any]

    def __init__(self, files: Sequence[Path]) -> None:
        if not files:
            raise ValueError("no file of a saved state was given; there is one for each rank, rank_*.safetensors")
        self._stretches: dict[str, list[tuple[int, int, Any]]] = {}  # name -> (start, count, open file) of each
        for file in files:
            opened, starts, numbers = _header(file)
            if file is not files[0] and numbers != self.numbers:
                raise ValueError(f"{file} and {files[0]} are not of one save; restore the files of all its ranks")
            self.numbers = numbers
            for name, start in starts.items():
                (count,) = opened.get_slice(name).get_shape()
                self._stretches.setdefault(name, []).append((start, count, opened))
        for stretches in self._stretches.values():
            stretches.sort(key=lambda stretch: stretch[:2])
        self._files = ", ".join(map(str, files))

    @property
    def names(self) -> list[str]:
        """Of all tensors of which there is a stretch."""
        return sorted(self._stretches)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements from `start` on of a flattened tensor, (count,) float32 on the CPU, from the stretches that cover them.

        ValueError where none covers one of them.
        """
        parts, position, end = [torch.empty(0)], start, start + count
        for begin, length, opened in self._stretches.get(name, ()):
            if begin <= position < min(begin + length, end):
                stop = min(begin + length, end)
                parts.append(opened.get_slice(name)[position - begin : stop - begin])
                position = stop
        if position < end:
            raise ValueError(f"element {position} of {name} is in none of {self._files}; restore the files of all ranks")
        return torch.cat(parts)


def _header(file: Path) -> tuple[Any, dict[str, int], dict[str, Any]]:
    """The opened file, the starts and the numbers of one shard."""
    try:
        opened: Any = safe_open(file, framework="pt")
        said = json.loads(opened.metadata()[KEY])
        starts, numbers = said["starts"], said["numbers"]
        slices = {name: opened.get_slice(name) for name in opened.keys()}
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a whole shard of a saved state: {type(error).__name__}: {error}") from error
    flat = all(len(one.get_shape()) == 1 and one.get_dtype() == "F32" for one in slices.values())
    if slices.keys() != starts.keys() or not flat:
        raise ValueError(f"{file} is not a shard of a saved state: its tensors are not the flat float32 ones that it lists")
    return opened, starts, numbers
