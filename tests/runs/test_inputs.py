"""A run's inputs are known by content: moved they are the same, changed they are not, whatever they are called."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.helpers import ROOT

from fastgrpo.data.prompts import PromptSet, load_prompts
from fastgrpo.engine.checkpoint_folders import MARKER
from fastgrpo.inputs import changes, inputs_of, prompts_hash, write_inputs
from fastgrpo.validation import load_config

WEIGHTS = ROOT / "fastgrpo" / "tiny" / "weights"
NONE = PromptSet([], [])


def inputs(model: Path = WEIGHTS, prompts: PromptSet = NONE, *settings: str) -> dict[str, str]:
    overrides = [f"model.path={model}", "reward.train=jpeg_compressibility", "reward.eval=jpeg_compressibility", *settings]
    return inputs_of(load_config(ROOT / "configs" / "tiny_shapes.yaml", overrides), prompts, NONE)


def with_checkpoint(folder: Path) -> Path:
    (folder / "checkpoints" / "00001").mkdir(parents=True)
    (folder / "checkpoints" / "00001" / MARKER).write_text("{}")
    return folder


def test_prompts_are_their_records_and_the_pixels_that_they_name(tmp_path: Path) -> None:
    for folder, color in (("one", "red"), ("two", "red"), ("three", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), color).save(tmp_path / folder / "a.png")
        (tmp_path / folder / "p.jsonl").write_text('{"prompt": "a", "image": "a.png"}\n')
    (tmp_path / "two" / "p.jsonl").rename(tmp_path / "two" / "q.jsonl")
    files = ("one/p.jsonl", "two/q.jsonl", "three/p.jsonl")
    one, moved, other = (prompts_hash(load_prompts(tmp_path / file, ["image"])) for file in files)
    assert one == moved != other


def test_prompts_are_known_by_their_texts_and_their_order(tmp_path: Path) -> None:
    found = set()
    for prompts in ("ab", "ba", "a", "abc"):
        (tmp_path / "p.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        one, other = (prompts_hash(load_prompts(tmp_path / name)) for name in ("p.txt", "p.jsonl"))
        assert one == other
        found.add(one)
    assert len(found) == 4


def test_weights_are_the_same_wherever_they_lie_and_others_when_one_is_trained_on(tmp_path: Path) -> None:
    moved = Path(shutil.copytree(WEIGHTS, tmp_path / "moved"))
    (moved / "README.md").write_text("what it is")
    before = inputs()
    assert inputs(moved) == before and {"model.path/transformer", "model.path/tokenizer", "model.path"} <= before.keys()
    weights = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    trained = {name: tensor + 1e-3 for name, tensor in load_file(weights).items()}
    save_file(trained, weights)
    assert weights.stat().st_size > 1000
    changed = inputs(moved)
    assert [name for name in before if before[name] != changed[name]] == ["model.path/transformer"]


def test_a_transformer_from_elsewhere_is_known_by_its_content_and_the_one_in_its_place_is_not(tmp_path: Path) -> None:
    part = WEIGHTS / "transformer"
    file = Path(shutil.copy(part / "diffusion_pytorch_model.safetensors", tmp_path / "one.safetensors"))
    found = inputs(WEIGHTS, NONE, f"model.transformer={file}")
    assert {"model.path/vae", "model.transformer"} <= found.keys() and "model.path/transformer" not in found
    moved = file.rename(tmp_path / "moved.safetensors")
    assert inputs(WEIGHTS, NONE, f"model.transformer={moved}") == found
    moved.write_bytes(moved.read_bytes()[::-1])
    changed = inputs(WEIGHTS, NONE, f"model.transformer={moved}")
    assert [name for name in found if found[name] != changed[name]] == ["model.transformer"]
    assert "model.transformer" in inputs(WEIGHTS, NONE, f"model.transformer={part}")


def test_of_large_files_blocks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrpo.inputs.WHOLE", 1000)
    monkeypatch.setattr("fastgrpo.inputs.BLOCK", 16)
    test_weights_are_the_same_wherever_they_lie_and_others_when_one_is_trained_on(tmp_path)


def test_a_run_with_a_checkpoint_is_not_gone_on_with_on_other_prompts(tmp_path: Path) -> None:
    before = inputs(prompts=PromptSet(["a"], [{"prompt": "a"}]))
    after = inputs(prompts=PromptSet(["b"], [{"prompt": "b"}]))
    write_inputs(tmp_path, before)
    assert changes(tmp_path, after) == []  # nothing was trained yet
    with_checkpoint(tmp_path)
    assert changes(tmp_path, before) == []
    with pytest.raises(ValueError, match=r"another content of prompts\.train; restore that, or choose another folder"):
        changes(tmp_path, after)


def test_a_mended_reward_and_another_release_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "a_reward_of_mine.py"
    module.write_text("def score(images, prompts, metadata): return 1")
    own = ["reward.train=a_reward_of_mine:score"]
    write_inputs(with_checkpoint(tmp_path / "run"), inputs(WEIGHTS, NONE, *own) | {"release of torch": "1.0"})
    module.write_text("def score(images, prompts, metadata): return images.float().mean((1, 2, 3))")
    said = changes(tmp_path / "run", inputs(WEIGHTS, NONE, *own))
    assert said == [
        "reward a_reward_of_mine:score changed since the run began", "release of torch changed since the run began",
    ]  # fmt: skip


def test_a_folder_without_them_or_with_a_damaged_file(tmp_path: Path) -> None:
    assert changes(with_checkpoint(tmp_path), inputs()) == []
    (tmp_path / "inputs.json").write_text("{")
    with pytest.raises(ValueError, match=r"inputs\.json: cannot be read"):
        changes(tmp_path, inputs())
