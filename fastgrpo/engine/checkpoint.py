"""Checkpoints that are complete or absent.

    checkpoints/00012/COMPLETE      JSON: iteration, world size, each file with its size
                      state.pt      what is the same on all ranks: the average, the place in the prompts, ...
                      engine/       the engine's own files, a part from each rank
    checkpoints/00013.partial/      being written, or left over from a crash

All ranks write into `00012.partial` and wait for each other; then rank 0 lists the files in COMPLETE, flushes everything to
the disk and renames the folder, in this order. So a crash at any point leaves a folder that is never loaded, and that the
next save removes. The ranks load what rank 0 found, so they cannot disagree. Nodes must share the folder.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from fastgrpo.engine.ranks import Ranks
from fastgrpo.files import flush, move_into_place, writing_to

MARKER = "COMPLETE"
STATE = "state.pt"
ENGINE = "engine"


class SavedEngine(Protocol):
    """The part of `fastgrpo.engine.zero.Engine` that checkpoints use."""

    ranks: Ranks

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> Any: ...


def save_checkpoint(engine: SavedEngine, root: Path, iteration: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Saves the engine and rank 0's `state`, then removes all complete checkpoints but the last `keep`. Collective.

    `state` may hold tensors, numbers, strings, lists and dicts only, so that reading it runs no code: else TypeError.
    Returns the checkpoint's folder. Where the system refuses to write, for example because the disk is full, an OSError
    names that folder, nothing of it is left, and the older checkpoints are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep {keep} must be at least 1")
    final = root / f"{iteration:05d}"
    partial = final.with_suffix(".partial")
    try:
        with writing_to(final):
            _write(engine, partial, final, iteration, state)
    except Exception:
        if engine.ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if engine.ranks.rank == 0:
        for old in complete_checkpoints(root)[:-keep]:
            _remove(old)
    engine.ranks.barrier()
    return final


def _write(engine: SavedEngine, partial: Path, final: Path, iteration: int, state: dict[str, Any]) -> None:
    """Writes into `partial`, and renames it to `final` when it is whole. Collective."""
    if engine.ranks.rank == 0:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final.parent)
        partial.mkdir()
        _save_state(state, partial / STATE)
    engine.ranks.barrier()  # the folder is there, and nobody writes into a leftover
    engine.save(partial / ENGINE)
    engine.ranks.barrier()  # every part is written
    if engine.ranks.rank == 0:
        _complete(partial, final, iteration, engine.ranks.world_size)


def latest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint of the highest iteration, None if there is none.

    A folder that only holds unfinished ones is a run that crashed before its first save: it starts afresh.
    """
    return next(reversed(complete_checkpoints(root)), None)


def load_checkpoint(engine: SavedEngine, root: Path) -> tuple[int, dict[str, Any]] | None:
    """Loads the latest checkpoint and returns its iteration and state, or None if there is none. Collective.

    The state's tensors are on the CPU. A complete checkpoint that was damaged later raises ValueError or FileNotFoundError.
    """
    # Only rank 0 looks: a folder that appears just now could be seen by one rank and not by the other.
    folder = engine.ranks.broadcast_object(latest_checkpoint(root) if engine.ranks.rank == 0 else None)
    if folder is None:
        return None
    iteration = check_files(folder)
    engine.load(folder / ENGINE)
    return iteration, torch.load(folder / STATE, map_location="cpu", weights_only=True)


def check_files(folder: Path) -> int:
    """Compares the sizes of the files with the marker's; returns the iteration of a checkpoint that is whole."""
    way_out = f"restore it, or remove {folder} to go on from an older checkpoint"
    marker = folder / MARKER
    try:
        record = json.loads(marker.read_text(encoding="utf-8"))
        iteration, files = record["iteration"], record["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{marker} cannot be read; {way_out}") from error
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing from a complete checkpoint; {way_out}")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, it was saved with {size}; {way_out}")
    return iteration


def _save_state(state: dict[str, Any], file: Path) -> None:
    torch.save(state, file)
    # Checked now, rather than when a run has to go on from it.
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if unsafe:
        names = ", ".join(unsafe)
        raise TypeError(f"the state holds {names}; use tensors, numbers, strings, lists and dicts only")


def _complete(partial: Path, final: Path, iteration: int, world_size: int) -> None:
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    record = {
        "iteration": iteration,
        "world_size": world_size,
        "files": {file.relative_to(partial).as_posix(): file.stat().st_size for file in files},
    }
    (partial / MARKER).write_text(json.dumps(record, indent=1), encoding="utf-8")
    if final.exists():  # of a run that went on from an older one; it goes when this one is safe
        flush(partial)
        _remove(final)
    move_into_place(partial, final)


def complete_checkpoints(root: Path) -> list[Path]:
    """The folders of the complete checkpoints, in rising order of iteration."""
    if not root.is_dir():
        return []
    folders = (path for path in root.iterdir() if re.fullmatch(r"\d{5,}", path.name))
    return sorted((path for path in folders if (path / MARKER).is_file()), key=lambda path: int(path.name))


def _remove(folder: Path) -> None:
    """Removes a checkpoint, renamed first: a crash in the middle must not leave one that looks complete."""
    removed = folder.with_suffix(".removed")
    os.replace(folder, removed)
    shutil.rmtree(removed)


def _remove_leftovers(root: Path) -> None:
    for path in root.iterdir():
        if re.fullmatch(r"\d{5,}\.(partial|removed)", path.name):
            shutil.rmtree(path)
