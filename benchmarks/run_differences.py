"""What two runs of the same configuration do not have alike, but for what the clock says: nothing, if neither was disturbed.

differences(Path("runs/killed"), Path("runs/undisturbed"))      ["samples/00000/001.png is missing"]
"""

import json
from pathlib import Path
from typing import Any

from fastgrpo.engine.checkpoint import STATE
from fastgrpo.engine.checkpoint_folders import MARKER
from fastgrpo.reporting.report import write_report
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.verification import verify

CLOCK = ("seconds", "train_seconds", STATE)  # keys of JSON: what the clock says, and the hash of a file that holds it


def differences(folder: Path, undisturbed: Path) -> list[str]:
    """What the folder of a finished run has otherwise than an undisturbed one's; empty where nothing."""
    found, expected = contents(folder), contents(undisturbed)
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} is left over" for name in found.keys() - expected.keys()]
    lines += [f"{name} has another content" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    lines += [f"{finding.what}: {finding.fault}" for finding in verify(folder) if finding.fault]
    report = RunFolder(folder).report
    if report.is_file() and report.read_bytes() != write_report(folder).read_bytes():
        lines.append(f"{report.name} is not up to date")
    return sorted(lines)


def contents(folder: Path) -> dict[str, Any]:
    """Everything in the folder of a run by its name; without TensorBoard's, and of the report only that it is there."""
    run = RunFolder(folder)
    names = (path for path in folder.rglob("*") if run.tensorboard not in (path, path.parent))
    return {path.relative_to(folder).as_posix(): None if path == run.report else _content(path) for path in names}


def _content(path: Path) -> Any:
    """Of a folder None; of JSON what it says without the clock; else the bytes."""
    if path.is_dir():
        return None
    if path.suffix == ".jsonl":
        return [_without_clock(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".json" or path.name == MARKER:
        return _without_clock(json.loads(path.read_text(encoding="utf-8")))
    return path.read_bytes()


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(one) for key, one in value.items() if key not in CLOCK}
    return value
