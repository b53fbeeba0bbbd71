"""Paths of a configuration: relative to what, from which home, and none lost in a list."""

import json
from pathlib import Path

import pytest
from support.helpers import ROOT

from fastgrpo.config import schema
from fastgrpo.validation import ConfigError, check_folder, load_config

TINY = ROOT / "configs" / "tiny_shapes_grpo.yaml"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_the_home_folder_is_known_wherever_a_path_is_read(home: Path) -> None:
    """In a file, in what it extends, in an override, in the settings of a reward, and as the file's own name."""
    (home / "base.yaml").write_text(f"extends: {TINY}\nprompts: {{cache: ~/cache}}\n")
    (home / "mine.yaml").write_text("extends: ~/base.yaml\noutput: ~/runs/a\n")
    settings = "reward.settings={mine:Judge: {path: ~/clip, words: [~/a.txt, {more: ~/b.txt}]}}"
    config = load_config("~/mine.yaml", ["model.tiny_decoder=~/vae", "reward.train=mine:Judge", settings])
    assert config.output == home / "runs" / "a" and config.prompts.cache == home / "cache"
    assert config.model.tiny_decoder == home / "vae"
    own = config.reward.settings["mine:Judge"]
    assert own == {"path": f"{home}/clip", "words": [f"{home}/a.txt", {"more": f"{home}/b.txt"}]}


def test_environment_variables_and_other_tildes_stay_as_they_are(home: Path) -> None:
    assert load_config(TINY, ["output=$HOME/a~b"]).output == Path("$HOME/a~b")
    with pytest.raises(ConfigError, match=r"~nobody-of-that-name/a: .*write the whole path"):
        load_config(TINY, ["output=~nobody-of-that-name/a"])


def test_paths_in_lists_are_relative_to_their_file(tmp_path: Path) -> None:
    data = {"files": ["./a", ["../b", "c"], {"d": "./e"}], "number": 3}
    assert schema.absolute_paths(data, tmp_path / "in") == {
        "files": [f"{tmp_path}/in/a", [f"{tmp_path}/b", "c"], {"d": f"{tmp_path}/in/e"}],
        "number": 3,
    }


@pytest.mark.parametrize("text", ["", "a\0b", "x" * 256, "a/" * 2500, "half of \ud83d"])
def test_what_no_file_system_has_as_a_path_is_refused_by_its_key(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({"extends": str(TINY), "prompts": {"train": text}}))
    with pytest.raises(ConfigError, match=r"^prompts\.train = .*path"):
        load_config(file)


def test_the_root_of_the_file_system_is_no_folder_of_a_run() -> None:
    with pytest.raises(ConfigError, match=r"output = '/': is the root of the file system; name a folder in it"):
        check_folder(load_config(TINY, ["output=/"]))
