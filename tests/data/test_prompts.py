import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgrpo.data.prompts import (
    IMAGE_FIELD,
    ImagePrompt,
    PromptSet,
    as_prompt,
    check_held_out,
    check_tags,
    load_prompts,
    prompt_probabilities,
    prompts_of_iteration,
)


def test_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n  two dogs \n")
    assert load_prompts(tmp_path / "a.txt").prompts == ["a cat", "two dogs"]
    records = [{"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]}, {"prompt": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    loaded = load_prompts(tmp_path / "a.jsonl")
    assert loaded.metadata == records and len(loaded) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\na cat\n', r":2: not JSON"),
        ('{"prompt": 3}', r':1: expected .* "prompt"'),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)
    with pytest.raises(ValueError, match="no such prompt file"):
        load_prompts(tmp_path / "b.jsonl")


def test_evaluation_prompts_may_not_be_trained_on(tmp_path: Path) -> None:
    for name, text in (("train", "a\nb\n"), ("eval", "c\nb\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    train, evaluation = (load_prompts(tmp_path / f"{name}.txt") for name in ("train", "eval"))
    with pytest.raises(ValueError, match="'b'"):
        check_held_out(train, evaluation)
    check_held_out(train, train.__class__(["c"], [{}]))


def test_a_category_may_not_be_called_as_the_mean_over_all(tmp_path: Path) -> None:
    """Its score would take the mean's place in every evaluation."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a cat", "tag": "animals"}\n{"prompt": "b", "tag": "all"}\n{"prompt": "c"}\n')
    check_tags(load_prompts(path))
    path.write_text('{"prompt": "a cat", "tag": "animals"}\n{"prompt": "a dog", "tag": "overall"}\n')
    with pytest.raises(ValueError, match="the prompt 'a dog' has the tag 'overall', .* rename it"):
        check_tags(load_prompts(path))


def edits(folder: Path, *records: dict) -> Path:
    """A prompt file of records, beside a good picture and a broken one."""
    Image.new("RGB", (9, 5), "red").save(folder / "good.png")
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:40])
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_input_images_lie_beside_their_prompts(tmp_path: Path) -> None:
    path = edits(tmp_path, {"prompt": "make it blue", "image": "good.png"})
    loaded = load_prompts(path, image_fields=[IMAGE_FIELD])
    assert as_prompt(loaded.metadata[0], True) == ImagePrompt("make it blue", tmp_path / "good.png")
    assert as_prompt(loaded.metadata[0], False) == "make it blue"
    assert load_prompts(path).metadata == [{"prompt": "make it blue", "image": "good.png"}]  # another model's business


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "b"}, r'edits\.jsonl:2: every prompt needs an image here: give "image"'),
        ({"prompt": "b", "image": 3}, r"edits\.jsonl:2: every prompt needs an image"),
        ({"prompt": "b", "image": "none.png"}, r"edits\.jsonl:2: image .*none\.png: no such file"),
        ({"prompt": "b", "image": "broken.png"}, r"edits\.jsonl:2: image .*broken\.png: cannot be read"),
        ({"prompt": "b", "image": "edits.jsonl"}, r"edits\.jsonl:2: image .*: cannot be read"),
    ],
)
def test_a_missing_or_broken_image_is_refused_with_its_line(tmp_path: Path, record: dict, message: str) -> None:
    path = edits(tmp_path, {"prompt": "a", "image": "good.png"}, record)
    with pytest.raises(ValueError, match=message):
        load_prompts(path, image_fields=[IMAGE_FIELD])


def test_the_same_words_about_another_image_are_another_prompt(tmp_path: Path) -> None:
    one = load_prompts(edits(tmp_path, {"prompt": "make it blue", "image": "good.png"}), image_fields=[IMAGE_FIELD])
    Image.new("RGB", (9, 5), "green").save(tmp_path / "other.png")
    other = PromptSet(one.prompts, [{"prompt": "make it blue", "image": str(tmp_path / "other.png")}])
    check_held_out(one, other)
    with pytest.raises(ValueError, match="'make it blue'"):
        check_held_out(one, one)


@pytest.mark.parametrize(("num_prompts", "groups"), [(7, 3), (5, 8), (1, 4)])
def test_every_prompt_has_its_turn(num_prompts: int, groups: int) -> None:
    """Any `num_prompts` draws in a row from the start of a shuffle are all the prompts, across iterations."""
    drawn = np.concatenate([prompts_of_iteration(num_prompts, groups, i, seed=3) for i in range(2 * num_prompts)])
    for epoch in drawn.reshape(-1, num_prompts):
        assert sorted(epoch) == list(range(num_prompts))


def test_order_is_a_function_of_seed_and_iteration() -> None:
    first = [prompts_of_iteration(100, 16, i, seed=0) for i in range(8)]
    assert np.array_equal(prompts_of_iteration(100, 16, 5, seed=0), first[5])
    assert not np.array_equal(prompts_of_iteration(100, 16, 5, seed=1), first[5])
    epochs = np.concatenate([prompts_of_iteration(100, 100, i, seed=0) for i in range(2)]).reshape(2, 100)
    assert not np.array_equal(*epochs)


def tagged(**counts: int) -> PromptSet:
    records = [{"prompt": f"{tag} {i}", "tag": tag} for tag, count in counts.items() for i in range(count)]
    return PromptSet([record["prompt"] for record in records], records)


def test_weights_decide_how_often_a_category_comes() -> None:
    """However many prompts it has; each iteration's prompts differ, and depend on nothing but its number."""
    prompts = tagged(rare=20, common=300, never=50)
    probabilities = prompt_probabilities(prompts, {"rare": 1, "common": 3, "never": 0}, groups=4)
    drawn = [prompts_of_iteration(370, 4, i, seed=1, probabilities=probabilities) for i in range(3000)]
    assert all(len(set(each.tolist())) == 4 for each in drawn)
    tags = np.array([record["tag"] for record in prompts.metadata])[np.concatenate(drawn)]
    assert abs((tags == "rare").mean() - 0.25) < 0.02 and not (tags == "never").any()
    assert set(np.concatenate(drawn).tolist()) == set(range(320))
    assert np.array_equal(drawn[7], prompts_of_iteration(370, 4, 7, seed=1, probabilities=probabilities))
    assert not np.array_equal(drawn[7], prompts_of_iteration(370, 4, 7, seed=2, probabilities=probabilities))
    assert prompt_probabilities(prompts, {}, groups=4) is None


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"rare": 1, "commn": 1}, r"prompts\.weights\.commn: no prompt has this tag; there are rare, common"),
        ({"rare": 1}, r"prompts\.weights: common has no weight, and 30 prompts; give it 0"),
        ({"rare": -1, "common": 1}, r"prompts\.weights\.rare = -1: a weight is finite and not negative"),
        ({"rare": float("nan"), "common": 1}, r"prompts\.weights\.rare = nan"),
        ({"rare": 1, "common": 0}, r"rollout\.groups = 4: only 2 prompts have a weight above 0"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_probabilities(tagged(rare=2, common=30), weights, groups=4)
