import json
from pathlib import Path

import numpy as np
import pytest

from fastgrpo.prompts import check_held_out, load_prompts, prompts_of_iteration


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
