"""Whether everything in a run's folder is what was written, and fits together: what `fastgrpo verify RUN` says.

Every file that a run goes on from, or that it hands out, is compared with the hash that was saved beside it. Nothing is
loaded and nothing is changed.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastgrpo.engine.checkpoint import check_files, complete_checkpoints, read_marker
from fastgrpo.reporting.run_folder import RunFolder, missing_iterations, readable_lines
from fastgrpo.trained_files import faults_of_trained
from fastgrpo.validation import load_config


@dataclass(frozen=True)
class Finding:
    """One thing in the folder: what it is, and what is wrong with it, empty where nothing is."""

    what: str
    about: str = ""
    fault: str = ""


def verify(folder: Path) -> Iterator[Finding]:
    """Everything that there is, one after the other, as large files take their time."""
    run = RunFolder(folder)
    yield _checked("config.yaml", lambda: str(load_config(run.config).iterations) + " iterations")
    done = 0
    for checkpoint in complete_checkpoints(run.checkpoints):
        finding = _checked(f"checkpoints/{checkpoint.name}", partial(_whole, checkpoint))
        done = done if finding.fault else int(checkpoint.name)
        yield finding
    for left in sorted(run.checkpoints.glob("*.*")) if run.checkpoints.is_dir() else ():
        kind = "set aside as damaged" if ".damaged" in left.name else "unfinished; the next start removes it"
        yield Finding(f"checkpoints/{left.name}", kind)
    if not done:
        yield Finding("checkpoints", fault="there is none that is whole: the run would start afresh")
    for place, where in (("", folder), ("best/", run.best)):
        if place == "" and done or where.is_dir():
            faults = faults_of_trained(where, None if place else done)
            yield Finding(f"{place}trained weights", "hashes agree", "; ".join(faults))
    yield _lines("metrics.jsonl", run.metrics, done)
    yield _lines("evaluations.jsonl", run.evaluations, None)
    for file in (run.inputs, run.summary):
        if file.is_file():
            yield _checked(file.name, partial(_entries, file))


def _checked(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, check())
    except (OSError, ValueError, RecursionError) as error:
        return Finding(what, fault=str(error))


def _whole(checkpoint: Path) -> str:
    check_files(checkpoint)
    marker = read_marker(checkpoint)
    size = sum(file["bytes"] for file in marker["files"].values())
    return f"{len(marker['files'])} files of {marker['world_size']} ranks, {size / 1e6:.1f} MB, hashes agree"


def _entries(file: Path) -> str:
    return f"{len(json.loads(file.read_text(encoding='utf-8')))} entries"


def _lines(what: str, file: Path, done: int | None) -> Finding:
    """done: there should be a line of each of so many iterations; None: of some."""
    rows, unreadable = readable_lines(file)
    faults = [f"line {number} cannot be read" for number in unreadable]
    if done is not None:
        missing = missing_iterations(rows, done)
        faults += [f"no line of {missing}"] if missing else []
    return Finding(what, f"{len(rows)} lines", "; ".join(faults))
