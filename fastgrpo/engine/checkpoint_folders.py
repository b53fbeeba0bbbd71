"""The folders of a run's checkpoints by what their names say: complete, being written, being removed, set aside.

checkpoints/00012/             complete: it gets its number last
checkpoints/00013.partial/     being written, or left over from a crash
checkpoints/00011.removed/     being removed, or replaced by another of the same iteration
checkpoints/00010.damaged/     set aside: its content is not what was saved
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

MARKER = "COMPLETE"


def latest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint of the highest iteration, None if there is none.

    A folder that only holds unfinished ones is a run that crashed before its first save: it starts afresh.
    """
    return next(reversed(complete_checkpoints(root)), None)


def complete_checkpoints(root: Path) -> list[Path]:
    """The folders of the complete checkpoints, in rising order of iteration."""
    return [path for path in numbered(root) if (path / MARKER).is_file()]


def numbered(root: Path) -> list[Path]:
    """The same with those that have lost their marker: a folder has its number only when it is complete."""
    return sorted(_named(root, r"[0-9]{5,}"), key=lambda path: int(path.name))


def unfinished(root: Path) -> list[Path]:
    """What is being written or removed, or was when a run was killed."""
    return sorted(_named(root, r"[0-9]{5,}\.(partial|removed)"))


def damaged(root: Path) -> list[Path]:
    """What was set aside."""
    return sorted(_named(root, r"[0-9]{5,}\.damaged[0-9]*"))


def is_complete(root: Path, iteration: int) -> bool:
    return (final_folder(root, iteration) / MARKER).is_file()


def prune(root: Path, keep: int, but: Iterable[int] = ()) -> None:
    """Removes all complete checkpoints but the last `keep`, and those of the iterations `but`."""
    for old in complete_checkpoints(root)[:-keep]:
        if int(old.name) not in but:
            _remove(old)


def discard(root: Path, iteration: int) -> None:
    """Removes what there is of a checkpoint that cannot be completed, which makes room on a full disk."""
    shutil.rmtree(partial_folder(root, iteration), ignore_errors=True)


def set_aside(folder: Path, damage: str) -> None:
    number, aside = 1, folder.with_suffix(".damaged")
    while aside.exists():
        number, aside = number + 1, folder.with_suffix(f".damaged{number + 1}")
    os.replace(folder, aside)
    print(f"warning: a damaged checkpoint was set aside as {aside}: {damage}", flush=True)


def remove_leftovers(root: Path) -> None:
    for folder in root.glob("*.removed"):
        final, partial = folder.with_suffix(""), folder.with_suffix(".partial")
        # `complete` moves the old one away only when the new one is on the disk.
        if (partial / MARKER).is_file() and not final.exists():
            os.replace(partial, final)
    for path in unfinished(root):
        shutil.rmtree(path)


def final_folder(root: Path, iteration: int) -> Path:
    return root / f"{iteration:05d}"


def partial_folder(root: Path, iteration: int) -> Path:
    return final_folder(root, iteration).with_suffix(".partial")


def removed_folder(folder: Path) -> Path:
    return folder.with_suffix(".removed")


def _remove(folder: Path) -> None:
    """Removes a checkpoint, renamed first: a crash in the middle must not leave one that looks complete."""
    os.replace(folder, removed_folder(folder))
    shutil.rmtree(removed_folder(folder))


def _named(root: Path, pattern: str) -> Iterator[Path]:
    return (path for path in (root.iterdir() if root.is_dir() else ()) if re.fullmatch(pattern, path.name) and path.is_dir())
