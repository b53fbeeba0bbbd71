"""One owner a folder: a run holds the file `lock.json` in its folder, and a second run is refused with who holds it.

    with held(folder): ...          ConfigError if another process has it

The file says host, process, and since when; its time of change is the owner's last sign of life, renewed every `BEAT`
seconds. An owner is gone where its process is, on the machine that can see it. Of another machine, or of another container,
only the signs of life are seen: after `DEAD` seconds without one the folder is free. So is one that a killed run left.
Whoever looks and writes holds flock on the file meanwhile, so that of two that come at once only one gets it.
"""

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastgrpo.config.schema import ConfigError
from fastgrpo.files import json_value, writing_to
from fastgrpo.processes import started

LOCK = "lock.json"
BEAT, DEAD = 20.0, 120.0  # seconds


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, the folder, made if it is not there, belongs to this process. Raises ConfigError if it is another's."""
    file = folder / LOCK
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        own = _take(file)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, done), daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        with _opened(file) as opened:
            if _content(opened) == own:
                file.unlink()


def is_held(folder: Path) -> bool:
    """Whether the folder belongs to a process. Writes nothing."""
    file = folder / LOCK
    try:
        with file.open(encoding="utf-8") as opened:
            owner = _content(opened)
        return bool(owner) and not _gone(owner, time.time() - file.stat().st_mtime)
    except OSError:
        return False


def _take(file: Path) -> dict[str, Any]:
    """Writes this process into the file; returns what it wrote."""
    own = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    own |= {"started": started(os.getpid()), "machine": _machine()}
    with _opened(file) as opened:
        owner = _content(opened)
        if owner and not _gone(owner, _seconds_since(file)):
            raise ConfigError(
                f"output = {file.parent}: in use by process {owner.get('process')} on {owner.get('host')} since "
                f"{owner.get('since')}; take another folder, or end that run. Tasks of a cluster that are meant to be one "
                "run need a launcher, torchrun or deepspeed"
            )
        opened.seek(0)
        opened.truncate()
        opened.write(json.dumps(own))
        opened.flush()
    return own


@contextmanager
def _opened(file: Path) -> Iterator[IO[str]]:
    """The file, made if it is not there, with nobody else inside of this block."""
    while True:
        with open(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8") as opened:
            with suppress(OSError):  # a file system without flock: then only two starts at the very same moment collide
                fcntl.flock(opened, fcntl.LOCK_EX)
            # While this process waited the owner may have removed the file, and another made a new one.
            if file.exists() and os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                yield opened
                return


def _content(opened: IO[str]) -> dict[str, Any]:
    """Who holds the folder; empty for nobody."""
    try:
        owner = json_value(opened.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _gone(owner: dict[str, Any], silent: float) -> bool:
    """Whether the owner is no more; `silent`: seconds since its last sign of life."""
    if owner.get("host") == socket.gethostname() and owner.get("machine") == _machine():
        process = owner.get("process")
        return not isinstance(process, int) or started(process) != owner.get("started")
    return silent > DEAD


def _machine() -> str:
    """What tells apart machines, and containers with processes of their own, that are called alike."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _seconds_since(file: Path) -> float:
    """Since the file's last change, by the clock of its own file system."""
    with tempfile.TemporaryFile(dir=file.parent) as now:  # without a name, which a kill would leave behind
        return os.fstat(now.fileno()).st_mtime - file.stat().st_mtime


def _beat(file: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):
            os.utime(file)
