"""Whether everything in a run's folder is what was written, and fits together: what `fastgrpo verify RUN` says.

Every file that a run goes on from, or that it hands out, is compared with the hash that was saved beside it; files of lines
are read, and must have a line for each iteration. Nothing is changed. Samples, curves and the report are not looked at:
nothing depends on them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastgrpo.data.prompts import load_prompts
from fastgrpo.engine.checkpoint import check_files
from fastgrpo.engine.checkpoint_folders import damaged, numbered, unfinished
from fastgrpo.engine.lock import is_held
from fastgrpo.files import json_value
from fastgrpo.inputs import prompts_hash
from fastgrpo.reporting.run_folder import RunFolder, best_iteration, missing_iterations, readable_lines
from fastgrpo.trained_files import faults_of_trained
from fastgrpo.validation import load_config

LEFT = "unfinished, as a killed process leaves it; the next start removes it"


@dataclass(frozen=True)
class Finding:
    """One thing in the folder: what it is, and what is wrong with it, empty where nothing is."""

    what: str
    about: str = ""
    fault: str = ""


def verify(folder: Path) -> Iterator[Finding]:
    """Everything that there is, one after the other, as large files take their time."""
    run = RunFolder(folder)
    yield _checked("config.yaml", lambda: f"{load_config(run.config).iterations} iterations")
    done = 0
    for checkpoint in numbered(run.checkpoints):
        finding = _checked(f"checkpoints/{checkpoint.name}", partial(_whole, checkpoint))
        done = done if finding.fault else int(checkpoint.name)
        yield finding
    if not done:
        yield Finding("checkpoints", fault="there is none that is whole: the run would start afresh, or is refused")
    for aside in damaged(run.checkpoints):
        yield Finding(f"checkpoints/{aside.name}", fault="set aside, as it is damaged; remove it when it is of no more use")
    writing = is_held(folder)
    for left in (*unfinished(run.checkpoints), *_partial_files(run)):
        what = left.relative_to(folder).as_posix()
        yield Finding(what, "a process that trains here writes it") if writing else Finding(what, fault=LEFT)
    if done or run.trained:
        yield _checked("trained weights", partial(_trained, folder, done))
    if run.best.is_dir():
        yield _checked("best/trained weights", partial(_best, run, done))
    yield _checked("metrics.jsonl", partial(_lines, run.metrics, range(1, done + 1)))
    yield _checked("evaluations.jsonl", partial(_lines, run.evaluations, range(1 if done else 0)))
    if run.faults.exists():
        yield _checked("faults.jsonl", partial(_lines, run.faults, range(0)))
    for file, kind in ((run.inputs, dict), (run.summary, dict), (run.prompts, list)):
        if file.exists():
            yield _checked(file.relative_to(folder).as_posix(), partial(_entries, file, kind))
    for section in ("train", "eval"):
        if (given := run.given_prompts(section)).exists():
            yield _checked(given.name, partial(_prompts, given, section, run))


def _checked(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, check())
    except (OSError, ValueError, RecursionError) as error:
        return Finding(what, fault=str(error))


def _partial_files(run: RunFolder) -> list[Path]:
    """What `fastgrpo.files.atomic_file` and `fastgrpo.trained_files` write aside."""
    return sorted(path for folder in (run.path, run.best, run.samples) for path in folder.glob("*.partial"))


def _whole(checkpoint: Path) -> str:
    marker = check_files(checkpoint)
    size = sum(file["bytes"] for file in marker["files"].values())
    return f"{len(marker['files'])} files of {marker['world_size']} ranks, {size / 1e6:.1f} MB, hashes agree"


def _trained(folder: Path, iteration: int | None) -> str:
    _refuse_any(faults_of_trained(folder, iteration))
    return "hashes agree" if iteration is None else f"of iteration {iteration}, hashes agree"


def _best(run: RunFolder, done: int) -> str:
    rows, _ = readable_lines(run.evaluations)
    return _trained(run.best, best_iteration([row for row in rows if row["iteration"] <= done]))


def _lines(file: Path, needed: range) -> str:
    """needed: the iterations that must have a line."""
    rows, unreadable = readable_lines(file)
    missing = missing_iterations(rows, needed)
    _refuse_any([f"line {n} cannot be read" for n in unreadable[:5]] + ([f"no line of {missing}"] if missing else []))
    return f"{len(rows)} lines"


def _entries(file: Path, kind: type[dict] | type[list]) -> str:
    value: Any = json_value(file.read_bytes())
    if not isinstance(value, kind):
        raise ValueError(f"holds a {type(value).__name__}, not a {kind.__name__}")
    return f"{len(value)} entries"


def _prompts(file: Path, section: str, run: RunFolder) -> str:
    prompts = load_prompts(file)
    hashes = json_value(run.inputs.read_bytes())
    if not isinstance(hashes, dict) or hashes.get(f"prompts.{section}") != prompts_hash(prompts):
        raise ValueError("are not those of which inputs.json has the hash")
    return f"{len(prompts)} prompts, the hash agrees"


def _refuse_any(faults: list[str]) -> None:
    if faults:
        raise ValueError("; ".join(faults))
