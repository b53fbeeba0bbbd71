"""Pieces of the report's HTML: cards, tables with bars, sentences, and numbers as people read them."""

import html
from collections.abc import Sequence


def sentence(text: str) -> str:
    """A sentence in the place of what is not there."""
    return f'<p class="none">{text}</p>'


def note(text: str) -> str:
    """A remark below a chart or above pictures."""
    return f'<p class="note">{text}</p>'


def cards(bodies: dict[str, str]) -> str:
    """The bodies that have something in them, each under its title, side by side where there is room."""
    filled = (f'<div class="card"><h3>{title}</h3>{body}</div>' for title, body in bodies.items() if body)
    text = "".join(filled)
    return f'<div class="charts">{text}</div>' if text else ""


def html_table(head: Sequence[str], rows: str) -> str:
    """A table whose columns are a name, bars, and then numbers."""
    cells = "".join(f"<th>{text}</th>" for text in head[:2])
    cells += "".join(f'<th class="number">{text}</th>' for text in head[2:])
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>"


def bar(style: str, share: float) -> str:
    """A bar that fills a share of its cell, from 0 to 1."""
    return f'<i class="{style}" style="--share:{percent(min(max(share, 0.0), 1.0))}"></i>'


def number_cells(*texts: str) -> str:
    return "".join(f'<td class="number">{text}</td>' for text in texts)


def title(name: str) -> str:
    """A name from a file, readable and safe in HTML."""
    return html.escape(name.replace("_", " "))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
