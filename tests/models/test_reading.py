"""What the text encoders read of a prompt, in every family: nothing behind that part changes the conditioning."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastgrpo.config.sizes import Size
from fastgrpo.data.prompts import ImagePrompt, PromptSet
from fastgrpo.models import load_model
from fastgrpo.parts import check_cut
from fastgrpo.rewards import RewardSum
from fastgrpo.rewards.ocr import OCR
from fastgrpo.testing import FAMILIES, load_family

CPU = torch.device("cpu")
OWN = [Size()]  # the model's own size alone
LONG = "a red circle left of two green squares below a yellow cat " * 12
CUT_NOTHING = {"qwen_image_edit", "qwen_image_edit_plus", "qwen_image_21"}
READ_BY_CLIP_TOO = {"sd3", "flux", "flux_kontext"}  # which reads 77 tokens of a prompt, for `pooled` and a part of `embeds`


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("images") / "grey.png"
    Image.new("RGB", (64, 64), "grey").save(file)
    return file


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, folder = load_family(request.param), tmp_path_factory.mktemp(request.param)
    family.save(folder)
    loaded = load_model(family.model, path=folder, dtype=torch.float32, device=CPU, **family.settings)
    loaded.family_name = request.param
    return loaded


def asked(model: Any, image: Path, text: str) -> str | ImagePrompt:
    own = load_family(model.family_name).prompts[0]
    return text if isinstance(own, str) else ImagePrompt(text, (image,) * len(own.images))


@pytest.mark.slow
def test_the_part_that_is_read_is_all_that_counts(model: Any, image: Path) -> None:
    if model.family_name in CUT_NOTHING:
        return check_too_long_is_refused(model, image)
    prompt = asked(model, image, LONG)
    part = model.read_in_part([prompt, asked(model, image, "a cat")])
    assert list(part) == [prompt] and 0 < len(part[prompt]) < len(LONG) and LONG.startswith(part[prompt])

    def tensors(text: str) -> list[torch.Tensor]:
        found = model.encode([asked(model, image, text)])
        clip = 77 if model.family_name == "sd3" else 0
        return [found[0][:, clip:]] if model.family_name in READ_BY_CLIP_TOO else list(found)

    read, last = tensors(LONG), part[prompt].rstrip().rsplit(" ", 1)[0]
    after, before = tensors(f"{part[prompt]} 7 9 zebra {LONG}"), tensors(f"{last} 7 9 zebra {LONG}")
    assert all(map(torch.equal, read, after)) and not all(map(torch.equal, read, before))


def check_too_long_is_refused(model: Any, image: Path) -> None:
    """By the start's count as by the encoder, and with the same number: this family cuts nothing."""
    prompt = asked(model, image, LONG * 3)
    with pytest.raises(ValueError, match=r" is \d+ tokens; raise it") as counted:
        model.read_in_part([asked(model, image, "a cat"), prompt])
    with pytest.raises(ValueError, match="tokens; raise it") as encoded:
        model.encode_text([prompt])
    assert str(counted.value) == str(encoded.value) and model.read_in_part([asked(model, image, "a cat")]) == {}


@pytest.mark.slow
def test_it_is_said_once_and_in_our_words(model: Any, image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if model.family_name in CUT_NOTHING:
        return
    model.cuts_are_known = False
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for text in ("a cat", LONG, LONG):
            model.encode([asked(model, image, text)])
    line = f"1 of 1 prompts are longer than model.max_text_tokens = {model.settings.max_text_tokens} and are cut"
    assert [str(one.message).partition(",")[0] for one in said] == [line] and capfd.readouterr().err == ""


def test_a_run_counts_them_and_refuses_those_whose_text_is_cut_off(tiny_model, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model's T5 has no words: CLIP's 77 tokens decide."""

    class Reading(OCR):
        def __init__(self) -> None:
            pass

        def __call__(self, *given: object) -> None:
            raise AssertionError

    def prompts(*texts: str) -> PromptSet:
        return PromptSet(list(texts), [{"prompt": text} for text in texts], [f"a.txt:{i}" for i in range(len(texts))])

    reward = RewardSum(rewards={"ocr": Reading()}, weights={"ocr": 1.0})
    fine = prompts('"hi"', f'says "hi" {LONG}', f'says "hi" {LONG} "ho"', '"ho"')
    for show in (True, False):
        check_cut(tiny_model, (fine, reward, OWN), (prompts("a cat"), None, OWN), show=show)
        said = capsys.readouterr().err
        assert said.startswith("2 of 5 prompts are longer than model.max_text_tokens = 1 and are cut, for example") == show
    for text in (f'{LONG} says "hi"', f'says "{LONG}"'):
        with pytest.raises(ValueError, match=r"^a\.txt:1: model\.max_text_tokens = 1 cuts this prompt: reward 'ocr': "):
            check_cut(tiny_model, (prompts('"ho"', text), reward, OWN), show=False)
        check_cut(tiny_model, (prompts('"ho"', text), None, OWN), show=False)
