"""A run's model card and its repository, without the net: the Hub is a list of what it was asked for."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import LocalTokenNotFoundError
from support.tiny_model import TINY_WEIGHTS, load_tiny_model, load_tuned_model

from fastgrpo.commands.cli import main
from fastgrpo.models import load_model
from fastgrpo.testing import load_family
from fastgrpo.trained_files import write_trained

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has done 3 of 5 iterations, with its LoRA."""
    folder = tmp_path_factory.mktemp("of_this_machine") / "shapes"
    model = load_tuned_model()
    trained = {n: p.detach().clone() for n, p in model.transformer.named_parameters() if p.requires_grad}
    write_trained(model, folder, 3, trained)
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "output": str(folder), "iterations": 5, "seed": 7, "model": {"path": str(TINY_WEIGHTS), "lora": {"rank": 4}},
        "prompts": {"train": "/secret/place/train.txt", "eval": "/secret/place/eval.txt"},
        "reward": {"train": "/secret/place/mine.py:score", "eval": "tiny_shapes", "settings": {"remote": {"urls": ["s://key"]}}},
    }))  # fmt: skip
    rows = [{"iteration": i, "accuracy": {"overall": s, "color": s}, "images": 20, "percent": ["overall", "color"]}
            for i, s in ((0, 0.25), (3, 0.5))]  # fmt: skip
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i}) + "\n" for i in (1, 2, 3)))
    return folder


class Hub:
    """As far as `push` asks it."""

    def __init__(self) -> None:
        self.asked: list = []

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool):
        self.asked.append((repo, private, exist_ok))
        if repo == "me/forbidden":
            raise LocalTokenNotFoundError("Token is required\nand more")
        return SimpleNamespace(repo_id=repo, __str__=lambda _: repo)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.asked.append((repo_id, {file.name: file.read_bytes() for file in folder_path.iterdir()}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    # Its methods, as what is imported meanwhile names the class itself in its types.
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", hub.create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", hub.upload_folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


def test_a_folder_is_written_and_nothing_sent(run: Path, hub: Hub, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "card"
    assert main(["push", str(run), "--folder", str(folder), "--base-model", "stabilityai/stable-diffusion-3.5-medium"]) == 0
    assert not hub.asked and "written" in capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", LORA]
    assert (folder / LORA).read_bytes() == (run / LORA).read_bytes()
    load_tiny_model().pipeline.load_lora_weights(folder)


def test_the_card_says_what_the_run_says_and_nothing_of_this_machine(run: Path, hub: Hub, tmp_path: Path) -> None:
    main(["push", str(run), "--folder", str(tmp_path / "card"), "--base-model", "stabilityai/stable-diffusion-3.5-medium"])
    card = ModelCard.load(tmp_path / "card" / "README.md")  # the Hub's own reader
    assert card.data.base_model == "stabilityai/stable-diffusion-3.5-medium" and card.data.library_name == "diffusers"
    text = card.text
    for said in (
        "| overall | 25.0% | 50.0% |", "3 of 5: the run has not finished", "another reward `tiny_shapes`", "20 images",
        "`mine.py:score`", "| seed | 7 |", "a LoRA of rank 4", "after iteration 3", 'load_lora_weights("shapes")',
    ):  # fmt: skip
        assert said in text, said
    assert not [word for word in ("/secret", "s://key", "of_this_machine", str(TINY_WEIGHTS.parent)) if word in text]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_of_two_experts_both_are_written_and_loaded(train: str, hub: Hub, tmp_path: Path) -> None:
    family, run = load_family("wan_experts"), tmp_path / "run"
    family.save(tmp_path / "base")
    model = load_model("wan", path=tmp_path / "base", dtype=torch.float32, device=torch.device("cpu"), **family.settings)
    if train == "lora":
        model.add_lora(rank=4, alpha=4)
    else:
        model.train_all(keep_reference=False)
    write_trained(model, run, 1, {n: p.detach() for n, p in model.transformer.named_parameters() if p.requires_grad})
    (run / "config.yaml").write_text(yaml.safe_dump({
        "output": str(run), "model": {"name": "wan", "path": str(tmp_path / "base"), "train": train},
        "prompts": {"train": "/a.txt", "eval": "/b.txt"}, "reward": {"train": "jpeg_compressibility", "eval": "tiny_shapes"},
    }))  # fmt: skip
    assert main(["push", str(run), "--folder", str(tmp_path / "card")]) == 0
    card = ModelCard.load(tmp_path / "card" / "README.md").text
    code = card.partition("```python\n")[2].partition("```")[0]
    names = {"lora": [LORA, "pytorch_lora_weights_2.safetensors"], "full": ["transformer", "transformer_2"]}[train]
    assert sorted(file.name for file in (tmp_path / "card").iterdir()) == ["README.md", *names]
    code = code.replace("the base model", str(tmp_path / "base")).replace('"run"', repr(str(tmp_path / "card")))
    exec(compile(code, "card", "exec"), found := {})
    assert found["pipeline"].transformer_2 is not found["pipeline"].transformer
    if train == "lora":
        assert found["pipeline"].transformer.peft_config and found["pipeline"].transformer_2.peft_config


def test_the_card_says_what_the_base_alone_does_not(run: Path, tmp_path: Path) -> None:
    config, kept = run / "config.yaml", (run / "config.yaml").read_text()
    changed = yaml.safe_load(kept)
    changed["model"] |= {"transformer": "/secret/place/tuned.safetensors", "negative_prompt": "dull"}
    changed["rollout"] = {"sizes": [[32, 16], {"height": 16, "width": 16, "weight": 2}], "guidance_scale": 2}
    config.write_text(yaml.safe_dump(changed))
    assert main(["push", str(run), "--folder", str(tmp_path / "card")]) == 0
    config.write_text(kept)
    text = (tmp_path / "card" / "README.md").read_text()
    for row in ("| transformer | `tuned.safetensors` in place", "| size | 32x16, 16x16 |", "| negative prompt | dull |"):
        assert row in text
    assert "/secret" not in text


def test_without_scores_the_card_claims_none(run: Path, hub: Hub, tmp_path: Path) -> None:
    rows = (run / "evaluations.jsonl").read_text()
    (run / "evaluations.jsonl").write_text(rows.splitlines(keepends=True)[0])
    main(["push", str(run), "--folder", str(tmp_path / "card")])
    (run / "evaluations.jsonl").write_text(rows)
    text = (tmp_path / "card" / "README.md").read_text()
    assert "so there are no scores" in text and "25.0%" not in text and "base_model:" not in text


def test_it_is_sent_only_where_a_repository_is_named(run: Path, hub: Hub) -> None:
    assert main(["push", str(run), "--repo", "me/shapes", "--private"]) == 0
    (made, (repo, sent)) = hub.asked
    assert made == ("me/shapes", True, True) and repo == "me/shapes" and sent.keys() == {"README.md", LORA}
    assert b'load_lora_weights("me/shapes")' in sent["README.md"]


def test_offline_nothing_is_sent_and_that_is_said(run: Path, hub: Hub, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(run), "--repo", "me/shapes"]) == 2
    assert "HF_HUB_OFFLINE is set, so nothing is sent" in capsys.readouterr().err
    assert main(["push", str(run), "--repo", "me/shapes", "--folder", str(tmp_path / "card")]) == 0
    assert "not sent, as HF_HUB_OFFLINE is set" in capsys.readouterr().out
    assert (tmp_path / "card" / "README.md").is_file() and not hub.asked


def test_what_the_hub_says_against_it_and_what_is_not_whole_is_refused(run: Path, hub: Hub, tmp_path: Path, capsys) -> None:
    assert main(["push", str(run), "--repo", "me/forbidden"]) == 2
    assert "--repo me/forbidden: Token is required; log in with `hf auth login`" in capsys.readouterr().err
    assert main(["push", str(run)]) == 2 and "name a repository with --repo, or a folder" in capsys.readouterr().err
    record = (run / "trained.json").read_text()
    (run / "trained.json").write_text(record.replace(LORA, "other"))
    assert main(["push", str(run), "--folder", str(tmp_path / "card")]) == 2
    (run / "trained.json").write_text(record)
    assert "its trained weights are not whole" in capsys.readouterr().err and not (tmp_path / "card").exists()
