"""The tiny shapes world: what a prompt may ask for, and scenes that show it.

A miniature of GenEval (arXiv 2310.11513): coloured shapes on a light background, prompts in its categories, and metadata
in its format, so that a verifier can decide exactly whether an image is what was asked for:

    {"prompt": "a red circle left of a blue square", "tag": "position",
     "include": [{"class": "circle", "color": "red", "count": 1},
                 {"class": "square", "color": "blue", "count": 1}], "relation": "left of"}

`python -m fastgrpo.tiny.world` writes `prompts/train.jsonl` and `prompts/eval.jsonl`. What is kept for evaluation is a
combination, not a wording: if "a red circle left of a blue square" is held out, so is "a blue square right of a red circle".
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLORS = {"red": (214, 40, 40), "green": (36, 160, 70), "blue": (40, 84, 214), "yellow": (244, 196, 30)}
SHAPES = ("circle", "square", "triangle")
NUMBERS = ("one", "two", "three", "four")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # (dx, dy) of the first object
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TAGS = ("single_object", "two_object", "counting", "position", "color_attr")
PROMPTS = Path(__file__).parent / "prompts"

IMAGE_SIZE = 32  # pixels
GRID = 2  # objects stand in the cells of a GRID x GRID grid: room for the four that a prompt may count
CELL = IMAGE_SIZE / GRID
JITTER = 1.2  # pixels that a centre may leave the middle of its cell
RADIUS = (4.8, 6.0)  # pixels: with the jitter two neighbours stay 1.6 pixels apart, so their components never touch


@dataclass(frozen=True)
class Shape:
    """One object of a scene: a shape with its centre and radius in pixels, y pointing down."""

    name: str
    color: str
    x: float
    y: float
    radius: float


def _item(shape: str, color: str | None = None, count: int = 1) -> dict:
    item = {"class": shape, "count": count}
    return item if color is None else {"class": shape, "color": color, "count": count}


def _record(prompt: str, tag: str, include: list[dict], **more: str) -> dict:
    return {"prompt": prompt, "tag": tag, "include": include, **more}


def all_prompts() -> list[list[dict]]:
    """Every combination of the world; a combination lists its wordings, which all mean the same set of scenes."""
    things = list(itertools.product(COLORS, SHAPES))
    combinations = []
    for color, shape in things:
        combinations.append([_record(f"a {color} {shape}", "single_object", [_item(shape, color)])])
    for (color, shape), other in itertools.product(things, SHAPES):
        if shape == other:
            continue
        named, plain = _item(shape, color), _item(other)
        combinations.append(
            [
                _record(f"a {color} {shape} and a {other}", "two_object", [named, plain]),
                _record(f"a {other} and a {color} {shape}", "two_object", [plain, named]),
            ]
        )
    for (count, word), (color, shape) in itertools.product(enumerate(NUMBERS, 1), things):
        prompt = f"{word} {color} {shape}{'s' * (count > 1)}"
        combinations.append([_record(prompt, "counting", [_item(shape, color, count)])])
    for (c1, s1), (c2, s2) in itertools.combinations(things, 2):
        if c1 == c2 or s1 == s2:
            continue
        first, second = _item(s1, c1), _item(s2, c2)
        combinations.append(
            [
                _record(f"a {c1} {s1} and a {c2} {s2}", "color_attr", [first, second]),
                _record(f"a {c2} {s2} and a {c1} {s1}", "color_attr", [second, first]),
            ]
        )
        for relation, inverse in INVERSE.items():
            combinations.append(
                [
                    _record(f"a {c1} {s1} {relation} a {c2} {s2}", "position", [first, second], relation=relation),
                    _record(f"a {c2} {s2} {inverse} a {c1} {s1}", "position", [second, first], relation=inverse),
                ]
            )
    return combinations


def split_prompts(held_out: float = 0.2, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Training and evaluation prompts. A fifth of each category's combinations is never trained on, in any wording."""
    rng = np.random.default_rng(seed)
    train, evaluation = [], []
    for tag in TAGS:
        combinations = [c for c in all_prompts() if c[0]["tag"] == tag]
        kept = set(rng.permutation(len(combinations))[: round(held_out * len(combinations))].tolist())
        for i, wordings in enumerate(combinations):
            (evaluation if i in kept else train).extend(wordings)
    # "a red circle" and "one red circle" are of two categories and mean the same.
    held = {meaning(record) for record in evaluation}
    return [record for record in train if meaning(record) not in held], evaluation


def meaning(record: dict) -> tuple:
    """What a record asks for, whatever its wording: equal for "A left of B" and "B right of A"."""
    items = [(item["class"], item.get("color"), item["count"]) for item in record["include"]]
    relation = record.get("relation")
    if relation in ("right of", "below"):
        items, relation = items[::-1], INVERSE[relation]
    return (tuple(items), relation) if relation else (frozenset(items), None)


def words() -> list[str]:
    """The vocabulary of the world, for the tokenizers."""
    return sorted({word for wordings in all_prompts() for record in wordings for word in record["prompt"].split()})


def sample_scene(record: dict, rng: np.random.Generator) -> list[Shape]:
    """A random scene that satisfies `record`; what the prompt leaves open (a colour, where things stand) is drawn."""
    wanted = [item for item in record["include"] for _ in range(item["count"])]
    cells = _sample_cells(len(wanted), record.get("relation"), rng)
    return [_shape_in_cell(item, cell, rng) for item, cell in zip(wanted, cells, strict=True)]


def _shape_in_cell(item: dict, cell: tuple[int, int], rng: np.random.Generator) -> Shape:
    color = item.get("color") or str(rng.choice(list(COLORS)))
    x, y = ((c + 0.5) * CELL + rng.uniform(-JITTER, JITTER) for c in cell)
    return Shape(item["class"], color, x, y, rng.uniform(*RADIUS))


def _sample_cells(count: int, relation: str | None, rng: np.random.Generator) -> list[tuple[int, int]]:
    cells = list(itertools.product(range(GRID), repeat=2))
    if relation is None:
        return [cells[i] for i in rng.permutation(len(cells))[:count]]
    pairs = [(a, b) for a in cells for b in cells if relation_holds(relation, a[0] - b[0], a[1] - b[1])]
    return list(pairs[rng.integers(len(pairs))])


def relation_holds(relation: str, dx: float, dy: float) -> bool:
    """Whether something displaced by (dx, dy) from another stands in `relation` to it: the larger offset decides."""
    ux, uy = RELATIONS[relation]
    along, across = (dx * ux, dy) if ux else (dy * uy, dx)
    return along > abs(across)


def write_prompts(folder: Path = PROMPTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in zip(("train", "eval"), split_prompts(), strict=True):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_prompts()
