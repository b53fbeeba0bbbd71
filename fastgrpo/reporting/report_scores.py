"""The report's words and tables: what was gained, the facts of the run, and the scores by category."""

import html
from typing import Any

from fastgrpo.reporting.markup import bar, duration, html_table, number_cells, sentence, title
from fastgrpo.reporting.saved_run import SavedRun, is_number, phase_seconds
from fastgrpo.reporting.text import score_text

MINUS = "\N{MINUS SIGN}"


def headline(run: SavedRun) -> str:
    """The overall score before and after."""
    before, after = (accuracy.get("overall") for accuracy in run.accuracies())
    percent = run.in_percent()
    name = "accuracy" if percent else "score"
    if before is not None and after is not None:
        return (
            f'<p class="headline"><span class="before">{score_text(before, percent)}</span> '
            f'<span class="arrow">&rarr;</span> <span class="after">{score_text(after, percent)}</span> '
            f"<small>{name}, {_gain(before, after, percent)}{' points' * percent}</small></p>"
        )
    only = before if after is None else after
    if only is None:
        return sentence("Not evaluated yet.")
    return f'<p class="headline"><span class="after">{score_text(only, percent)}</span> <small>{name}</small></p>'


def facts(run: SavedRun) -> str:
    """How much was trained, for how long, and on what."""
    newest = run.metrics[-1] if run.metrics else {}
    seconds = run.summary.get("train_seconds", sum(sum(phase_seconds(row).values()) for row in run.metrics) or None)
    images = run.summary.get("images", newest.get("images"))
    known = {
        "iterations": newest.get("iteration"),
        "images trained on": _thousands(images),
        "forward passes to draw one": _forward_passes(run, images),
        "training time": duration(seconds) if is_number(seconds) else None,
        "images per evaluation": _thousands(run.evaluations[-1].get("images")) if run.evaluations else None,
        "seed": run.summary.get("seed", run.setting("seed")),
        "device": run.summary.get("device"),
        "model": run.setting("model", "path"),
    }
    items = (f"<div><dt>{k}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in known.items() if v is not None)
    return f'<dl class="facts">{"".join(items)}</dl>'


def _thousands(count: Any) -> str | None:
    return f"{count:,}" if is_number(count) else None


def _forward_passes(run: SavedRun, images: Any) -> str | None:
    """How often the network ran to draw an image, where every iteration has counted it."""
    passes = [row.get("rollout_forwards") for row in run.metrics]
    counted = [count for count in passes if is_number(count)]
    if not counted or len(counted) < len(passes) or not is_number(images) or images <= 0:
        return None
    return f"{sum(counted) / images:.3g}"


def categories(run: SavedRun) -> str:
    """A table of the scores by category, before and after."""
    before, after = run.accuracies()
    if not before and not after:
        return sentence("Not evaluated yet.")
    percent = run.in_percent()
    rows = "".join(_category(name, before.get(name), after.get(name), run.in_percent(name)) for name in {**before, **after})
    head = ["category", "", "base", *(["trained", "points" if percent else "change"] if after else [])]
    return f'<div class="card">{html_table(head, rows)}</div>'


def _category(name: str, before: float | None, after: float | None, percent: bool) -> str:
    bars = "".join(bar(style, v) for style, v in (("before", before), ("c0", after)) if percent and v is not None)
    cells = number_cells("" if before is None else score_text(before, percent))
    if after is not None:
        cells += number_cells(score_text(after, percent), "" if before is None else _difference(before, after, percent))
    kind = ' class="overall"' if name == "overall" else ""
    return f'<tr{kind}><th>{title(name)}</th><td class="bars">{bars}</td>{cells}</tr>'


def _difference(before: float, after: float, percent: bool) -> str:
    gain = _gain(before, after, percent)
    kind = {"+": "better", MINUS: "worse"}.get(gain[0], "same")
    return f'<span class="{kind}">{gain}</span>'


def _gain(before: float, after: float, percent: bool) -> str:
    """The change with its sign; in percent it is in points, the difference of the two percentages as they are shown."""
    if not percent:
        return f"{after - before:+.4g}".replace("-", MINUS) if after != before else "0"
    points = round(round(100 * after, 1) - round(100 * before, 1), 1)
    return f"{points:+.1f}".replace("-", MINUS) if points else "0.0"
