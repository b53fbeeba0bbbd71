"""Files that are written whole or not at all, whenever the process is killed or the power fails.

    write_atomically(path, text)
    with atomic_file(path) as partial:      for libraries that write to a path
        save_file(tensors, partial)

What is written lies under another name beside the final one until all of it is on the disk; only then is it renamed.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file by `text` in UTF-8."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, and moves that file to `path` when the block ends without an error.

    The name belongs to this process alone: others may be writing or reading the same file. A killed process leaves it
    behind, and it ends in `.partial`; an error in the block removes it.
    """
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        yield partial
        move_into_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
