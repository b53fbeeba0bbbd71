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
    check_input_images,
    check_tags,
    given_prompts,
    load_prompts,
    prompt_probabilities,
    prompts_of_iteration,
    write_prompts,
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


DEEP = '{"a": [' * 60 + "1" + "]}" * 60
# A line of JSON that is not taken -> what is said of it.
REFUSED = {
    r'{"prompt": "half a \ud83d face"}': r"prompt: \\ud83d is half of a character \(a lone surrogate\)",
    r'{"prompt": "a", "include": [{"class": "\udc00"}]}': r"include\[0\]\.class: \\udc00 is half of a character",
    r'{"prompt": "a", "m": {"\ud800": 1}}': r"a key: \\ud800 is half",
    '{"prompt": "a", "x": NaN}': "NaN is not JSON",
    '{"prompt": "a", "x": [{"y": -Infinity}]}': "-Infinity is not JSON",
    '{"prompt": "a", "x": 1e400}': "the number 1e400 is larger than any float",
    '{"prompt": "a", "x": -%s}' % ("9" * 4000): "a whole number of more than 1000 digits",
    '{"prompt": "a", "x": %s}' % ("9" * 9000): "a whole number of more than 1000 digits",
    '{"prompt": "a", "x": ' + DEEP + "}": r"x\.a\[0\]\.a.*: objects and lists in one another more than 100 deep",
    '{"prompt": "a", "x": %s}' % ("[" * 90000 + "]" * 90000): "objects and lists in one another more than 100 deep",
    '{"prompt": "a", "prompt": "b"}': "the key 'prompt' stands twice in one object",
    '{"prompt": "a", "m": [{"x": 1, "y": 2, "x": 1}]}': "the key 'x' stands twice in one object",
    '{"prompt": "a", "tag": ["animal"]}': r"tag = \['animal'\]: names the prompt's category; give a text",
    '{"prompt": "a", "tag": 3}': "tag = 3",
    '{"prompt": "a", "tag": null}': "tag = None",
    '{"prompt": " \\t"}': r"prompt = ' \\t': is blank",
    '{"prompt": null}': 'expected an object with a text as its "prompt", found',
    '{"text": "a"}': 'expected an object with a text as its "prompt", found',
    '"a cat"': 'expected an object with a text as its "prompt", found',
    '[{"prompt": "a"}]': "a list; write one object a line, for example with jq",
    '{"prompt": "a"} {"prompt": "b"}': "not JSON .*; write one object a line",
    "a cat": r"not JSON .*; a file of plain prompts is called \.txt",
}


@pytest.mark.parametrize("line", REFUSED, ids=[why[:30] for why in REFUSED.values()])
def test_a_line_that_something_could_not_take_later_is_refused_with_its_place(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a dog"}\n\n' + line + '\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: {REFUSED[line]}") as refusal:
        load_prompts(tmp_path / "a.jsonl")
    assert len(str(refusal.value)) < 600 and "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [[{"prompt": "a"}, {"prompt": "b"}], {"prompt": "a"}])
def test_json_over_several_lines_is_called_what_it_is(value: object, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value, indent=2))
    with pytest.raises(ValueError, match=r"a\.json:1: one value of JSON over several lines; write one object a line"):
        load_prompts(tmp_path / "a.json")


def test_what_json_can_say_is_taken_as_it_is(tmp_path: Path) -> None:
    texts = ["", "nul \0", "a\u2028b\x85c\x0cd", "tab\tand\r\nline", "é e\u0301", "🙂", " spaces ", '</script> "quotes"']
    records = [{"prompt": text, "tag": "t", "m": {"n": 10**30, "x": [1e308, None, True, {"": []}]}} for text in texts]
    for name, plain in (("a.jsonl", True), ("b.jsonl", False)):
        text = "\r\n".join(json.dumps(record, ensure_ascii=plain) for record in records)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        loaded = load_prompts(tmp_path / name)
        assert loaded.metadata == records == given_prompts(records).metadata and loaded.prompts == texts
        assert list(loaded.places) == [f"{tmp_path / name}:{i}" for i in range(1, len(texts) + 1)]
    write_prompts(tmp_path / "c.jsonl", records)
    assert load_prompts(tmp_path / "c.jsonl").metadata == records


def test_plain_prompts_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_bytes("\ufeffone\u2028a\x0cb\r\n \r\n two\x1dtoo \n".encode())
    loaded = load_prompts(tmp_path / "a.TXT")
    assert loaded.prompts == ["one\u2028a\x0cb", "two\x1dtoo"]
    assert list(loaded.places) == [f"{tmp_path / 'a.TXT'}:1", f"{tmp_path / 'a.TXT'}:3"]
    with pytest.raises(ValueError, match=r"b\.Txt: JSON lines are written, .* call it \.jsonl"):
        write_prompts(tmp_path / "b.Txt", [])


class Box:
    def __repr__(self) -> str:
        return "a box"


circle: dict = {"prompt": "a"}
circle["m"] = [circle]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a cat", "no prompts were given"),
        ({"prompt": "a cat"}, "no prompts were given"),
        ([], "no prompts were given"),
        (["a", 3], r'prompt 1: expected an object with a text as its "prompt", found 3'),
        (["a", "half \ud83d"], r"prompt 1: prompt: \\ud83d is half of a character"),
        (["a", "  "], r"prompt 1: prompt = '  ': is blank"),
        ([{"prompt": "a", "m": {1: 2}}], r"prompt 0: m: the key 1 is no text"),
        ([{"prompt": "a", "m": float("nan")}], r"prompt 0: m = nan: is not a number that JSON has"),
        ([{"prompt": "a", "m": [Box()]}], r"prompt 0: m\[0\] = a box: JSON has no Box"),
        ([{"prompt": "a", "m": 10**5000}], r"prompt 0: m: a whole number of more than 1000 digits"),
        ([{"prompt": "a", "tag": ("x",)}], r"prompt 0: tag = \('x',\)"),
        ([circle], r"prompt 0: .* more than 100 deep"),
    ],
)
def test_prompts_from_a_program_are_looked_at_in_the_same_way(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_prompts(given)


def test_images_of_prompts_from_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to where the program runs, and absolute from then on: the run keeps them in another folder."""
    Image.new("RGB", (9, 5), "red").save(tmp_path / "good.png")
    monkeypatch.chdir(tmp_path)
    given = [{"prompt": "make it blue", "image": "good.png"}]
    assert given_prompts(given, [IMAGE_FIELD]).metadata == [{"prompt": "make it blue", "image": str(tmp_path / "good.png")}]
    with pytest.raises(ValueError, match=r"prompt 1: image .*/none\.png: no such file"):
        given_prompts([*given, {"prompt": "a", "image": "none.png"}], [IMAGE_FIELD])


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


def test_input_images_lie_beside_their_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edits(tmp_path, {"prompt": "make it blue", "image": "good.png"})
    loaded = load_prompts(path, image_fields=[IMAGE_FIELD])
    assert as_prompt(loaded.metadata[0], True) == ImagePrompt("make it blue", (tmp_path / "good.png",))
    assert as_prompt(loaded.metadata[0], False) == "make it blue"
    assert load_prompts(path).metadata == [{"prompt": "make it blue", "image": "good.png"}]  # another model's business
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = load_prompts(edits(tmp_path, {"prompt": "make it blue", "image": "~/good.png"}), image_fields=[IMAGE_FIELD])
    assert at_home.metadata == loaded.metadata


def test_a_prompt_may_come_with_several_images_in_their_order(tmp_path: Path) -> None:
    Image.new("RGB", (9, 5), "green").save(tmp_path / "other.png")
    path = edits(tmp_path, {"prompt": "put them together", "image": ["other.png", "good.png"]})
    loaded = load_prompts(path, image_fields=[IMAGE_FIELD])
    files = (tmp_path / "other.png", tmp_path / "good.png")
    assert as_prompt(loaded.metadata[0], True) == ImagePrompt("put them together", files)
    check_input_images(loaded, range(1, 4), "qwen_image_edit_plus")
    with pytest.raises(ValueError, match=r'edits\.jsonl:1: "image" has 2 images, and flux_kontext reads 1'):
        check_input_images(loaded, range(1, 2), "flux_kontext")
    with pytest.raises(ValueError, match=r'edits\.jsonl:1: "image" has 2 images, and it reads 3 to 4'):
        check_input_images(loaded, range(3, 5), "it")
    with pytest.raises(ValueError, match=r"edits\.jsonl:1: image = 'none\.png': .*no such file"):
        load_prompts(edits(tmp_path, {"prompt": "a", "image": ["good.png", "none.png"]}), image_fields=[IMAGE_FIELD])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "b", "image": []}, r"edits\.jsonl:2: every prompt needs an image"),
        ({"prompt": "b"}, r'edits\.jsonl:2: every prompt needs an image here: give "image"'),
        ({"prompt": "b", "image": 3}, r"edits\.jsonl:2: every prompt needs an image"),
        ({"prompt": "b", "image": "none.png"}, r"edits\.jsonl:2: image .*none\.png: no such file"),
        ({"prompt": "b", "image": "broken.png"}, r"edits\.jsonl:2: image .*broken\.png: cannot be read"),
        ({"prompt": "b", "image": "a\0.png"}, r"edits\.jsonl:2: image = 'a\\x00\.png': embedded null"),
        ({"prompt": "b", "image": "~nobody-at-all/a.png"}, r"edits\.jsonl:2: image .*/~nobody-at-all/a\.png: no such file"),
        ({"prompt": "b", "image": "x" * 5000}, r"edits\.jsonl:2: image .*: no such file"),
        ({"prompt": "b", "image": ""}, r"edits\.jsonl:2: image .*: no such file"),
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


def test_an_image_outside_of_the_files_folder_is_taken_only_where_that_is_allowed(tmp_path: Path) -> None:
    folder, secret = tmp_path / "prompts", tmp_path / "secret.png"
    (folder / "in").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(secret)
    Image.new("RGB", (8, 8)).save(folder / "in" / "a.png")
    (folder / "link.png").symlink_to(secret)
    (folder / "near.png").symlink_to("in/a.png")
    file = folder / "a.jsonl"
    for inside in ("in/a.png", "./in/../near.png", str(folder / "in" / "a.png")):
        file.write_text(json.dumps({"prompt": "a", "image": inside}))
        assert load_prompts(file, ["image"]).metadata[0]["image"] == str(folder / "in" / "a.png")
    for outside in ("../secret.png", str(secret), "link.png", "in/../../secret.png"):
        file.write_text("\n" + json.dumps({"prompt": "a", "image": outside}))
        with pytest.raises(ValueError, match=r"a\.jsonl:2: image = '.*': leads out of .*prompts\.images_outside: true"):
            load_prompts(file, ["image"])
        assert load_prompts(file, ["image"], images_outside=True).metadata[0]["image"] == str(secret)


def test_captions_and_images_that_are_links_out_of_their_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "secret").write_text("root:x:0")
    (folder / "a.png").write_bytes((tmp_path / "a.png").read_bytes())
    (folder / "a.txt").symlink_to(tmp_path / "secret")
    for linked in ("a.txt", "a.png"):
        with pytest.raises(ValueError, match=rf"{linked}.*: leads out of .*prompts\.images_outside: true"):
            load_prompts(folder, ["target"])
        assert load_prompts(folder, ["target"], images_outside=True).prompts == ["root:x:0"]
        (folder / "a.txt").unlink(missing_ok=True)
        (folder / "a.txt").write_text("root:x:0")
        (folder / "a.png").unlink()
        (folder / "a.png").symlink_to(tmp_path / "a.png")
