"""Files that are written whole or not at all, whenever the process is killed or the power fails.

    write_atomically(path, text)
    with atomic_file(path) as partial:      for libraries that write to a path
        save_file(tensors, partial)

What is written lies under another name beside the final one until all of it is on the disk; only then is it renamed.
What the system refuses is an OSError with the path, whichever library was writing.
"""

import hashlib
import json
import math
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite, for which JSON has no word, is null."""
    return json.dumps(_with_nulls(value), indent=indent, allow_nan=False)


def json_value(text: str | bytes) -> Any:
    """The value of a text of JSON. ValueError for what is none: also bytes that are not UTF-8, and nesting without end."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_with_shared_keys)
    except RecursionError:
        raise ValueError("objects and lists in one another deeper than Python reads") from None


def _with_shared_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of a run's thousands of rows would otherwise be as many strings, and half of the rows' memory."""
    return {sys.intern(key): value for key, value in pairs}


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(one) for key, one in value.items()}
    return [_with_nulls(one) for one in value] if isinstance(value, list | tuple) else value


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file by `text` in UTF-8."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in a folder or below it, wherever links lead."""
    return file.resolve().is_relative_to(folder.resolve())


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, and moves that file to `path` when the block ends without an error.

    The name belongs to this process alone: others may be writing or reading the same file. A killed process leaves it
    behind, and it ends in `.partial`, see `remove_partial`; an error in the block removes it.
    """
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with writing_to(path):
            yield partial
            move_into_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(*folders: Path) -> None:
    """Removes what killed processes left half written in folders, not below them; for the folders' one owner."""
    for path in (path for folder in folders for path in folder.glob("*.partial")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Inside, what the system refuses becomes an OSError that names `path`: no space left, over the quota, read-only.

    torch and safetensors raise errors of their own that tell neither the place nor always the cause. The system is then
    asked once more, by writing a little beside.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        refusal = _refusal(path)
        if refusal is None:
            raise
        raise OSError(refusal.errno, refusal.strerror, str(path)) from error


def _refusal(path: Path) -> OSError | None:
    """What the system says to a file of 1 MB beside `path`; None where it takes it."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, at about the speed of a good disk."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def move_into_place(partial: Path, final: Path) -> None:
    """Renames a finished file or folder; a file at `final` is replaced."""
    # The order matters: a name on the disk before its content would be an empty file after a power cut.
    flush(partial)
    os.replace(partial, final)
    _flush_one(final.parent)


def flush(path: Path) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    for one in (*path.rglob("*"), path) if path.is_dir() else (path,):
        _flush_one(one)


def _flush_one(path: Path) -> None:
    """Waits for a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
