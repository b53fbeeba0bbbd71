"""The tiny text world: what a prompt may ask for, and lines of text that show it.

A miniature of the text rendering task of Flow-GRPO (arXiv 2505.05470): prompts quote two to four characters, which the image
must show, in any ink and anywhere.

    {"prompt": "a sign that says \"kan7\"", "tag": "four", "text": "kan7"}

`python -m fastgrpo.tiny.text.world` writes `prompts/train.jsonl` and `prompts/eval.jsonl`, samples of the two sides of a
split of all strings there are.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgrpo.tiny.world import COLORS

ALPHABET = "aeklnotuyz47"
LENGTHS = {"two": 2, "three": 3, "four": 4}  # characters, by tag
TEMPLATE = 'a sign that says "{}"'
PROMPTS = Path(__file__).parent / "prompts"
LINES = {"train": 600, "eval": 100}  # of a prompt file, a tag, at most

COLUMNS = 4
CELL = (16, 8)  # pixels, (height, width): a character fills whole tokens of the transformer, which are 8 x 8 pixels
IMAGE_SIZE = (CELL[0], COLUMNS * CELL[1])
JITTER = 0.5  # pixels that a line may leave its place: a character stays within its cell


@dataclass(frozen=True)
class Line:
    """A text in one ink from a column on, moved by (dx, dy) pixels, y pointing down."""

    text: str
    ink: str
    column: int
    dx: float
    dy: float


def split_prompts(held_out: float = 0.2, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Training and evaluation prompts: a fifth of the strings of each length is never trained on. Both in random order."""
    rng = np.random.default_rng(seed)
    train, evaluation = [], []
    for tag, length in LENGTHS.items():
        texts = ["".join(characters) for characters in itertools.product(ALPHABET, repeat=length)]
        records = [{"prompt": TEMPLATE.format(text), "tag": tag, "text": text} for text in rng.permutation(texts).tolist()]
        held = round(held_out * len(records))
        evaluation += records[:held]
        train += records[held:]
    return train, evaluation


def words() -> list[str]:
    """The vocabulary of the world, for the tokenizers: the template's words and each character by itself."""
    return sorted({*TEMPLATE.format(" ").replace('"', ' " ').split(), *ALPHABET})


def sample_line(record: dict, rng: np.random.Generator) -> Line:
    """A random line that shows the record's text."""
    text = record["text"]
    column = int(rng.integers(COLUMNS - len(text) + 1))
    return Line(text, str(rng.choice(list(COLORS))), column, rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER))


def write_prompts(folder: Path = PROMPTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for (name, most), records in zip(LINES.items(), split_prompts(), strict=True):
        chosen = [r for tag in LENGTHS for r in [r for r in records if r["tag"] == tag][:most]]
        text = "".join(json.dumps(record) + "\n" for record in chosen)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_prompts()
