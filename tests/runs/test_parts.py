"""Objects in place of what a configuration names: the configuration that is kept names them, and can be read again."""

from pathlib import Path

import pytest
import torch
from support.helpers import ROOT
from torch import Tensor

from fastgrpo import parts
from fastgrpo.config.keys import Config
from fastgrpo.config.reading import dump_config
from fastgrpo.data.prompts import check_held_out, given_prompts, load_prompts
from fastgrpo.parts import Objects, Parts
from fastgrpo.validation import load_config


def brightness(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    return images.float().mean((1, 2, 3))


class Darkness:
    """A reward made by hand, which is an object of a class."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return -images.float().mean((1, 2, 3))


def configured(folder: Path) -> Config:
    mine = "{my_rewards:Judge: {strictness: 3}, jpeg_compressibility: {}}"
    overrides = [f"output={folder}", "reward.train=my_rewards:Judge", f"reward.settings={mine}"]
    return load_config(ROOT / "configs" / "tiny_shapes.yaml", overrides)


def test_nothing_handed_in_changes_nothing(tmp_path: Path) -> None:
    """Not even settings that no reward reads now: a run that goes on is compared with what was kept."""
    overrides = [f"output={tmp_path}", "reward.settings={jpeg_compressibility: {}}"]
    config = load_config(ROOT / "configs" / "tiny_shapes.yaml", overrides)
    assert Objects(prompts=["a"]).naming_them(config).reward == config.reward and Objects().naming_them(config) == config


def test_the_configuration_names_what_was_handed_in_and_can_be_read_again(tmp_path: Path) -> None:
    """Without the settings of the reward that is replaced, which would be those of no reward."""
    objects = Objects(reward=brightness, held_out_reward=Darkness(), prompts=["a"], held_out=[{"prompt": "b", "tag": "c"}])
    config = objects.naming_them(configured(tmp_path))
    assert config.reward.train == f"{__name__}:brightness" and config.reward.eval == f"{__name__}:Darkness"
    objects.write_prompts(config, given_prompts(objects.prompts), given_prompts(objects.held_out))
    assert config.prompts.train.read_text() == '{"prompt": "a"}\n'
    assert config.prompts.eval.read_text() == '{"prompt": "b", "tag": "c"}\n'
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config and config.reward.settings == {}


def test_one_reward_is_for_training_and_evaluation(tmp_path: Path) -> None:
    reward = Objects(reward=brightness).naming_them(configured(tmp_path)).reward
    assert reward.train == reward.eval == f"{__name__}:brightness"
    both = Objects(reward=brightness, held_out_reward=brightness).naming_them(configured(tmp_path)).reward
    assert both.eval == reward.eval


def test_a_category_called_as_the_mean_over_all_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "configured_model", lambda *_: pytest.fail("a model is loaded"))
    config = load_config(ROOT / "configs" / "tiny_shapes.yaml", [f"output={tmp_path}"])
    with pytest.raises(ValueError, match="the prompt 'b' has the tag 'overall'"):
        parts.Parts.of(config, torch.device("cpu"), Objects(prompts=["a"], held_out=[{"prompt": "b", "tag": "overall"}]))


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are both called .*:Darkness, by which a run tells them apart"):
        Objects(reward=Darkness(), held_out_reward=Darkness())
    assert Darkness()(torch.ones(1, 3, 2, 2), ["a"], [{}]).item() == -1


CONFIG = ROOT / "configs" / "tiny_shapes.yaml"
SHAPE = '{"prompt": "a red circle", "include": [{"class": "circle", "color": "red", "count": 1}]}'
OTHER = '{"prompt": "a blue square", "include": [{"class": "square", "count": 1}]}'
SIGN = '{"prompt": "a sign \\"hi\\""}'


class Careful:
    """A reward that was made, with a check that needs what it was made with."""

    made = 0

    def __init__(self, device: torch.device, *, word: str) -> None:
        Careful.made += 1
        self.word = word

    def check(self, prompts: list[str], metadata: list[dict]) -> None:
        for prompt, record in zip(prompts, metadata, strict=True):
            record.clear()
            if self.word not in prompt:
                raise KeyError(self.word)


class Unmade:
    """A reward whose check needs no object; it may not be made before."""

    def __init__(self, device: torch.device) -> None:
        raise AssertionError

    @classmethod
    def check(cls, prompts: list[str], metadata: list[dict]) -> None:
        for record in metadata:
            if "score" not in record:
                raise ValueError("there is no score")


CAREFUL, UNMADE = f"{__name__}:Careful", f"{__name__}:Unmade"
JPEG = "jpeg_compressibility"
JUDGED = [
    ([SHAPE, "", SIGN], [OTHER], "tiny_shapes", JPEG, r"train\.jsonl:3: reward 'tiny_shapes': \"include\" is None"),
    ([SHAPE], [SIGN, SIGN, OTHER], JPEG, "ocr", r"eval\.jsonl:3: reward 'ocr': prompt 'a blue square' quotes no text"),
    ([SIGN, SHAPE], [OTHER], f"{{{JPEG}: 1, ocr: 2}}", JPEG, r"train\.jsonl:2: reward 'ocr': prompt 'a red circle' quotes"),
    ([SHAPE], [OTHER, SIGN], JPEG, f"{{{JPEG}: 1, geneval: 1}}", r"eval\.jsonl:1: reward 'geneval': .* \"tag\" is None"),
    ([SIGN], [OTHER], JPEG, "tiny_text", r"eval\.jsonl:1: reward 'tiny_text': \"text\" is None"),
    ([SHAPE], [SIGN], f"'{CAREFUL}'", JPEG, rf"train\.jsonl:1: reward '{CAREFUL}': KeyError: 'sign'"),
    ([SHAPE], [SIGN], f"'{UNMADE}'", JPEG, rf"train\.jsonl:1: reward '{UNMADE}': there is no score"),
]


@pytest.mark.parametrize(("train", "held_out", "reward", "held_out_reward", "message"), JUDGED)
def test_every_reward_judges_every_prompt_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch, train: list[str], held_out: list[str], reward: str, held_out_reward: str, message: str
) -> None:
    monkeypatch.setattr("fastgrpo.parts.configured_model", lambda *_: pytest.fail("the model is loaded"))
    for name, lines in (("train", train), ("eval", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    folders = {"geneval": {"detector": "no/folder", "clip": "no/folder"}, CAREFUL: {"word": "sign"}}
    named = {name: settings for name, settings in folders.items() if name in reward + held_out_reward}
    config = load_config(CONFIG, [
        f"output={tmp_path}", f"prompts.train={tmp_path}/train.jsonl", f"prompts.eval={tmp_path}/eval.jsonl",
        "prompts.weights={}", f"reward.train={reward}", f"reward.eval={held_out_reward}", f"reward.settings={named}",
    ])  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Parts.of(config, torch.device("cpu"), Objects())


def test_held_out_prompts_are_known_in_whatever_form(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.txt", tmp_path / "eval.txt"
    train.write_text("a dog\nThe caf\u00e9\u2019s  sign\n", encoding="utf-8")
    for text in ("the CAFE\u0301's sign", "\uff34he caf\u00e9's\u200b sign"):
        held_out.write_text(f"a cat\n{text}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"1 evaluation prompts .*eval\.txt:2, as 'The .*' at .*train\.txt:2$"):
            check_held_out(load_prompts(train), load_prompts(held_out))
    held_out.write_text("a doge\nthe cafes sign\n")
    check_held_out(load_prompts(train), load_prompts(held_out))
