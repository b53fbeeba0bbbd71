"""A run as one page that anyone can open: `run/report.html`, a single file without network or scripts.

    python -m fastgrpo.report runs/tiny_shapes

Reads only the run's files, so it works while a run goes on, after one was killed, and on a machine without
torch. What a run does not have (yet) becomes a sentence. report_template.html lays out the page; here its
holes are filled.
"""

import argparse
import base64
import html
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml
from PIL import Image

from fastgrpo.reporting.charts import Line, Point, bar_chart, color_class, legend, line_chart, short
from fastgrpo.reporting.text import are_shares, score_text

MAX_PAIRS, MAX_STRIPS, MAX_FRAMES = 24, 6, 6  # samples shown: before and after, over time, and in one strip
MAX_BARS = 60
SMALL_IMAGE, LARGE_IMAGE = 128, 384  # pixels: below it shown as squares, above it shrunk


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of a run say."""

    name: str
    config: str  # as written
    metrics: list[dict]  # by iteration
    evaluations: list[dict]  # by iteration, the base first
    summary: dict  # empty until the run has finished
    samples: dict[int, Path]  # folder of each iteration's images
    prompts: list[dict]  # of the images, in their order
    unreadable: int  # lines left out


def write_report(run: Path) -> Path:
    """Write `run/report.html` and return its path."""
    data = read_run(Path(run))
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    path = Path(run) / "report.html"
    path.write_text(template.substitute(_holes(data)), encoding="utf-8", errors="replace")
    return path


def read_run(run: Path) -> Run:
    """Everything there is; no file has to be there, but one of them."""
    expected = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", "summary.json", "samples")
    if not any((run / name).exists() for name in expected):
        raise FileNotFoundError(f"{run}: not the folder of a run; it holds none of {', '.join(expected)}")
    metrics, bad_metrics = _read_lines(run / "metrics.jsonl")
    evaluations, bad_evaluations = _read_lines(run / "evaluations.jsonl")
    summary, prompts = _read_json(run / "summary.json"), _read_json(run / "samples" / "prompts.json")
    config = run / "config.yaml"
    folders = (folder for folder in (run / "samples").glob("*") if folder.is_dir() and folder.name.isdecimal())
    return Run(
        name=run.resolve().name,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        metrics=metrics,
        evaluations=[row for row in evaluations if isinstance(row.get("accuracy"), dict)],
        summary=summary if isinstance(summary, dict) else {},
        samples={int(f.name): f for f in sorted(folders)},
        prompts=prompts if isinstance(prompts, list) else [],
        unreadable=bad_metrics + bad_evaluations,
    )


def _read_lines(path: Path) -> tuple[list[dict], int]:
    """Rows by iteration, the last of each; and how many lines are no rows: a killed run leaves half a one."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows, unreadable = {}, 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
            rows[int(row["iteration"])] = row
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    return [rows[iteration] for iteration in sorted(rows)], unreadable


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _holes(run: Run) -> dict[str, str]:
    """The text of each hole in the template."""
    return {
        "name": html.escape(run.name),
        "status": _status(run),
        "headline": _headline(run),
        "facts": _facts(run),
        "training": _training(run),
        "categories": _categories(run),
        "samples": _samples(run),
        "film": _film(run),
        "health": _health(run),
        "time": _time(run),
        "footer": _footer(run),
        "config": f"<pre>{html.escape(run.config or 'no config.yaml')}</pre>",
    }


# The words: headline, facts, tables


def _status(run: Run) -> str:
    if run.summary:
        return f'<span class="status done">{html.escape(str(run.summary.get("status", "finished")))}</span>'
    return '<span class="status open">running, or interrupted</span>'


def _before_after(run: Run) -> tuple[dict, dict]:
    """Accuracy by category, "overall" first, of the base and the newest model; empty where not evaluated."""
    base = run.evaluations[0]["accuracy"] if run.evaluations else {}
    final = run.evaluations[-1]["accuracy"] if len(run.evaluations) > 1 else {}
    base = _overall_first(run.summary.get("base") or base, run.summary.get("base_accuracy"))
    final = _overall_first(run.summary.get("final") or final, run.summary.get("final_accuracy"))
    return base, final


def _are_shares(run: Run) -> bool:
    evaluated = (*(row["accuracy"] for row in run.evaluations), *_before_after(run))
    return are_shares(score for accuracy in evaluated for score in accuracy.values() if _is_number(score))


def _overall_first(accuracy: dict, overall: float | None) -> dict:
    overall = accuracy.get("overall") if overall is None else overall
    numbers = {"overall": overall, **{name: value for name, value in accuracy.items() if name != "overall"}}
    return {name: value for name, value in numbers.items() if _is_number(value)}


def _headline(run: Run) -> str:
    before, after = (accuracy.get("overall") for accuracy in _before_after(run))
    shares = _are_shares(run)
    name = "accuracy" if shares else "score"
    if before is None and after is None:
        return _none("Not evaluated yet.")
    if before is None or after is None:
        value = score_text(after if before is None else before, shares)
        return f'<p class="headline"><span class="after">{value}</span> <small>{name}</small></p>'
    return (
        f'<p class="headline"><span class="before">{score_text(before, shares)}</span> '
        f'<span class="arrow">&rarr;</span> <span class="after">{score_text(after, shares)}</span> '
        f"<small>{name}, {_points(before, after, shares)}{' points' * shares}</small></p>"
    )


def _facts(run: Run) -> str:
    newest, summary = run.metrics[-1] if run.metrics else {}, run.summary
    images = summary.get("images", newest.get("images"))
    seconds = summary.get("train_seconds", sum(sum(_phases(row).values()) for row in run.metrics) or None)
    evaluated = run.evaluations[-1].get("images") if run.evaluations else None
    passes = [row.get("rollout_forwards") for row in run.metrics]
    counted = bool(passes) and all(map(_is_number, passes)) and _is_number(images) and images > 0
    facts = {
        "iterations": newest.get("iteration"),
        "images trained on": f"{images:,}" if _is_number(images) else None,
        "forward passes to draw one": f"{sum(passes) / images:.3g}" if counted else None,
        "training time": _duration(seconds) if _is_number(seconds) else None,
        "images per evaluation": f"{evaluated:,}" if _is_number(evaluated) else None,
        "seed": summary.get("seed", _config_value(run, "seed")),
        "device": summary.get("device"),
        "model": _config_value(run, "model", "path"),
    }
    items = (f"<div><dt>{k}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in facts.items() if v is not None)
    return f'<dl class="facts">{"".join(items)}</dl>'


def _config_value(run: Run, *keys: str) -> Any:
    try:
        value = yaml.safe_load(run.config)
    except yaml.YAMLError:
        return None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _categories(run: Run) -> str:
    before, after = _before_after(run)
    if not before and not after:
        return _none("Not evaluated yet.")
    shares = _are_shares(run)
    rows = "".join(_category(name, before.get(name), after.get(name), shares) for name in {**before, **after})
    table = _table(["category", "", "base", *(["trained", "points" if shares else "change"] if after else [])], rows)
    return f'<div class="card">{table}</div>'


def _category(name: str, before: float | None, after: float | None, shares: bool) -> str:
    bars = "".join(_bar(kind, v) for kind, v in (("before", before), ("c0", after)) if shares and v is not None)
    cells = _numbers("" if before is None else score_text(before, shares))
    if after is not None:
        cells += _numbers(score_text(after, shares), "" if before is None else _difference(before, after, shares))
    kind = ' class="overall"' if name == "overall" else ""
    return f'<tr{kind}><th>{_title(name)}</th><td class="bars">{bars}</td>{cells}</tr>'


def _difference(before: float, after: float, shares: bool) -> str:
    points = _points(before, after, shares)
    kind = {"+": "better", "\N{MINUS SIGN}": "worse"}.get(points[0], "same")
    return f'<span class="{kind}">{points}</span>'


def _table(head: Sequence[str], rows: str) -> str:
    """A name, a bar, then numbers."""
    cells = "".join(f"<th>{text}</th>" for text in head[:2])
    cells += "".join(f'<th class="number">{text}</th>' for text in head[2:])
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>"


def _bar(kind: str, share: float) -> str:
    return f'<i class="{kind}" style="--share:{_percent(min(max(share, 0.0), 1.0))}"></i>'


def _numbers(*texts: str) -> str:
    return "".join(f'<td class="number">{text}</td>' for text in texts)


def _footer(run: Run) -> str:
    left_out = f"Unreadable lines left out: {run.unreadable}. " if run.unreadable else ""
    return left_out + "Written by fastgrpo from the files of the run."


# The charts


def _training(run: Run) -> str:
    cards = {
        "Accuracy on held-out prompts" if _are_shares(run) else "Score on held-out prompts": _accuracy(run),
        "Reward of the training images": _curve(run.metrics, "reward"),
    }
    # Of several rewards the curve above is their weighted sum, and each has its own.
    rows = (row for row in run.metrics if isinstance(row.get("rewards"), dict))
    apart = [{"iteration": row["iteration"], **row["rewards"]} for row in rows]
    names = dict.fromkeys(name for row in apart for name in row if name != "iteration")
    cards |= {f"Reward {_title(name)}": _curve(apart, name) for name in names}
    return _cards(cards) or _none("No training iteration has been recorded.")


def _health(run: Run) -> str:
    cards = {
        "KL to the base": _curve(run.metrics, "kl", zero=True),
        "Clipped samples": _curve(run.metrics, "clip_fraction", percent=True, zero=True),
        "Gradient norm": _curve(run.metrics, "grad_norm", zero=True),
        "Groups without variance": _curve(run.metrics, "zero_groups", percent=True, zero=True),
    }
    return _cards(cards) or _none("No training iteration has been recorded.")


def _cards(cards: dict[str, str]) -> str:
    """The cards that have something in them, side by side where there is room."""
    filled = (f'<div class="card"><h3>{title}</h3>{body}</div>' for title, body in cards.items() if body)
    text = "".join(filled)
    return f'<div class="charts">{text}</div>' if text else ""


def _curve(rows: list[dict], key: str, percent: bool = False, zero: bool = False) -> str:
    """One metric over the iterations: each value in light, the running mean on top; empty without values."""
    points = _series(rows, key)
    if not points:
        return ""
    window = max(1, len(points) // 20) | 1  # odd, so that it is centred
    lines = [Line(points, "c0 raw"), Line(_smooth(points, window), "c0", dots=len(points) == 1)]
    chart = line_chart(lines, f"{key} over iterations", percent=percent, low=0.0 if zero else None)
    note = f"{short(points[-1][1], percent)} at iteration {points[-1][0]:g}"
    note += f"; bold: mean of {window} iterations" if window > 1 else ""
    return chart + f'<p class="note">{note}</p>'


def _smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Mean over a centred window, cut off at the ends."""
    smooth = []
    for i, (x, _) in enumerate(points):
        around = points[max(0, i - window // 2) : i + window // 2 + 1]
        smooth.append((x, sum(y for _, y in around) / len(around)))
    return smooth


def _accuracy(run: Run) -> str:
    """Overall in bold and every category; nothing before the second evaluation."""
    if len(run.evaluations) < 2:
        return ""
    names = list(dict.fromkeys(["overall", *(name for row in run.evaluations for name in row["accuracy"])]))
    rows = [{"iteration": row["iteration"], **row["accuracy"]} for row in run.evaluations]
    series = {name: points for name in names if (points := _series(rows, name))}
    color = {name: color_class(names.index(name)) for name in series}
    lines = [
        Line(points, color[name] + (" bold" if name == "overall" else " thin"), dots=True) for name, points in series.items()
    ]
    entries = [(color[name] + " bold" * (name == "overall"), _title(name)) for name in series]
    if not lines:
        return ""
    lines.reverse()  # overall on top
    if _are_shares(run):
        chart = line_chart(lines, "accuracy over iterations", percent=True, low=0.0, high=1.0)
    else:
        chart = line_chart(lines, "score over iterations")
    return chart + legend(entries)


def _time(run: Run) -> str:
    """Seconds an iteration by phase, as stacked bars, and each phase's share of the whole."""
    rows = [(row["iteration"], phases) for row in run.metrics if (phases := _phases(row))]
    if not rows:
        return _none("No training iteration has recorded its times.")
    names = list(dict.fromkeys(name for _, phases in rows for name in phases))
    total = {name: sum(phases.get(name, 0.0) for _, phases in rows) for name in names}
    size = math.ceil(len(rows) / MAX_BARS)
    bars = []
    for i in range(0, len(rows), size):
        group = rows[i : i + size]
        bars.append((group[0][0], [sum(p.get(name, 0.0) for _, p in group) / len(group) for name in names]))
    note = f'<p class="note">Each bar is the mean of {size} iterations.</p>' if size > 1 else ""
    chart = bar_chart(bars, rows[-1][0] + 1, "seconds per iteration") + note
    return _cards({"Seconds per iteration": chart, "Share of the time": _shares(total, len(rows))})


def _shares(total: dict[str, float], iterations: int) -> str:
    whole = sum(total.values()) or 1.0
    rows = "".join(
        f'<tr><th>{_title(name)}</th><td class="bars">{_bar(color_class(i), value / whole)}</td>'
        + _numbers(_percent(value / whole), f"{value / iterations:.3g} s", _duration(value))
        + "</tr>"
        for i, (name, value) in enumerate(total.items())
    )
    return _table(["phase", "", "share", "each", "total"], rows)


def _samples(run: Run) -> str:
    """Base and newest side by side; the only images there are, where nothing was trained."""
    if not run.samples:
        return _none("There are no samples.")
    first, last = min(run.samples), max(run.samples)
    newest = "trained" if run.summary else f"iteration {last}"
    labels = {first: _iteration(first), last: newest} if first < last else {first: ""}
    strips = [_strip(run, n, labels) for n in _spread(_images_in_all(run, list(labels)), MAX_PAIRS)]
    kind = " large" if any('class="photo"' in strip for strip in strips) else " single" * (first == last)
    note = '<p class="note">Only one set of samples so far.</p>' if first == last else ""
    return f'{note}<div class="samples{kind}">{"".join(strips)}</div>' if strips else _none("No sample is complete.")


def _film(run: Run) -> str:
    iterations = _spread(list(run.samples), MAX_FRAMES)
    if len(iterations) < 3:
        return _none("It takes samples of at least three evaluations.")
    numbers = _images_in_all(run, iterations)
    by_tag = {_prompt(run, n)[1]: n for n in reversed(numbers)}  # the first of each tag
    chosen = sorted(by_tag.values()) if len(by_tag) > 1 else numbers
    labels = {i: _iteration(i) for i in iterations}
    strips = "".join(_strip(run, n, labels) for n in _spread(chosen, MAX_STRIPS))
    note = '<p class="note">The first prompt of each kind; the number is the iteration.</p>' if len(by_tag) > 1 else ""
    return f'{note}<div class="film">{strips}</div>' if strips else _none("No sample is complete.")


def _strip(run: Run, number: int, labels: dict[int, str]) -> str:
    """One prompt's images from several iterations, side by side."""
    prompt, tag = _prompt(run, number)
    frames = "".join(
        f"<div>{image}<small>{label}</small></div>"
        for iteration, label in labels.items()
        if (image := _image(_file(run, iteration, number), f"{prompt} ({label})" if label else prompt))
    )
    caption = html.escape(prompt) + (f" <small>{_title(tag)}</small>" if tag else "")
    return f'<figure><div class="frames">{frames}</div><figcaption>{caption}</figcaption></figure>'


def _image(path: Path, description: str) -> str:
    """An image inside the page; nothing where it cannot be read: a run may be killed while it writes one."""
    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return ""
    kind = "pixels" if max(picture.size) < SMALL_IMAGE else "photo"
    shrunk = max(picture.size) > LARGE_IMAGE
    picture.thumbnail((LARGE_IMAGE, LARGE_IMAGE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if shrunk else "PNG", quality=88)
    source = f"data:image/{'jpeg' if shrunk else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img class="{kind}" alt="{html.escape(description)}" src="{source}">'


def _file(run: Run, iteration: int, number: int) -> Path:
    return run.samples[iteration] / f"{number:03d}.png"


def _iteration(iteration: int) -> str:
    return str(iteration) if iteration else "base"


def _images_in_all(run: Run, iterations: Sequence[int]) -> list[int]:
    found = ({int(path.stem) for path in run.samples[i].glob("*.png") if path.stem.isdecimal()} for i in iterations)
    return sorted(set.intersection(*found))


def _prompt(run: Run, number: int) -> tuple[str, str]:
    record = run.prompts[number] if number < len(run.prompts) else {}
    if not isinstance(record, dict):
        return f"sample {number}", ""
    return str(record.get("prompt", f"sample {number}")), str(record.get("tag") or "")


# Small things


def _series(rows: Iterable[dict], key: str) -> list[Point]:
    return [(row["iteration"], row[key]) for row in rows if _is_number(row.get(key))]


def _phases(row: dict) -> dict[str, float]:
    seconds = row.get("seconds")
    return {k: v for k, v in seconds.items() if _is_number(v)} if isinstance(seconds, dict) else {}


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _title(name: str) -> str:
    return html.escape(name.replace("_", " "))


def _none(sentence: str) -> str:
    return f'<p class="none">{sentence}</p>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _points(before: float, after: float, shares: bool) -> str:
    """What was gained, with its sign; of shares in points, the difference of the two percentages as they are shown."""
    if not shares:
        return f"{after - before:+.4g}".replace("-", "\N{MINUS SIGN}") if after != before else "0"
    points = round(round(100 * after, 1) - round(100 * before, 1), 1)
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}") if points else "0.0"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastgrpo.report", description="Write the report of a run.")
    parser.add_argument("run", type=Path, help="folder of the run")
    try:
        print(write_report(parser.parse_args().run))
    except FileNotFoundError as error:
        sys.exit(str(error))
