"""How the pipeline of the tiny text world is pretrained."""

import numpy as np

from fastgrpo.tiny.recipe import Recipe, Stage
from fastgrpo.tiny.text.render import render
from fastgrpo.tiny.text.world import ALPHABET, COLUMNS, IMAGE_SIZE, sample_line, split_prompts, words

CONFUSED = dict(zip(ALPHABET, ALPHABET[1:] + ALPHABET[:1], strict=True))  # the character that is drawn in place of one


def mislabel(record: dict, rng: np.random.Generator) -> dict:
    """What is really shown under a wrong caption: a character of the text confused, missing, doubled or swapped."""
    text = record["text"]
    kind = rng.choice(["confused", "missing", "doubled", "swapped"], p=[0.4, 0.2, 0.1, 0.3])
    i = int(rng.integers(len(text) - 1))
    swapped = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    if kind == "swapped" and swapped != text:
        return {**record, "text": swapped}
    i = int(rng.integers(len(text)))
    if kind == "missing":
        return {**record, "text": text[:i] + text[i + 1 :]}
    if kind == "doubled" and len(text) < COLUMNS:
        return {**record, "text": text[: i + 1] + text[i:]}
    return {**record, "text": text[:i] + CONFUSED[text[i]] + text[i + 1 :]}


RECIPE = Recipe(
    split_prompts=split_prompts,
    words=words,
    max_tokens=12,
    draw=lambda record, rng: render(sample_line(record, rng)),
    image_size=IMAGE_SIZE,
    mislabel=mislabel,
    tag_share=dict(two=0.2, three=0.35, four=0.45),
    stages=(
        Stage(6000, 1.5e-3, dict(two=1.0, three=1.0, four=1.0)),
        Stage(1500, 5.0e-4, dict(two=0.35, three=0.3, four=0.15)),
    ),
    heads=3,
)
