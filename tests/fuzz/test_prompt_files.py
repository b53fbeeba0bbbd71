"""Prompt files: plain and JSON lines, records with images, folders of captions, GenEval's metadata and OCR's quotes."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.fuzzing import ODD_TEXTS, as_json, damaged, damages, odd_json, odd_texts, values, works_or_is_refused

from fastgrpo.commands.make_prompts import geneval_records, ocr_records
from fastgrpo.data.pictures import load_picture, load_pictures
from fastgrpo.data.prompts import IMAGE_FIELD, PromptSet, load_prompts, write_prompts
from fastgrpo.rewards import check_prompts
from fastgrpo.rewards.geneval import GenEval
from fastgrpo.rewards.ocr import OCR

LINES = [
    {"prompt": 'a sign that says "open"', "tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]},
    {"prompt": "", "m": {"n": 10**30, "x": [1e308, None, True, {"": []}]}},
    {"prompt": "é 🙂 \u2028", "tag": "two", "image": "a.png"},
]
CAT, DOG = {"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 2, "position": ["left of", 0]}
GENEVAL = {"prompt": "a photo", "tag": "position", "include": [CAT, DOG], "exclude": [{"class": "cow", "count": 3}]}
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "PCX", "TGA", "JPEG2000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a picture of each format, and a text that is none."""
    place = tmp_path_factory.mktemp("prompts")
    for kind in FORMATS:
        Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(place / f"whole.{kind}", kind)
    Image.new("RGB", (8, 8)).save(place / "a.png")
    (place / "text.png").write_text("no picture")
    os.symlink(place / "circle.png", place / "circle.png")
    return place


def check_read(file: Path, fields: tuple[str, ...] = ()) -> PromptSet | None:
    """It is read, and written again it is the same; or it is refused by its name."""
    prompts = works_or_is_refused(lambda: load_prompts(file, fields), file)
    if prompts is not None:
        again = file.with_name("again.jsonl")
        write_prompts(again, prompts.metadata)
        assert load_prompts(again, fields).metadata == prompts.metadata
    return prompts


@given(damage=damages, suffix=st.sampled_from((".txt", ".jsonl")))
def test_bytes_of_a_prompt_file(damage: list, suffix: str, folder: Path) -> None:
    file = folder / f"prompts{suffix}"
    file.write_bytes(damaged(b"\r\n".join(as_json(line) for line in LINES), damage))
    check_read(file)


@given(data=st.data())
def test_values_of_a_record(data: st.DataObject, folder: Path) -> None:
    file = folder / "values.jsonl"
    file.write_bytes(b"\n".join(as_json(odd_json(data, line)) for line in LINES))
    check_read(file)


@given(image=st.sampled_from(("a.png", "text.png", "circle.png", "./a.png", "a.png/", "a.png\0", *ODD_TEXTS)) | values)
def test_the_image_of_a_record(image: object, folder: Path) -> None:
    file = folder / "images.jsonl"
    file.write_bytes(as_json({"prompt": "a", IMAGE_FIELD: image}))
    check_read(file, (IMAGE_FIELD,))


@given(kind=st.sampled_from(FORMATS), damage=damages)
def test_bytes_of_a_picture(kind: str, damage: list, folder: Path) -> None:
    file = folder / "damaged.png"
    file.write_bytes(damaged((folder / f"whole.{kind}").read_bytes(), damage))
    picture = works_or_is_refused(lambda: load_picture(file), file)
    works_or_is_refused(lambda: load_pictures(file), file)
    assert picture is None or (picture.mode == "RGB" and picture.tobytes() is not None)


@given(
    files=st.dictionaries(
        st.sampled_from(("a.png", "a.txt", "b.PNG", "b.txt", ".c.png", "d/e.jpg", "d/e.txt", "f")), st.binary(max_size=9)
    )
)
def test_folders_of_captions(files: dict[str, bytes], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("captions")
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        picture = name[-1] in "gG" and not content.startswith(b"\0")
        (place / name).write_bytes((folder / "a.png").read_bytes() if picture else content)
    works_or_is_refused(lambda: load_prompts(place, ("target",)), place)


@given(data=st.data(), count=st.integers(1, 30))
def test_metadata_of_geneval(data: st.DataObject, count: int, folder: Path) -> None:
    file = folder / "geneval.jsonl"
    file.write_bytes(as_json(odd_json(data, odd_json(data, GENEVAL))))
    prompts = works_or_is_refused(lambda: load_prompts(file), file)
    if prompts is not None:
        works_or_is_refused(lambda: check_prompts(GenEval, "geneval", prompts.judged), file, "geneval")
        works_or_is_refused(lambda: geneval_records(prompts.metadata, count, 0, {"single_object": 1.0}))


@given(text=st.text(st.sampled_from('"“” a5\n\u200b'), max_size=12) | odd_texts)
def test_prompts_of_ocr(text: str) -> None:
    records = [{"prompt": text}]
    works_or_is_refused(lambda: check_prompts(OCR, "ocr", [("file:1", record) for record in records]), "file:1")
    works_or_is_refused(lambda: ocr_records(records, 3, 0))


def test_what_the_properties_start_from_is_good(folder: Path) -> None:
    file = folder / "good.jsonl"
    file.write_bytes(b"\n".join(as_json(line) for line in [*LINES, GENEVAL]))
    assert load_prompts(file).metadata == json.loads(json.dumps([*LINES, GENEVAL]))
    check_prompts(GenEval, "geneval", [("file:1", GENEVAL)])
    for kind in FORMATS:
        assert load_picture(folder / f"whole.{kind}").size == (24, 16)
