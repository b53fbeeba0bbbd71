"""What the files of a run say, whatever state the run is in: going on, killed, finished or damaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from fastgrpo.config import yaml12
from fastgrpo.files import json_value
from fastgrpo.reporting.run_folder import RunFolder, image_of, readable_lines

LARGEST = 1e100  # of a number that a report shows


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run as its files tell it. What they do not tell is empty."""

    name: str
    config: str  # as written
    metrics: list[dict[str, Any]]  # by iteration
    evaluations: list[dict[str, Any]]  # by iteration, the base first
    summary: dict[str, Any]  # empty until the run has finished
    samples: dict[int, Path]  # folder of each iteration's images
    prompts: list[Any]  # of the images, in their order
    unreadable: int  # number of lines left out

    def accuracies(self) -> tuple[dict[str, float], dict[str, float]]:
        """Accuracy by category, "overall" first, of the base and of the newest model; empty where not evaluated."""
        base = self.evaluations[0]["accuracy"] if self.evaluations else {}
        newest = self.evaluations[-1]["accuracy"] if len(self.evaluations) > 1 else {}
        base = _overall_first(_mapping(self.summary.get("base")) or base, self.summary.get("base_accuracy"))
        newest = _overall_first(_mapping(self.summary.get("final")) or newest, self.summary.get("final_accuracy"))
        return base, newest

    def in_percent(self, name: str = "overall") -> bool:
        """Whether that score is shown in percent: the run says so of those whose rewards do."""
        rows = [self.summary, *reversed(self.evaluations)]
        said: list[Any] = next((row["percent"] for row in rows if isinstance(row.get("percent"), list)), [])
        return name in said

    def setting(self, *keys: str) -> Any:
        """A value of its configuration, None where there is none."""
        try:
            value = yaml12.load(self.config)
        except ValueError:
            return None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def prompt(self, number: int) -> tuple[str, str]:
        """The prompt of a sample and its category, which may be empty."""
        record = self.prompts[number] if number < len(self.prompts) else {}
        if not isinstance(record, dict):
            return f"sample {number}", ""
        return str(record.get("prompt", f"sample {number}")), str(record.get("tag") or "")

    def image(self, iteration: int, number: int) -> Path:
        return image_of(self.samples[iteration], number)

    def images_in_all(self, iterations: Sequence[int]) -> list[int]:
        """The numbers of the samples that every one of these iterations has."""
        found = ({int(path.stem) for path in self.samples[i].glob("*.png") if path.stem.isdecimal()} for i in iterations)
        return sorted(set.intersection(*found))


def read_run(path: Path) -> SavedRun:
    """Reads everything there is. No single file has to be there, but one of them must: else FileNotFoundError."""
    folder = RunFolder(path)
    expected = (folder.config, folder.metrics, folder.evaluations, folder.summary, folder.samples)
    if not any(file.exists() for file in expected):
        names = ", ".join(file.name for file in expected)
        raise FileNotFoundError(f"{path}: not the folder of a run; it holds none of {names}")
    metrics, bad_metrics = _rows_by_iteration(folder.metrics)
    evaluations, bad_evaluations = _rows_by_iteration(folder.evaluations)
    summary, prompts = _read_json(folder.summary), _read_json(folder.prompts)
    return SavedRun(
        name=path.resolve().name,
        config=folder.config.read_text(encoding="utf-8", errors="replace") if folder.config.is_file() else "",
        metrics=metrics,
        evaluations=[row for row in evaluations if isinstance(row.get("accuracy"), dict)],
        summary=_mapping(summary),
        samples=folder.sample_folders(),
        prompts=prompts if isinstance(prompts, list) else [],
        unreadable=bad_metrics + bad_evaluations,
    )


def phase_seconds(row: dict[str, Any]) -> dict[str, float]:
    """The seconds of an iteration by phase."""
    seconds = row.get("seconds")
    return {phase: value for phase, value in seconds.items() if is_number(value)} if isinstance(seconds, dict) else {}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a file is a number that can be drawn: sums of it stay finite too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _rows_by_iteration(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The last row of each iteration, in rising order, and how many lines could not be read."""
    rows, unreadable = readable_lines(path)
    last = {row["iteration"]: row for row in rows}
    return [last[iteration] for iteration in sorted(last)], len(unreadable)


def _read_json(path: Path) -> Any:
    try:
        return json_value(path.read_bytes())
    except (OSError, ValueError):
        return None


def _mapping(value: Any) -> dict[str, Any]:
    """What a file says where it says a mapping; nothing otherwise."""
    return value if isinstance(value, dict) else {}


def _overall_first(accuracy: dict[str, Any], overall: Any) -> dict[str, float]:
    overall = accuracy.get("overall") if overall is None else overall
    numbers = {"overall": overall, **{name: value for name, value in accuracy.items() if name != "overall"}}
    return {name: value for name, value in numbers.items() if is_number(value)}
