"""Embeddings: made once a prompt, in memory or on disk, and the same bits from either."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from support.files import seen_alike
from support.tiny_model import load_tiny_model

from fastgrpo.config.schema import ConfigError
from fastgrpo.data.embedding_files import EmbeddingFiles, kept
from fastgrpo.data.embeddings import Embeddings, compared_with
from fastgrpo.data.padding import fill, trimmed
from fastgrpo.data.prompts import ImagePrompt
from fastgrpo.engine.ranks import OneRank
from fastgrpo.measure import GIB
from fastgrpo.models import load_model
from fastgrpo.records import Prompted, concatenate, join_prompted
from fastgrpo.testing import FAMILIES, load_family

CPU = torch.device("cpu")
ONE = OneRank()
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
    Embeddings(model, tmp_path).prepare(["", *PROMPTS], ONE)
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
def test_memory_is_bounded(tiny_model, tmp_path: Path, on_disk: bool) -> None:
    """The prompt that was asked for longest ago goes, and is the same bits when it comes again."""
    room = 2 * kept(tiny_model.encode(["a red circle"])).nbytes / GIB
    embeddings, model = Embeddings(tiny_model, tmp_path if on_disk else None, in_memory=room), Counting(tiny_model)
    for prompt in ("a red circle", "two blue squares", "a red circle", "one green square"):
        embeddings.prompted([prompt], 1.0)
    assert [key.prompt for key in embeddings.in_memory] == ["a red circle", "one green square"]
    assert equal(embeddings.prompted(["two blue squares"], 1.0), Embeddings(model).prompted(["two blue squares"], 1.0))


def test_a_prompt_larger_than_the_memory_is_kept_until_the_next(tiny_model) -> None:
    embeddings = Embeddings(tiny_model, in_memory=1e-9)
    found = embeddings.prompted(["a red circle", "two blue squares"], 1.0)
    assert [key.prompt for key in embeddings.in_memory] == ["two blue squares"]
    assert equal(found, Embeddings(tiny_model).prompted(["a red circle", "two blue squares"], 1.0))


def test_samples_of_a_prompt_share_its_row(tiny_model) -> None:
    """On the device is a row for each different prompt; what the network is asked is the row of each sample, bit for bit."""
    prompts = ["a red circle", "two blue squares", "a red circle", "two blue squares"]
    for scale, rows in ((1.0, 2), (3.0, 3)):
        prompted = Embeddings(tiny_model).prompted(prompts, scale)
        assert [len(tensor) for tensor in prompted.rows] == [rows] * len(prompted.rows)
        assert equal(prompted.cond, concatenate([tiny_model.encode([prompt]) for prompt in prompts]))
        assert equal(prompted.uncond, None if scale == 1 else concatenate([tiny_model.encode([""])] * 4))
    parts = prompted.split(3)
    assert all(part.rows is prompted.rows for part in parts) and equal(join_prompted(parts), prompted)
    apart = join_prompted([Prompted.of(part.cond, part.uncond) for part in parts])  # with rows of each batch's own
    assert equal(apart.cond, prompted.cond) and equal(apart.uncond, prompted.uncond)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_conditioning_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """From memory and from disk, the padding left out in between where the family has zeros there."""
    family = load_family(name)
    family.save(tmp_path / "model")
    model = load_model(family.model, path=tmp_path / "model", dtype=torch.float32, device=CPU, **family.settings)
    prompts = list(family.prompts)
    expected = [model.encode([prompt]) for prompt in [*prompts, *(compared_with(prompt) for prompt in prompts)]]
    cond, uncond = concatenate(expected[: len(prompts)]), concatenate(expected[len(prompts) :])
    for _ in range(2):
        embeddings = Embeddings(model, tmp_path / "cache")
        prompted = embeddings.prompted(prompts, 3.0)
        assert equal(prompted.cond, cond) and equal(prompted.uncond, uncond)
        assert prompted.rows[0].is_contiguous()
    whole, left = (
        sum(tensor.nbytes for tensor in expected[0]),
        next(one.nbytes for key, one in embeddings.in_memory.items() if key.prompt == prompts[0]),
    )
    attends_to_padding = name.startswith(("sd3", "flux"))
    assert left == whole if attends_to_padding else left < whole


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        (torch.tensor([[[1.0, 0, 0], [2, 3, 0], [0, 0, 0]]]), (1, 2, 2)),
        (torch.zeros(1, 4, 2), (1, 0, 0)),
        (torch.tensor([[0.0, 0, -0.0, 0]]), (1, 3)),
        (torch.tensor([[0.0, math.nan, 0]]), (1, 2)),
        (torch.tensor([[True, False, True, False]]), (1, 3)),
        (torch.tensor([0]), (1,)),
    ],
)
def test_only_trailing_zeros_are_left_out(tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    left = trimmed(tensor)
    assert left.shape == shape and left.untyped_storage().nbytes() == left.nbytes
    row = torch.zeros_like(tensor[0])
    fill(row, left)
    assert row.numpy().tobytes() == tensor.numpy().tobytes()


def test_what_guidance_compares_with_is_the_negative_prompt_of_the_same_image(tiny_model, tmp_path: Path) -> None:
    found = Embeddings(tiny_model, negative_prompt="a blurred square").prompted(PROMPTS, 3.0)
    assert equal(found.uncond, concatenate([tiny_model.encode(["a blurred square"])] * 3))
    assert Embeddings(tiny_model, negative_prompt="a blurred square").prompted(PROMPTS, 1.0).uncond is None
    edit = ImagePrompt("make it blue", (tmp_path / "a.png",))
    assert compared_with(edit, "blurred") == ImagePrompt("blurred", edit.images)


def test_what_the_folder_will_take_is_said_and_refused_if_the_disk_has_less(
    tiny_model, tmp_path: Path, capfd, monkeypatch
) -> None:
    Embeddings(tiny_model, tmp_path).prepare(PROMPTS, ONE)
    size = next(tmp_path.rglob("*.safetensors")).stat().st_size
    assert f"embeddings of 2 prompts take about {2 * size / 1e9:.3g} GB in {tmp_path}" in capfd.readouterr().err
    Embeddings(tiny_model, tmp_path).prepare(PROMPTS, ONE)
    assert "embeddings" not in capfd.readouterr().err  # they are there
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2.5 * size))
    with pytest.raises(
        ConfigError, match=r"prompts\.cache = .*/other: embeddings of 3 prompts take about .* GB are free; name"
    ):
        Embeddings(tiny_model, tmp_path / "other").prepare(["a", "b", "c"], ONE)
    assert len(list((tmp_path / "other").rglob("*.safetensors"))) == 1


def test_what_is_read_ahead_is_not_read_again_and_never_encoded(tiny_model, tmp_path: Path) -> None:
    model = Counting(tiny_model)
    Embeddings(model, tmp_path).prepare(PROMPTS, ONE)
    ahead = Embeddings(model, tmp_path)
    ahead.read_ahead([*PROMPTS, "a new one"], 3.0)
    ahead.wait()
    assert {key.prompt for key in ahead.in_memory} == set(PROMPTS) == set(model.asked)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"")
    assert equal(ahead.prompted(PROMPTS, 1.0), Embeddings(tiny_model).prompted(PROMPTS, 1.0))


def test_a_file_that_cannot_be_read_ahead_is_refused_where_it_is_needed(tiny_model, tmp_path: Path) -> None:
    Embeddings(tiny_model, tmp_path).prepare(PROMPTS, ONE)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"")
    ahead = Embeddings(tiny_model, tmp_path)
    ahead.read_ahead(PROMPTS, 1.0)
    with pytest.raises(ValueError, match=r"\.safetensors: is no whole file"):
        ahead.prompted(PROMPTS, 1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_tokenizers_have_other_files(name: str, tmp_path: Path, monkeypatch) -> None:
    """Of every part that reads a prompt, though the networks stay the same; and other releases, whose templates differ."""
    family = load_family(name)
    family.save(tmp_path / "one")
    arguments = {"dtype": torch.float32, "device": torch.device("cpu"), **family.settings}

    def fingerprint() -> str:
        model = load_model(family.model, path=tmp_path / "one", **arguments)
        before = EmbeddingFiles(model, tmp_path).fingerprint
        model.encode(family.prompts[:1])
        again = load_model(family.model, path=tmp_path / "one", **arguments)
        again.encode(family.prompts[:1])  # what a tokenizer remembers of a text is no difference
        assert EmbeddingFiles(again, tmp_path).fingerprint == before
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
    Embeddings(tiny_model, tmp_path).prepare(PROMPTS, ONE)
    file = max(tmp_path.rglob("*.safetensors"))
    whole = load_file(file)
    other = {name: torch.cat([tensor, tensor], dim=-1) for name, tensor in whole.items()}
    for content in (file.read_bytes()[:-1], b"", save({"x": torch.ones(1)}), save(other)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"\.safetensors: .*(get it again|remove )"):
            Embeddings(tiny_model, tmp_path).prompted(PROMPTS, 1.0)
