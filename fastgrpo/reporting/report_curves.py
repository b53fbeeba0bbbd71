"""The report's charts: scores and rewards over the iterations, the health of the training, and where the time went."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fastgrpo.reporting.charts import Line, Point, bar_chart, color_class, legend, line_chart, short
from fastgrpo.reporting.markup import bar, cards, duration, html_table, note, number_cells, percent, sentence, title
from fastgrpo.reporting.saved_run import SavedRun, is_number, phase_seconds

MAX_BARS = 60
NOTHING_RECORDED = "No training iteration has been recorded."


def training(run: SavedRun) -> str:
    """The held-out scores and the rewards of the training images."""
    bodies = {
        "Accuracy on held-out prompts" if run.in_percent() else "Score on held-out prompts": _held_out(run),
        "Reward of the training images": _curve(run.metrics, "reward"),
    }
    # With several rewards the curve above is their weighted sum, and each has its own besides.
    rows = (row for row in run.metrics if isinstance(row.get("rewards"), dict))
    apart = [{"iteration": row["iteration"], **row["rewards"]} for row in rows]
    names = dict.fromkeys(name for row in apart for name in row if name != "iteration")
    bodies |= {f"Reward {title(name)}": _curve(apart, name) for name in names}
    return cards(bodies) or sentence(NOTHING_RECORDED)


def health(run: SavedRun) -> str:
    """The metrics that show early when a training goes wrong."""
    bodies = {
        "KL to the base": _curve(run.metrics, "kl", zero=True),
        "Clipped samples": _curve(run.metrics, "clip_fraction", in_percent=True, zero=True),
        "Gradient norm": _curve(run.metrics, "grad_norm", zero=True),
        "Groups without variance": _curve(run.metrics, "zero_groups", in_percent=True, zero=True),
    }
    return cards(bodies) or sentence(NOTHING_RECORDED)


def time(run: SavedRun) -> str:
    """Seconds an iteration by phase, as stacked bars, and each phase's share of the whole."""
    rows = [(row["iteration"], phases) for row in run.metrics if (phases := phase_seconds(row))]
    if not rows:
        return sentence("No training iteration has recorded its times.")
    names = list(dict.fromkeys(name for _, phases in rows for name in phases))
    total = {name: sum(phases.get(name, 0.0) for _, phases in rows) for name in names}
    size = math.ceil(len(rows) / MAX_BARS)
    bars = []
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        bars.append((part[0][0], [sum(phases.get(name, 0.0) for _, phases in part) / len(part) for name in names]))
    chart = bar_chart(bars, rows[-1][0] + 1, "seconds per iteration")
    chart += note(f"Each bar is the mean of {size} iterations.") if size > 1 else ""
    return cards({"Seconds per iteration": chart, "Share of the time": _time_table(total, len(rows))})


def _time_table(total: dict[str, float], iterations: int) -> str:
    whole = sum(total.values()) or 1.0
    rows = "".join(
        f'<tr><th>{title(name)}</th><td class="bars">{bar(color_class(i), value / whole)}</td>'
        + number_cells(percent(value / whole), f"{value / iterations:.3g} s", duration(value))
        + "</tr>"
        for i, (name, value) in enumerate(total.items())
    )
    return html_table(["phase", "", "share", "each", "total"], rows)


def _held_out(run: SavedRun) -> str:
    """The overall score in bold and that of every category; nothing before the second evaluation."""
    if len(run.evaluations) < 2:
        return ""
    names = list(dict.fromkeys(["overall", *(name for row in run.evaluations for name in row["accuracy"])]))
    rows = [{"iteration": row["iteration"], **row["accuracy"]} for row in run.evaluations]
    points = {name: found for name in names if (found := _series(rows, name))}
    if not points:
        return ""
    color = {name: color_class(names.index(name)) for name in points}
    lines = [
        Line(found, color[name] + (" bold" if name == "overall" else " thin"), dots=True) for name, found in points.items()
    ]
    lines.reverse()  # overall on top
    if run.in_percent():
        chart = line_chart(lines, "accuracy over iterations", percent=True, low=0.0, high=1.0)
    else:
        chart = line_chart(lines, "score over iterations")
    return chart + legend((color[name] + " bold" * (name == "overall"), title(name)) for name in points)


def _curve(rows: list[dict[str, Any]], key: str, in_percent: bool = False, zero: bool = False) -> str:
    """One metric over the iterations: each value in light, the running mean on top; empty without values."""
    points = _series(rows, key)
    if not points:
        return ""
    window = max(1, len(points) // 20) | 1  # odd, so that it is centred
    lines = [Line(points, "c0 raw"), Line(_smooth(points, window), "c0", dots=len(points) == 1)]
    chart = line_chart(lines, f"{key} over iterations", percent=in_percent, low=0.0 if zero else None)
    text = f"{short(points[-1][1], in_percent)} at iteration {points[-1][0]:g}"
    return chart + note(text + (f"; bold: mean of {window} iterations" if window > 1 else ""))


def _series(rows: Iterable[dict[str, Any]], key: str) -> list[Point]:
    return [(row["iteration"], row[key]) for row in rows if is_number(row.get(key))]


def _smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The mean over a centred window, cut off at the ends."""
    smooth = []
    for i, (x, _) in enumerate(points):
        around = points[max(0, i - window // 2) : i + window // 2 + 1]
        smooth.append((x, sum(y for _, y in around) / len(around)))
    return smooth
