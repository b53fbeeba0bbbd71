"""Objects in place of what a configuration names: the configuration that is kept names them, and can be read again."""

from pathlib import Path

import pytest
import torch
from support.helpers import ROOT
from torch import Tensor

from fastgrpo import parts
from fastgrpo.config.keys import Config
from fastgrpo.config.reading import dump_config
from fastgrpo.data.prompts import given_prompts
from fastgrpo.parts import Objects
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
