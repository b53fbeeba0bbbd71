"""The report's pictures: the same prompts drawn before and after training, and over time. They lie inside the page."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from fastgrpo.data.pictures import load_picture
from fastgrpo.reporting.markup import note, sentence, title
from fastgrpo.reporting.saved_run import SavedRun

MAX_PAIRS, MAX_STRIPS, MAX_FRAMES = 24, 6, 6  # samples shown: before and after, over time, and in one strip
SMALL_IMAGE, LARGE_IMAGE = 128, 384  # pixels: below it shown as squares, above it shrunk


def samples(run: SavedRun) -> str:
    """Base and newest side by side; the only images there are, where nothing was trained."""
    if not run.samples:
        return sentence("There are no samples.")
    first, last = min(run.samples), max(run.samples)
    newest = "trained" if run.summary else f"iteration {last}"
    labels = {first: _label(first), last: newest} if first < last else {first: ""}
    strips = [_strip(run, n, labels) for n in _spread(run.images_in_all(list(labels)), MAX_PAIRS)]
    if not strips:
        return sentence("No sample is complete.")
    kind = " large" if any('class="photo"' in strip for strip in strips) else " single" * (first == last)
    remark = note("Only one set of samples so far.") if first == last else ""
    return f'{remark}<div class="samples{kind}">{"".join(strips)}</div>'


def film(run: SavedRun) -> str:
    """The same prompt over several iterations, for one prompt of each category."""
    iterations = _spread(list(run.samples), MAX_FRAMES)
    if len(iterations) < 3:
        return sentence("It takes samples of at least three evaluations.")
    numbers = run.images_in_all(iterations)
    by_tag = {run.prompt(n)[1]: n for n in reversed(numbers)}  # the first of each tag
    chosen = sorted(by_tag.values()) if len(by_tag) > 1 else numbers
    labels = {i: _label(i) for i in iterations}
    strips = "".join(_strip(run, n, labels) for n in _spread(chosen, MAX_STRIPS))
    if not strips:
        return sentence("No sample is complete.")
    remark = note("The first prompt of each kind; the number is the iteration.") if len(by_tag) > 1 else ""
    return f'{remark}<div class="film">{strips}</div>'


def _label(iteration: int) -> str:
    return str(iteration) if iteration else "base"


def _strip(run: SavedRun, number: int, labels: dict[int, str]) -> str:
    """One prompt's images from several iterations, side by side."""
    prompt, tag = run.prompt(number)
    frames = "".join(
        f"<div>{image}<small>{label}</small></div>"
        for iteration, label in labels.items()
        if (image := _image(run.image(iteration, number), f"{prompt} ({label})" if label else prompt))
    )
    caption = html.escape(prompt) + (f" <small>{title(tag)}</small>" if tag else "")
    return f'<figure><div class="frames">{frames}</div><figcaption>{caption}</figcaption></figure>'


def _image(path: Path, description: str) -> str:
    """An image inside the page; nothing where it cannot be read: a run may be killed while it writes one."""
    try:
        picture = load_picture(path)
    except ValueError:
        return ""
    kind = "pixels" if max(picture.size) < SMALL_IMAGE else "photo"
    shrunk = max(picture.size) > LARGE_IMAGE
    picture.thumbnail((LARGE_IMAGE, LARGE_IMAGE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if shrunk else "PNG", quality=88)
    source = f"data:image/{'jpeg' if shrunk else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img class="{kind}" alt="{html.escape(description)}" src="{source}">'


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
