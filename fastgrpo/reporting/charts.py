"""Charts as SVG, for one page of HTML whose template has the styles: lines over a number, and bars of stacked parts."""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
COLORS = 8  # classes c0 to c7 of the template; c0 is for what matters most


@dataclass(frozen=True)
class Line:
    """A line of a chart: its points and its classes in the template."""

    points: Sequence[Point]
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Axes:
    """A chart's frame: its data ranges, its ticks, and where a value lies on the paper."""

    left: float
    right: float
    ticks: list[float]
    percent: bool = False
    WIDTH, HEIGHT, MARGIN, FOOT, TOP = 480, 264, 50, 40, 8

    def x(self, value: float) -> float:
        share = (value - self.left) / ((self.right - self.left) or 1.0)
        return self.MARGIN + share * (self.WIDTH - self.MARGIN - 8)

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.TOP + (high - value) / (high - low) * (self.HEIGHT - self.TOP - self.FOOT)

    def path(self, line: Line) -> str:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in line.points)
        text = f'<polyline class="line {line.style}" points="{path}"/>'
        return text + "".join(self.dot(line, *point) for point in line.points) if line.dots else text

    def dot(self, line: Line, x: float, y: float) -> str:
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{2 if "thin" in line.style else 4}"'
        title = f"<title>iteration {x:g}: {short(y, self.percent)}</title>"
        return f'<circle class="{line.style}" {place}>{title}</circle>'

    def svg(self, body: Iterable[str], label: str) -> str:
        marks = [t for t in ticks(self.left, self.right, 5, whole=True) if self.left <= t <= self.right]
        middle, foot = (self.MARGIN + self.WIDTH) / 2, self.HEIGHT - 22
        frame = [f'<text class="middle" x="{middle}" y="{self.HEIGHT - 4}">iteration</text>']
        frame += [f'<text class="middle" x="{self.x(t):.1f}" y="{foot}">{t:g}</text>' for t in marks]
        for tick in self.ticks:
            y, text = self.y(tick), short(tick, self.percent)
            frame.append(f'<path class="grid" d="M{self.MARGIN} {y:.1f}H{self.WIDTH}"/>')
            frame.append(f'<text class="end" x="{self.MARGIN - 7}" y="{y + 4:.1f}">{text}</text>')
        size, label = f"0 0 {self.WIDTH} {self.HEIGHT}", html.escape(label)
        return f'<svg viewBox="{size}" role="img" aria-label="{label}">{"".join([*frame, *body])}</svg>'


def line_chart(
    lines: Sequence[Line],
    label: str,
    percent: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """Lines over the iterations; `low` and `high` widen the vertical range to values that must be in it."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [v for v in (low, high) if v is not None]
    axes = Axes(min(xs), max(xs), ticks(min(ys), max(ys), 5), percent)
    return axes.svg((axes.path(line) for line in lines), label)


def bar_chart(bars: Sequence[tuple[float, list[float]]], end: float, label: str) -> str:
    """Stacked bars, each from its start to the next one's; the last one stops at `end`."""
    axes = Axes(bars[0][0], end, ticks(0.0, max(sum(values) for _, values in bars), 5))
    body = []
    for (start, values), stop in zip(bars, [*(start for start, _ in bars[1:]), end], strict=True):
        x, width, bottom = axes.x(start), max(0.8 * (axes.x(stop) - axes.x(start)), 0.5), 0.0
        for i, value in enumerate(values):
            top = bottom + value
            body.append(
                f'<rect class="{color_class(i)}" x="{x:.1f}" y="{axes.y(top):.1f}" width="{width:.1f}" '
                f'height="{axes.y(bottom) - axes.y(top):.1f}"/>'
            )
            bottom = top
    return axes.svg(body, label)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """At most count + 2 round numbers around [low, high]."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        high = low + (abs(low) or 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next((m for m in (1, 2, 5) if (high - low) / (step * m) <= count), 10)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.9g}") for i in range(first, last + 1)]


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """A list of classes of the template and what they stand for."""
    return '<ul class="legend">' + "".join(f'<li class="{c}"><i></i>{text}</li>' for c, text in entries) + "</ul>"


def color_class(i: int) -> str:
    return f"c{i}" if i < COLORS else f"c{1 + (i - 1) % (COLORS - 1)}"  # c0 is never used twice


def short(value: float, percent: bool) -> str:
    return f"{100 * value:.3g}%" if percent else f"{value:.3g}"
