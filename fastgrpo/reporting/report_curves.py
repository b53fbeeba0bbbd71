"""The report's charts: scores and rewards over the iterations, the health of the training, and where the time went."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastgrpo.reporting.charts import Line, Point, bar_chart, color_class, legend, line_chart, short
from fastgrpo.reporting.markup import bar, cards, duration, html_table, note, number_cells, percent, sentence, title
from fastgrpo.reporting.saved_run import SavedRun, is_number, phase_seconds

MAX_BARS = 60
MAX_NAMES = 40  # rewards, categories and phases that are shown
MAX_POINTS = 800  # of a line, which is 420 pixels wide
NOTHING_RECORDED = "No training iteration has been recorded."


def training(run: SavedRun) -> str:
    """The held-out scores and the rewards of the training images."""
    bodies = {
        "Accuracy on held-out prompts" if run.in_percent() else "Score on held-out prompts": _held_out(run),
        "Reward of the training images": _curve(run.metrics, "reward"),
    }
    # With several rewards the curve above is their weighted sum, and each has its own besides.
    apart = _by_name((row["iteration"], row["rewards"]) for row in run.metrics if isinstance(row.get("rewards"), dict))
    bodies |= {f"Reward {title(name)}": _chart(points, name) for name, points in list(apart.items())[:MAX_NAMES]}
    left_out = f"Rewards that are not shown: {len(apart) - MAX_NAMES}." if len(apart) > MAX_NAMES else ""
    bodies["Sizes of the training images"] = _size_table(run.metrics)
    return cards(bodies) + (note(left_out) if left_out else "") or sentence(NOTHING_RECORDED)


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
    total = _sums(phases for _, phases in rows)
    size = math.ceil(len(rows) / MAX_BARS)
    bars = []
    for part in (rows[i : i + size] for i in range(0, len(rows), size)):
        sums = _sums(phases for _, phases in part)
        bars.append((part[0][0], [sums.get(name, 0.0) / len(part) for name in total]))
    chart = bar_chart(bars, rows[-1][0] + 1, "seconds per iteration")
    chart += note(f"Each bar is the mean of {size} iterations.") if size > 1 else ""
    return cards({"Seconds per iteration": chart, "Share of the time": _time_table(total, len(rows))})


def _sums(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By name, over all rows; the first names of many."""
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name in total or len(total) < MAX_NAMES:
                total[name] = total.get(name, 0.0) + value
    return total


def _time_table(total: dict[str, float], iterations: int) -> str:
    whole = sum(total.values()) or 1.0
    rows = "".join(
        f'<tr><th>{title(name)}</th><td class="bars">{bar(color_class(i), value / whole)}</td>'
        + number_cells(percent(value / whole), f"{value / iterations:.3g} s", duration(value))
        + "</tr>"
        for i, (name, value) in enumerate(total.items())
    )
    return html_table(["phase", "", "share", "each", "total"], rows)


def _size_table(rows: list[dict[str, Any]]) -> str:
    """How many iterations had each size, with their mean reward and seconds; empty where the metrics name no size."""
    by_size: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sides = [f"{row[side]:g}" for side in ("height", "width", "num_frames") if is_number(row.get(side))]
        if sides:
            by_size.setdefault(" x ".join(sides), []).append(row)
    shown, text = list(by_size.items())[:MAX_NAMES], ""
    for i, (size, part) in enumerate(shown):
        rewards = [row["reward"] for row in part if is_number(row.get("reward"))]
        reward = f"{sum(rewards) / len(rewards):.3g}" if rewards else ""
        seconds = sum(sum(phase_seconds(row).values()) for row in part) / len(part)
        text += f'<tr><th>{size}</th><td class="bars">{bar(color_class(i), len(part) / len(rows))}</td>'
        text += number_cells(str(len(part)), reward, f"{seconds:.3g} s") + "</tr>"
    return html_table(["height x width x frames", "", "iterations", "reward", "each"], text) if text else ""


def _held_out(run: SavedRun) -> str:
    """The overall score in bold and that of every category; nothing before the second evaluation."""
    if len(run.evaluations) < 2:
        return ""
    found = _by_name((row["iteration"], row["accuracy"]) for row in run.evaluations)
    points = {name: found[name] for name in [*dict.fromkeys(["overall", *found])][:MAX_NAMES] if name in found}
    if not points:
        return ""
    first = 0 if "overall" in points else 1  # the first colour is kept for it
    color = {name: color_class(i) for i, name in enumerate(points, first)}
    lines = [
        Line(place, color[name] + (" bold" if name == "overall" else " thin"), dots=True) for name, place in points.items()
    ]
    lines.reverse()  # overall on top
    if run.in_percent():
        chart = line_chart(lines, "accuracy over iterations", percent=True, low=0.0, high=1.0)
    else:
        chart = line_chart(lines, "score over iterations")
    return chart + legend((color[name] + " bold" * (name == "overall"), title(name)) for name in points)


def _curve(rows: list[dict[str, Any]], key: str, in_percent: bool = False, zero: bool = False) -> str:
    """One metric over the iterations."""
    return _chart([(row["iteration"], row[key]) for row in rows if is_number(row.get(key))], key, in_percent, zero)


def _chart(points: Sequence[Point], key: str, in_percent: bool = False, zero: bool = False) -> str:
    """Each value in light, the running mean on top; empty without values."""
    if not points:
        return ""
    window = max(1, len(points) // 20) | 1  # odd, so that it is centred
    lines = [Line(_thinned(points), "c0 raw"), Line(_smooth(points, window), "c0", dots=len(points) == 1)]
    chart = line_chart(lines, f"{key} over iterations", percent=in_percent, low=0.0 if zero else None)
    text = f"{short(points[-1][1], in_percent)} at iteration {points[-1][0]:g}"
    return chart + note(text + (f"; bold: mean of {window} iterations" if window > 1 else ""))


def _by_name(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, list[Point]]:
    """The numbers of each name over the iterations; names in the order in which they come up."""
    points: dict[str, list[Point]] = {}
    for iteration, values in rows:
        for name, value in values.items():
            if is_number(value):
                points.setdefault(name, []).append((iteration, value))
    return points


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Points of which a chart shows no more: of as many neighbours as share a place the lowest and the highest."""
    size = 2 * math.ceil(len(points) / MAX_POINTS)
    if size == 2:
        return list(points)
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [point for part in parts for point in sorted({min(part, key=_height), max(part, key=_height)})]


def _height(point: Point) -> float:
    return point[1]


def _smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The mean over a centred window, cut off at the ends; at as many places as a chart can show."""
    smooth = []
    places = range(0, len(points), math.ceil(len(points) / MAX_POINTS))
    for i in dict.fromkeys([*places, len(points) - 1]):
        around = points[max(0, i - window // 2) : i + window // 2 + 1]
        smooth.append((points[i][0], sum(y for _, y in around) / len(around)))
    return smooth
