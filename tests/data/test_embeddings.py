"""Embeddings: made once a prompt, in memory or on disk, and the same bits from either."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from support.files import seen_alike
from support.tiny_model import load_tiny_model

from fastgrpo.data import embeddings as module
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.models import load_model
from fastgrpo.records import Prompted
from fastgrpo.testing import FAMILIES, load_family

PROMPTS = ["a red circle", "two blue squares", "a red circle"]


class Counting:
    """The model, counting what it is asked to encode."""

    def __init__(self, model) -> None:
        self.model, self.asked = model, []

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def encode(self, prompts: list[str]):
        self.asked += prompts
        return self.model.encode(prompts)


def equal(a: tuple | None, b: tuple | None) -> bool:
    if isinstance(a, Prompted) and isinstance(b, Prompted):
        return equal(a.cond, b.cond) and equal(a.uncond, b.uncond)
    if a is None or b is None:
        return a is b
    return type(a) is type(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_from_disk_they_are_the_same_bits(tiny_model, tmp_path: Path, guidance_scale: float) -> None:
    model = Counting(tiny_model)
    expected = Embeddings(tiny_model).prompted(PROMPTS, guidance_scale)
    Embeddings(model, tmp_path).prepare(["", *PROMPTS], show=False)
    assert sorted(model.asked) == ["", "a red circle", "two blue squares"]
    found = Embeddings(model, tmp_path).prompted(PROMPTS, guidance_scale)  # as another process would
    assert equal(found, expected) and len(model.asked) == 3
    assert not list(tmp_path.rglob("*.partial"))


def test_a_prompt_that_was_not_prepared_is_encoded_and_kept(tiny_model, tmp_path: Path) -> None:
    model = Counting(tiny_model)
    for _ in range(2):
        Embeddings(model, tmp_path).prompted(["one green square"], 1.0)
    assert model.asked == ["one green square"]


def test_other_encoders_or_settings_have_other_files(tmp_path: Path) -> None:
    """A file is only ever read for exactly what it was made from."""
    model = load_tiny_model()
    Embeddings(model, tmp_path).prompted(["a red circle"], 1.0)
    with torch.no_grad():
        next(model.pipeline.text_encoder.parameters()).mul_(1.01)
    counting = Counting(model)
    Embeddings(counting, tmp_path).prompted(["a red circle"], 1.0)
    assert counting.asked == ["a red circle"]
    model.settings = replace(model.settings, max_text_tokens=2)
    Embeddings(counting, tmp_path).prompted(["a red circle"], 1.0)
    assert counting.asked == ["a red circle"] * 2


def test_an_image_is_known_by_the_pixels_that_a_model_reads(tiny_model, tmp_path: Path) -> None:
    """The same picture in another file is no other prompt, and another picture is."""

    def asked(*files: Path) -> int:
        model = Counting(tiny_model)
        model.encode = lambda prompts: model.asked.extend(prompts) or tiny_model.encode([prompt.text for prompt in prompts])
        for file in files:
            Embeddings(model, tmp_path / "cache").prompted([ImagePrompt("a red circle", (file,))], 1.0)
        return len(model.asked)

    plain, hiding = seen_alike(tmp_path)
    assert asked(plain, hiding) == 1
    Image.new("RGB", (24, 16), "blue").save(tmp_path / "other.png")
    Image.new("RGB", (16, 24), "blue").save(tmp_path / "turned.png")
    assert asked(plain, tmp_path / "other.png", tmp_path / "turned.png") == 2


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("by", ["number", "size"])
def test_memory_is_bounded(tiny_model, tmp_path: Path, monkeypatch, by: str, on_disk: bool) -> None:
    """The prompt that was asked for longest ago goes, and is the same bits when it comes again."""
    size = sum(tensor.nbytes for tensor in tiny_model.encode(["a red circle"]))
    monkeypatch.setattr(module, *(("IN_MEMORY", 2) if by == "number" else ("IN_BYTES", 2 * size)))
    embeddings, model = Embeddings(tiny_model, tmp_path if on_disk else None), Counting(tiny_model)
    for prompt in ("a red circle", "two blue squares", "a red circle", "one green square"):
        embeddings.prompted([prompt], 1.0)
    assert list(embeddings.in_memory) == ["a red circle", "one green square"]
    assert equal(embeddings.prompted(["two blue squares"], 1.0), Embeddings(model).prompted(["two blue squares"], 1.0))


def test_a_prompt_larger_than_the_memory_is_kept_until_the_next(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(module, "IN_BYTES", 1)
    embeddings = Embeddings(tiny_model)
    embeddings.prompted(["a red circle", "two blue squares"], 1.0)
    assert list(embeddings.in_memory) == ["two blue squares"]


@pytest.mark.parametrize("name", FAMILIES)
def test_other_tokenizers_have_other_files(name: str, tmp_path: Path, monkeypatch) -> None:
    """Of every part that reads a prompt, though the networks stay the same; and other releases, whose templates differ."""
    family = load_family(name)
    family.save(tmp_path / "one")
    arguments = {"dtype": torch.float32, "device": torch.device("cpu"), **family.settings}

    def fingerprint() -> str:
        model = load_model(family.model, path=tmp_path / "one", **arguments)
        before = Embeddings(model).fingerprint
        model.encode(family.prompts[:1])
        again = load_model(family.model, path=tmp_path / "one", **arguments)
        again.encode(family.prompts[:1])  # what a tokenizer remembers of a text is no difference
        assert Embeddings(again).fingerprint == before
        return before

    found = {fingerprint()}
    files = sorted((tmp_path / "one").rglob("tokenizer.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            a, b = list(vocabulary)[5:7]
            vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
        else:
            vocabulary[5], vocabulary[6] = vocabulary[6], vocabulary[5]
        file.write_text(json.dumps(content))
        found.add(fingerprint())
    assert len(found) == 1 + len(files)
    for library in ("diffusers", "transformers"):
        monkeypatch.setattr(f"fastgrpo.models.adapter.{library}.__version__", "0.0.0")
        found.add(fingerprint())
    assert len(found) == 3 + len(files)


def test_released_encoders_still_encode() -> None:
    model = load_tiny_model()
    before = model.encode(["a red circle"])
    model.release_encoders()
    assert equal(model.encode(["a red circle"]), before)


def test_a_damaged_or_foreign_file_is_refused_by_name_with_the_way_out(tiny_model, tmp_path: Path) -> None:
    Embeddings(tiny_model, tmp_path).prepare(PROMPTS, show=False)
    file = max(tmp_path.rglob("*.safetensors"))
    whole = load_file(file)
    other = {name: torch.cat([tensor, tensor], dim=-1) for name, tensor in whole.items()}
    for content in (file.read_bytes()[:-1], b"", save({"x": torch.ones(1)}), save(other)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"\.safetensors: .*(get it again|remove )"):
            Embeddings(tiny_model, tmp_path).prompted(PROMPTS, 1.0)
