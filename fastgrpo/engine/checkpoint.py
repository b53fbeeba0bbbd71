"""Checkpoints that are complete or absent, and that are what was saved.

    checkpoints/00012/COMPLETE                 JSON: iteration, world size, each file with its size and SHA-256
                      rank_00000.safetensors   each rank's part of weights and optimiser: `fastgrpo.engine.shards`
                      averages.safetensors     what is the same on all ranks, from rank 0: averages of the weights,
                      state.json               and numbers
    checkpoints/00013.partial/                 being written, or left over from a crash
    checkpoints/00011.removed/                 being removed, or replaced by another of the same iteration
    checkpoints/00010.damaged/                 set aside: its content is not what was saved

Each rank writes its part into `00012.partial` and then a record of it, whenever it can: no rank waits for another in a
collective, so a part can also be saved by a thread, or by a rank that ends alone. When all records are there, rank 0 joins
them in COMPLETE, flushes everything to the disk and renames the folder, in this order. So a crash at any point leaves a
folder that is never loaded, and that the next start removes; one that was written whole to replace another takes its place.
Nodes must share the folder.

Any number of ranks can load what any other number saved. Nothing in the files is code.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo.engine.checkpoint_folders import (
    MARKER,
    damaged,
    final_folder,
    numbered,
    partial_folder,
    remove_leftovers,
    removed_folder,
    set_aside,
)
from fastgrpo.engine.ranks import Ranks
from fastgrpo.engine.shards import SavedShards, Shard, write_shard
from fastgrpo.files import file_hash, flush, json_text, json_value, move_into_place, write_atomically, writing_to
from fastgrpo.finite import check_weights

AVERAGES, STATE = "averages.safetensors", "state.json"
FORMAT = 2
EARLIER = {"iteration", "world_size", "files"}  # what the marker of release 0.1 says
LOOK = 0.05  # seconds between two looks for the parts of other ranks


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of the state after an iteration, on the host; nothing changes it any more."""

    iteration: int
    shard: Shard
    averages: Mapping[str, Tensor]  # rank 0's alone, as the state below: both are the same on every rank
    state: Mapping[str, Any]  # numbers, strings, lists and dicts, as JSON knows them


@dataclass(frozen=True)
class Saved:
    """A checkpoint as `load` found it. Its tensors are on the CPU."""

    iteration: int
    shards: SavedShards
    averages: dict[str, Tensor]
    state: dict[str, Any]


class GivenUp(Exception):
    """A checkpoint was not completed, because the part of another rank did not come."""


def write_part(snapshot: Snapshot, root: Path, ranks: Ranks) -> None:
    """Writes this rank's part of a checkpoint, and when all of it is on the disk a record of it.

    OSError names the folder. NotFinite: weights that are none are never written.
    """
    check_weights("state", {**snapshot.shard.tensors, **snapshot.averages})
    folder = partial_folder(root, snapshot.iteration)
    with writing_to(final_folder(root, snapshot.iteration)):
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{_name(ranks.rank)}.safetensors"]
        write_shard(snapshot.shard, files[0])
        if ranks.rank == 0:
            files += [folder / AVERAGES, folder / STATE]
            save_file(dict(snapshot.averages), files[1])
            files[2].write_text(json_text(snapshot.state), encoding="utf-8")
        for file in files:
            flush(file)
        record = {file.name: {"bytes": file.stat().st_size, "sha256": file_hash(file)} for file in files}
        write_atomically(folder / f"{_name(ranks.rank)}.json", json_text(record))


def complete(root: Path, iteration: int, ranks: Ranks, give_up: Callable[[], bool]) -> Path:
    """Rank 0 completes a checkpoint of which it has written its own part; returns its folder.

    It waits for the parts of the other ranks until `give_up` says otherwise: then GivenUp names what is missing.
    """
    partial, final = partial_folder(root, iteration), final_folder(root, iteration)
    records = [partial / f"{_name(rank)}.json" for rank in range(ranks.world_size)]
    while missing := [rank for rank, record in enumerate(records) if not record.is_file()]:
        if give_up():
            who = f"rank {', '.join(map(str, missing))}"
            raise GivenUp(f"{who} did not save its part of the state after iteration {iteration}")
        time.sleep(LOOK)
    with writing_to(final):
        files: dict[str, Any] = {}
        for record in records:
            files |= json.loads(record.read_text(encoding="utf-8"))
        marker = {"format": FORMAT, "iteration": iteration, "world_size": ranks.world_size, "files": files}
        (partial / MARKER).write_text(json_text(marker, indent=1), encoding="utf-8")
        for record in records:
            record.unlink()
        replaces = final.exists()  # the same iteration, saved before; the next start ends this if it is interrupted
        if replaces:
            flush(partial)
            os.replace(final, removed_folder(final))
        move_into_place(partial, final)
        if replaces:
            shutil.rmtree(removed_folder(final))
    return final


def load(root: Path, ranks: Ranks) -> Saved | None:
    """The latest checkpoint that is whole, None if there is none at all. Collective.

    A newer one whose content is not what was saved is set aside under a name that says so, and said. ValueError where
    there are checkpoints and none is whole: a run that began afresh beside them would write over what is left of it.
    """
    _once(ranks, functools.partial(remove_leftovers, root))
    # Only rank 0 looks: a folder that appears just now could be seen by one rank and not by the other.
    while folder := ranks.broadcast_object(next(reversed(numbered(root)), None) if ranks.rank == 0 else None):
        try:
            with ranks.together(Damaged):
                saved = _read(folder, check_files(folder, share=(ranks.rank, ranks.world_size)))
            return saved
        except Damaged as damage:
            _once(ranks, functools.partial(set_aside, folder, str(damage)))
    aside = ranks.broadcast_object(damaged(root) if ranks.rank == 0 else None)
    if aside:
        raise ValueError(
            f"{root} holds no checkpoint that is whole, only {', '.join(path.name for path in aside)}; restore one, or "
            "remove them to start this run afresh"
        )
    return None


class Damaged(ValueError):
    """The content of a checkpoint is not what was saved."""


def check_files(folder: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Compares a checkpoint with its marker, reading every file whole; returns the marker. Raises Damaged.

    share: (i, n) for the i-th n-th of the files.
    """
    marker = read_marker(folder)
    i, n = share
    for name, saved in sorted(marker["files"].items())[i::n]:
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing")
        if file.stat().st_size != saved["bytes"]:
            raise Damaged(f"{file} has {file.stat().st_size} bytes, it was saved with {saved['bytes']}")
        if file_hash(file) != saved["sha256"]:
            raise Damaged(f"{file} has another content than was saved")
    return marker


def read_marker(folder: Path) -> dict[str, Any]:
    """What COMPLETE says; Damaged where it cannot be true."""
    file = folder / MARKER
    try:
        marker = json_value(file.read_bytes())
    except (OSError, ValueError):
        marker = None
    if isinstance(marker, dict) and marker.keys() == EARLIER:
        raise ValueError(
            f"{folder} was written by an earlier release, whose checkpoints this one cannot read; finish that run with "
            "it, or choose another folder with --set output=..."
        )
    if not _describes(marker, int(folder.name)):
        raise Damaged(f"{file} does not describe this checkpoint")
    return marker


def _describes(marker: Any, iteration: int) -> bool:
    try:
        files = marker["files"]
        world_size = len(files) - 2
        names = {f"{_name(rank)}.safetensors" for rank in range(world_size)} | {AVERAGES, STATE}
        numbers = marker["format"], marker["iteration"], marker["world_size"]
        good = numbers == (FORMAT, iteration, world_size) and files.keys() == names
        return good and all(type(f["bytes"]) is int and isinstance(f["sha256"], str) for f in files.values())
    except (KeyError, TypeError, AttributeError):
        return False


def _read(folder: Path, marker: Mapping[str, Any]) -> Saved:
    try:
        state = json_value((folder / STATE).read_bytes())
        averages = load_file(folder / AVERAGES)
    except (OSError, ValueError, SafetensorError) as error:
        raise Damaged(f"{folder} cannot be read: {error}") from None
    shards = SavedShards([folder / f"{_name(rank)}.safetensors" for rank in range(marker["world_size"])])
    return Saved(int(folder.name), shards, averages, state)


def _once(ranks: Ranks, act: Callable[[], None]) -> None:
    """Rank 0 acts, and the others wait for it."""
    with ranks.together(OSError):
        if ranks.rank == 0:
            act()


def _name(rank: int) -> str:
    return f"rank_{rank:05d}"
