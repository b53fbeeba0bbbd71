"""What the GPU suite measured, as one picture:   python benchmarks/gpu_picture.py benchmarks/results/h200

Reads every results*.jsonl of the folder, in the order of their names, and writes gpu.png beside them: images a second of
each form of a rollout, where the time of a whole iteration goes, and the kernels' share of a copy's bandwidth.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from common import pyplot

PHASES = {"rollout": "#2f6fdb", "decode": "#7fb069", "reward": "#e6aa68", "update": "#8e5ea2", "other": "#999999"}
COLOURS = ("#2f6fdb", "#8e5ea2", "#7fb069", "#e6aa68")


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of all runs of the suite in the folder."""
    files = sorted(folder.glob("results*.jsonl"))
    if not files:
        raise SystemExit(f"error: {folder} holds no results*.jsonl, which gpu_suite.sh leaves in $OUT")
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def speeds(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Form -> batch -> images a second of a rollout."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        named = re.fullmatch(r"batch (\d+), (.+)", row["name"])
        if row["phase"] == "rollouts" and named and "images_per_second" in row:
            found.setdefault(named[2], {})[named[1]] = row["images_per_second"]
    return found


def iterations(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run -> its last whole iteration that did not warm up; of a run that had only one, that one."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        named = re.fullmatch(r"(.+): iteration \d+", row["name"])
        if named and "phases" in row and row["phase"] != "models":
            found[named[1]] = row
    return found


def shares(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Kernel -> shape -> share of a copy's bandwidth."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        named = re.fullmatch(r"(fused.*?) \((.+)\)", row["name"])
        if row["phase"] == "bandwidth" and named:
            found.setdefault(named[1], {})[named[2].replace(", ", "x")] = row["share of bandwidth"]
    return found


def draw(rows: list[dict[str, Any]]) -> Any:
    figure, (top, middle, bottom) = pyplot().subplots(3, figsize=(9, 11), layout="constrained", height_ratios=(3, 2, 2))
    draw_groups(top, speeds(rows), "images a second", "A rollout of SD3.5 Medium at 512 pixels, 10 steps", "images a batch")
    draw_iterations(middle, iterations(rows))
    draw_groups(bottom, shares(rows), "share of a copy's bandwidth", "The kernels alone", "latents")
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_groups(axes: Any, found: dict[str, dict[str, float]], label: str, title: str, legend: str) -> None:
    """A group of horizontal bars for each row, one bar for each of its keys."""
    keys = list(dict.fromkeys(key for row in found.values() for key in row))
    height = 0.8 / max(1, len(keys))
    for i, key in enumerate(keys):
        places = [place + i * height for place, row in enumerate(found.values()) if key in row]
        bars = axes.barh(places, [row[key] for row in found.values() if key in row], height, label=key, color=COLOURS[i % 4])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
    axes.set_yticks([place + height * (len(keys) - 1) / 2 for place in range(len(found))], list(found))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel=label, title=title)
    axes.legend(fontsize=8, title=legend, title_fontsize=8)


def draw_iterations(axes: Any, found: dict[str, dict[str, Any]]) -> None:
    left = [0.0] * len(found)
    for phase, colour in PHASES.items():
        widths = [row["phases"].get(phase, 0.0) / row["images"] for row in found.values()]
        axes.barh(list(found), widths, left=left, label=phase, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, (end, row) in enumerate(zip(left, found.values(), strict=True)):
        axes.text(end, place, f" {row['images_per_second']:.2f} images/s, MFU {row['mfu']:.0%}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(xlabel="seconds an image", title="A whole iteration, from prompts to the optimiser's step")
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with what gpu_suite.sh left in $OUT")
    folder = parser.parse_args().folder
    draw(read(folder)).savefig(folder / "gpu.png", dpi=110)
    print(folder / "gpu.png")


if __name__ == "__main__":
    main()
