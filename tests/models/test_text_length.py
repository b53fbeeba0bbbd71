"""How long a prompt may be: as long as in the stock pipeline of each family, unless the configuration says otherwise."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from fastgrpo.config.keys import ModelConfig
from fastgrpo.config.sizes import Size
from fastgrpo.data.prompts import PromptSet
from fastgrpo.models import MODELS, load_model, model_class
from fastgrpo.models.settings import model_settings
from fastgrpo.parts import Objects, Parts, check_cut
from fastgrpo.testing import load_family
from fastgrpo.validation import load_config

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[2]
EMPTY = {"prompt": ""}
STOCK = [name for name in MODELS if name != "bagel"]  # which has no pipeline in diffusers


def load(name: str, folder: Path, **settings: object):
    family = load_family(name)
    family.save(folder)
    return load_model(name, path=folder, dtype=torch.float32, device=CPU, **{**family.settings, **settings})


@pytest.mark.parametrize("name", [name for name in STOCK if name != "qwen_image_21"])  # whose pipeline has no such length
def test_the_length_that_a_family_has_by_itself_is_the_stock_pipelines(name: str) -> None:
    kind = model_class(name)
    asked = inspect.signature(getattr(diffusers, kind.pipeline_class).__call__).parameters.get("max_sequence_length")
    if asked is None:  # a pipeline that reads prompts of any length
        assert name == "qwen_image_21" and kind.cuts_are_known
    else:
        assert kind.stock_text_tokens == asked.default


@pytest.mark.parametrize("name", STOCK)
def test_a_family_takes_no_longer_text_than_the_stock_pipeline(name: str) -> None:
    kind = model_class(name)
    refused = re.search(r"max_sequence_length > (\d+)", inspect.getsource(getattr(diffusers, kind.pipeline_class)))
    if refused and not name.startswith("qwen_image_edit"):  # there the tokens of the images count too
        assert kind.longest_text == int(refused[1])


def test_without_the_key_the_family_decides(tmp_path: Path) -> None:
    chosen = {"max_text_tokens": model_settings(ModelConfig(path=tmp_path))["max_text_tokens"]}
    assert chosen == {"max_text_tokens": None}
    assert load("sd3", tmp_path / "sd3", **chosen).encode(["a cat"]).embeds.shape[1] == 77 + 256
    assert load("flux", tmp_path / "flux", **chosen).encode(["a cat"]).embeds.shape[1] == 512


@pytest.mark.parametrize("name", ["sd3", "flux", "flux_kontext", "flux2_klein", "wan"])
def test_a_longer_text_than_a_family_reads_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.max_text_tokens = 513: \w+ reads at most 512; lower it"):
        load(name, tmp_path, max_text_tokens=513)


def test_another_length_is_said_where_padding_is_attended_to(tmp_path: Path) -> None:
    for name in ("sd3", "qwen_image"):
        model = load(name, tmp_path / name)
        tokens, stock = model.settings.max_text_tokens, model.stock_text_tokens
        said = (
            f"model.max_text_tokens = {tokens}: another sequence than the stock pipeline reads, which pads to {stock} tokens"
        )
        assert model.other_length.startswith(said) if name == "sd3" else model.other_length == ""
        model.settings = replace(model.settings, max_text_tokens=stock)
        assert not model.other_length


def test_a_negative_prompt_that_would_be_cut_is_refused(tmp_path: Path) -> None:
    model = load("wan", tmp_path)
    with pytest.raises(ValueError, match=r"model\.negative_prompt = '[x ]+': .*text_tokens = 24 cuts it after '[x ]+'; sho"):
        check_cut(model, (PromptSet(["a"], [{"prompt": "a"}]), None, [Size()]), negative_prompt="x " * 60)


def test_an_empty_prompt_is_refused_where_it_means_none(tmp_path: Path) -> None:
    """BAGEL draws from nothing at all then, and not from an empty text between its marks."""
    load_family("bagel").save(tmp_path / "bagel")
    config = load_config(ROOT / "configs" / "bagel_compressibility.yaml", [f"model.path={tmp_path / 'bagel'}"])
    for prompts, held_out in ((["a cat", EMPTY], ["a dog"]), (["a cat"], ["a dog", EMPTY])):
        with pytest.raises(ValueError, match="^prompt 1: the prompt is empty, which bagel reads as no prompt at all; write"):
            Parts.of(config, CPU, Objects(prompts=prompts, held_out=held_out))
