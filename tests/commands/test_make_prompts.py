import json
import runpy
from collections import Counter
from pathlib import Path

import pytest

from fastgrpo.commands.cli import main
from fastgrpo.commands.make_prompts import KINDS, geneval_records, lines_per_tag, meaning, ocr_records, parse_mix
from fastgrpo.data.prompts import load_prompts
from fastgrpo.rewards.geneval_rules import TAGS, check_record
from fastgrpo.rewards.ocr import target_text

FLOW_GRPO = parse_mix("position=7,counting=5,color_attr=3,colors=1,two_object=1,single_object=0")
WORDINGS = [
    ("single_object", ("umbrella",), "a photo of an umbrella"),
    ("two_object", ("orange", "tv"), "a photo of an orange and a tv"),
    ("counting", ("bench", 4), "a photo of four benches"),
    ("counting", ("wine glass", 2), "a photo of two wine glasses"),
    ("counting", ("toothbrush", 3), "a photo of three toothbrushes"),
    ("counting", ("knife", 2), "a photo of two knives"),
    ("counting", ("sheep", 2), "a photo of two sheep"),
    ("counting", ("person", 3), "a photo of three people"),
    ("counting", ("tv", 3), "a photo of three tvs"),
    ("colors", ("kite", "orange"), "a photo of an orange kite"),
    ("position", ("oven", "bed", "left of"), "a photo of an oven left of a bed"),
    ("color_attr", ("cat", "oven", "blue", "red"), "a photo of a blue cat and a red oven"),
]


@pytest.mark.parametrize(("tag", "parts", "prompt"), WORDINGS)
def test_wordings(tag: str, parts: tuple, prompt: str) -> None:
    record = KINDS[tag][0](*parts)
    assert (record["tag"], record["prompt"]) == (tag, prompt)
    check_record(record)


def test_records_ask_for_what_their_prompts_say() -> None:
    record = KINDS["position"][0]("oven", "bed", "above")
    assert record["include"] == [{"class": "bed", "count": 1}, {"class": "oven", "count": 1, "position": ["above", 0]}]
    record = KINDS["counting"][0]("bed", 2)
    assert (record["include"], record["exclude"]) == ([{"class": "bed", "count": 2}], [{"class": "bed", "count": 3}])
    record = KINDS["color_attr"][0]("cat", "oven", "blue", "red")
    assert [(c["class"], c["color"]) for c in record["include"]] == [("cat", "blue"), ("oven", "red")]


SAME = [
    (("position", "cat", "bed", "left of"), ("position", "bed", "cat", "right of")),
    (("position", "cat", "bed", "below"), ("position", "bed", "cat", "above")),
    (("two_object", "cat", "bed"), ("two_object", "bed", "cat")),
    (("color_attr", "cat", "bed", "red", "blue"), ("color_attr", "bed", "cat", "blue", "red")),
]
OTHER = [
    (("position", "cat", "bed", "left of"), ("position", "bed", "cat", "left of")),
    (("position", "cat", "bed", "left of"), ("position", "cat", "bed", "right of")),
    (("position", "cat", "bed", "left of"), ("position", "cat", "bed", "above")),
    (("position", "cat", "bed", "left of"), ("two_object", "cat", "bed")),
    (("color_attr", "cat", "bed", "red", "blue"), ("color_attr", "cat", "bed", "blue", "red")),
    (("counting", "cat", 2), ("counting", "cat", 3)),
    (("colors", "cat", "red"), ("single_object", "cat")),
]


def test_meaning_looks_through_wording() -> None:
    def of(parts: tuple) -> frozenset:
        return meaning(KINDS[parts[0]][0](*parts[1:]))

    assert all(of(a) == of(b) for a, b in SAME)
    assert all(of(a) != of(b) for a, b in OTHER)


def test_geneval_prompts_keep_shares_and_stay_clear_of_evaluation() -> None:
    evenly = dict.fromkeys(TAGS, 1.0)
    evaluation = geneval_records([], 300, seed=1, mix=evenly)
    # The other wording of each position and pair is to be left out too, and the file's order must not matter.
    records = geneval_records(evaluation, 3400, seed=0, mix=FLOW_GRPO)
    assert Counter(record["tag"] for record in records) == {
        "position": 1400,
        "counting": 1000,
        "color_attr": 600,
        "colors": 200,
        "two_object": 200,
    }
    assert not {meaning(r) for r in evaluation} & {meaning(r) for r in records}
    counting = {r["prompt"] for r in records if r["tag"] == "counting"}
    assert len(counting) == 234 - 50 and not any("skis" in p or "scissors" in p for p in counting)
    others = [r["prompt"] for r in records if r["tag"] != "counting"]
    assert len(set(others)) == len(others)
    assert len({r["tag"] for r in records[:30]}) > 2, "not shuffled"
    for record in records:
        check_record(record)


def test_what_cannot_be_made_is_refused() -> None:
    every = geneval_records([], 80, seed=0, mix=parse_mix("single_object=1"))
    assert len({r["prompt"] for r in every}) == 80
    with pytest.raises(ValueError, match="--mix single_object=1: the excluded file has every prompt of this tag; give it 0"):
        geneval_records(every, 10, seed=0, mix=parse_mix("single_object=1"))
    with pytest.raises(ValueError, match="--mix 'colour=1': expected tag=weight"):
        parse_mix("colour=1")
    with pytest.raises(ValueError, match="every weight is 0"):
        parse_mix("colors=0")
    with pytest.raises(ValueError, match='"tag" is None'):
        geneval_records([{"prompt": "a cat"}], 10, seed=0, mix=FLOW_GRPO)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 50000])
def test_shares_sum_up(count: int) -> None:
    whole = lines_per_tag(FLOW_GRPO, count)
    assert sum(whole.values()) == count and whole["single_object"] == 0
    assert all(abs(whole[tag] - count * FLOW_GRPO[tag] / 17) < 1 for tag in whole)


def test_ocr_prompts_quote_one_text_each() -> None:
    # Held out in another case and spacing than they would be written in.
    first = ocr_records([], 2000, seed=0)
    held_out = [{"prompt": f'a sign: "{" ".join(target_text(r["prompt"]).upper())}"'} for r in first[:1000]]
    records = ocr_records(held_out, 2000, seed=0)
    prompts = [r["prompt"] for r in records]
    assert len(set(prompts)) == 2000 and all(p.count('"') == 2 for p in prompts)
    assert not {target_text(r["prompt"]) for r in held_out} & {target_text(p) for p in prompts}
    lengths = Counter(len(r["prompt"].split('"')[1].split()) for r in first)
    assert set(lengths) == {1, 2, 3, 4} and min(lengths.values()) > 300


@pytest.mark.parametrize("kind", ["geneval", "ocr"])
def test_the_command_is_deterministic_and_its_files_can_be_read(kind: str, tmp_path: Path) -> None:
    def make(name: str, seed: int, *more: str) -> str:
        assert 0 == main(
            ["make-prompts", kind, "--count", "200", "--output", str(tmp_path / name), "--seed", str(seed), *more]
        )
        return (tmp_path / name).read_text(encoding="utf-8")

    first = make("a.jsonl", 0)
    assert make("b.jsonl", 0) == first != make("c.jsonl", 1)
    assert len(load_prompts(tmp_path / "a.jsonl")) == 200
    clear = [json.loads(line)["prompt"] for line in make("d.jsonl", 0, "--exclude", str(tmp_path / "a.jsonl")).splitlines()]
    assert not {json.loads(line)["prompt"] for line in first.splitlines()} & set(clear)


def test_the_command_names_the_mistake(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["make_prompts", "ocr", "--output", str(tmp_path / "a.jsonl"), "--count", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("fastgrpo.rewards.make_prompts", run_name="__main__")
    assert "argument --count: 0: must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()
