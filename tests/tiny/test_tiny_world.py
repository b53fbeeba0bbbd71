"""The tiny world: its prompts and their split, its scenes, and what its pretraining makes of them."""

import itertools
import json
import re

import numpy as np
import pytest

from fastgrpo.tiny import world
from fastgrpo.tiny.pretrain import make_tokenizer
from fastgrpo.tiny.recipe import RECIPE, mislabel
from fastgrpo.tiny.render import BACKGROUND, render
from fastgrpo.tiny.verify import score
from fastgrpo.tiny.world import COLORS, SHAPES, TAGS, Shape, sample_scene, split_prompts, words, write_prompts

NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
OPPOSITE = {"right of": "left of", "below": "above"}
OBJECT = r"(a|one|two|three|four) (?:(red|green|blue|yellow) )?(circle|square|triangle)(s?)"
GRAMMAR = re.compile(rf"^{OBJECT}(?: (and|left of|right of|above|below) {OBJECT})?$")
TRAIN, EVAL = split_prompts()
PROMPTS = TRAIN + EVAL


def parse(prompt: str) -> tuple[list[tuple], str | None]:
    """The objects (shape, colour, count) in their order, and the relation: read from the words alone."""
    match = GRAMMAR.match(prompt)
    assert match, f"not in the grammar: {prompt!r}"
    n1, c1, s1, p1, link, n2, c2, s2, p2 = match.groups()
    assert bool(p1) == (NUMBERS[n1] > 1) and not p2 and n2 in (None, "a")
    objects = [(s1, c1, NUMBERS[n1])] + ([(s2, c2, 1)] if s2 else [])
    return objects, None if link in (None, "and") else link


def meaning(prompt: str) -> tuple:
    """Equal for two prompts exactly when they ask for the same scenes: order and wording do not matter."""
    objects, relation = parse(prompt)
    if relation in OPPOSITE:
        objects, relation = objects[::-1], OPPOSITE[relation]
    return (tuple(objects) if relation else tuple(sorted(objects, key=str)), relation)


def shows(scene: list[Shape], record: dict) -> bool:
    """Whether a scene is what the prompt's words ask for, decided from its shapes alone."""
    objects, relation = parse(record["prompt"])
    wanted = [(shape, color) for shape, color, count in objects for _ in range(count)]
    for order in itertools.permutations(scene):
        pairs = list(zip(order, wanted, strict=False))
        if len(scene) == len(wanted) and all(s.name == n and c in (None, s.color) for s, (n, c) in pairs):
            return relation is None or related(relation, order[0], order[1])
    return False


def related(relation: str, a: Shape, b: Shape) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    if relation in ("left of", "right of"):
        return abs(dx) > abs(dy) and (dx < 0) == (relation == "left of")
    return abs(dy) > abs(dx) and (dy < 0) == (relation == "above")


@pytest.mark.parametrize("record", PROMPTS, ids=lambda record: record["prompt"])
def test_prompt_and_record_say_the_same(record: dict) -> None:
    objects, relation = parse(record["prompt"])
    assert objects == [(item["class"], item.get("color"), item["count"]) for item in record["include"]]
    assert relation == record.get("relation") and ("relation" in record) == (record["tag"] == "position")


def test_prompts_are_distinct_and_complete() -> None:
    assert len({record["prompt"] for record in PROMPTS}) == len(PROMPTS)
    everything = {record["prompt"] for wordings in world.all_prompts() for record in wordings}
    held = {meaning(record["prompt"]) for record in EVAL}
    dropped = everything - {record["prompt"] for record in PROMPTS}
    assert 0 < len(dropped) < 10 and all(meaning(prompt) in held for prompt in dropped)
    assert {record["tag"] for record in TRAIN} == {record["tag"] for record in EVAL} == set(TAGS)
    records = itertools.chain.from_iterable(world.all_prompts())
    counts = [record["include"][0]["count"] for record in records if record["tag"] == "counting"]
    assert {n: counts.count(n) for n in set(counts)} == {n: 12 for n in (1, 2, 3, 4)}
    assert {record["relation"] for record in EVAL if "relation" in record} == set(world.RELATIONS)


def test_wordings_of_a_combination_mean_the_same_and_no_other_does() -> None:
    for tag in TAGS:
        combinations = [c for c in world.all_prompts() if c[0]["tag"] == tag]
        meanings = [{meaning(record["prompt"]) for record in wordings} for wordings in combinations]
        assert all(len(m) == 1 for m in meanings)
        assert len(set.union(*meanings)) == len(combinations)


def leaks() -> set[str]:
    trained = {meaning(record["prompt"]) for record in TRAIN}
    return {record["prompt"] for record in EVAL if meaning(record["prompt"]) in trained}


def test_no_evaluation_combination_is_trained_on() -> None:
    """In any wording and any category: "one red circle" is "a red circle"."""
    assert leaks() == set()


def test_split_is_a_fifth_of_each_category_and_repeatable() -> None:
    assert split_prompts() == (TRAIN, EVAL) and split_prompts(seed=1) != (TRAIN, EVAL)
    for tag in TAGS:
        held, total = (sum(r["tag"] == tag for r in records) for records in (EVAL, PROMPTS))
        assert held / total == pytest.approx(0.2, abs=0.04)


def test_prompt_files_are_what_the_world_writes(tmp_path) -> None:
    write_prompts(tmp_path)
    for name, records in (("train", TRAIN), ("eval", EVAL)):
        text = (world.PROMPTS / f"{name}.jsonl").read_text()
        assert text == (tmp_path / f"{name}.jsonl").read_text()
        assert [json.loads(line) for line in text.splitlines()] == records


def test_scenes_show_their_prompt_with_objects_apart_and_inside() -> None:
    rng = np.random.default_rng(1)
    for record in PROMPTS * 3:
        scene = sample_scene(record, rng)
        assert shows(scene, record), record["prompt"]
        for shape in scene:
            low, high = world.RADIUS
            assert low <= shape.radius <= high
            assert shape.radius <= min(shape.x, shape.y) and max(shape.x, shape.y) <= 32 - shape.radius
        for a, b in itertools.combinations(scene, 2):
            gap = max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius
            assert gap > 1.2


def test_what_a_prompt_leaves_open_varies() -> None:
    rng = np.random.default_rng(2)
    record = next(record for record in PROMPTS if record["tag"] == "two_object")
    plain = next(i for i, item in enumerate(record["include"]) if "color" not in item)
    scenes = [sample_scene(record, rng) for _ in range(300)]
    assert {scene[plain].color for scene in scenes} == set(COLORS)
    assert {(int(s.x // world.CELL), int(s.y // world.CELL)) for scene in scenes for s in scene} == set(
        itertools.product(range(world.GRID), repeat=2)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_rendered_area_and_colours(name: str) -> None:
    """The share of colour in an image is the shape's area; the rest is background."""
    image = render([Shape(name, "blue", 16.2, 15.7, 6.0)]).astype(float)
    axis = np.float64(COLORS["blue"]) - BACKGROUND
    area = ((image - BACKGROUND) @ axis / (axis @ axis)).sum()
    expected = {"circle": np.pi * 36, "square": (1.8 * 6) ** 2, "triangle": 2 * 36.0}[name]
    assert area == pytest.approx(expected, rel=0.03)
    assert (image[0, 0] == BACKGROUND).all() and (image[15, 15] == COLORS["blue"]).all()


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="'star'"):
        render([Shape("star", "red", 16, 16, 4)])


def test_tokenizer_has_a_token_for_each_word_and_round_trips() -> None:
    tokenizer = make_tokenizer(RECIPE)
    single = {word: tokenizer(word, add_special_tokens=False).input_ids for word in words()}
    assert all(len(ids) == 1 for ids in single.values())
    assert len({ids[0] for ids in single.values()}) == len(words())
    encoded = tokenizer([record["prompt"] for record in PROMPTS]).input_ids
    for record, ids in zip(PROMPTS, encoded, strict=True):
        inner = [single[word][0] for word in record["prompt"].split()]
        assert ids == [tokenizer.bos_token_id, *inner, tokenizer.eos_token_id] and len(ids) <= RECIPE.max_tokens
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == record["prompt"]
    assert tokenizer.unk_token_id not in {i for ids in encoded for i in ids[1:-1]}


@pytest.mark.slow
@pytest.mark.parametrize("tag", TAGS)
def test_mislabel_changes_what_is_true(tag: str) -> None:
    rng = np.random.default_rng(3)
    records = [record for record in PROMPTS if record["tag"] == tag]
    passed = 0
    for n in range(300):
        record = records[n % len(records)]
        before = json.dumps(record)
        changed = mislabel(record, rng)
        assert json.dumps(record) == before and changed["prompt"] == record["prompt"]
        for item in changed["include"]:
            assert item["class"] in SHAPES and 1 <= item["count"] <= 4
            assert item.get("color", "red") in COLORS
        assert changed.get("relation") in (None, *world.RELATIONS) and set(changed) == set(record)
        scene = sample_scene(changed, rng)
        assert not shows(scene, record)
        image = render(scene)
        passed += score(image, record)[0]
        assert score(image, changed) == (1.0, 1.0)
    assert passed <= 3
