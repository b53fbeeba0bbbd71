"""`eval` and `sample` of a LoRA that no run here has trained, in the layout of the published ones of Flow-GRPO."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.tiny_model import TINY_WEIGHTS, load_tuned_model

from fastgrpo.commands.cli import main

REWARD = ["--reward", "jpeg_compressibility"]
MODEL = ["--model", "sd3", "--path", str(TINY_WEIGHTS), "--set", "model.max_text_tokens=1"]
DRAWN = ["--steps", "2", "--seed", "3", "--guidance", "2"]


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One LoRA as PEFT writes it, with alpha = 2 rank in a file beside, and as diffusers does."""
    peft, diffusers = tmp_path_factory.mktemp("peft"), tmp_path_factory.mktemp("diffusers")
    model = load_tuned_model()
    trained = {n: p.detach().clone() for n, p in model.transformer.named_parameters() if p.requires_grad}
    model.save_trained(diffusers, trained)
    weights = {f"base_model.model.{name.replace('.default', '')}": one for name, one in trained.items()}
    save_file(weights, peft / "adapter_model.safetensors")
    # As PEFT 0.10 wrote it.
    (peft / "adapter_config.json").write_text(json.dumps({
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "stabilityai/stable-diffusion-3.5-medium",
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": "gaussian",
        "layers_to_transform": None, "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA",
        "r": 4, "rank_pattern": {}, "target_modules": ["attn.to_q", "attn.to_k"], "use_dora": False, "use_rslora": False,
    }))  # fmt: skip
    return peft, diffusers


def scores(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert main(["eval", *arguments, *DRAWN]) == 0
    return json.loads(capsys.readouterr().out)["accuracy"]


def test_a_lora_is_scored_by_options_or_by_a_configuration(loras, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), *REWARD, "--images", "4"]
    peft = scores(capsys, "--lora", str(loras[0]), *MODEL, *prompts)
    assert peft == scores(capsys, "--lora", str(loras[1] / "pytorch_lora_weights.safetensors"), *MODEL, *prompts)
    by_file = scores(capsys, "--lora", str(loras[0]), "--config", "configs/tiny_shapes.yaml", *prompts)
    assert by_file == peft != scores(capsys, "--base", "--lora", str(loras[0]), *MODEL, *prompts)


def test_a_lora_draws(loras, tmp_path: Path) -> None:
    pictures = []
    for name, lora in (("a", ["--lora", str(loras[0])]), ("b", ["--lora", str(loras[1])]), ("c", ["--lora", "x", "--base"])):
        output = str(tmp_path / f"{name}.png")
        assert main(["sample", *lora, *MODEL, *DRAWN, "--prompt", "a red circle", "--images", "2", "--output", output]) == 0
        pictures.append(Path(output).read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run's folder, or a LoRA with --lora"),
        (["runs/a", "--lora", "x"], "--lora: goes in place of the run runs/a"),
        (["--lora", "x"], "say which model it is of, with --config, or with --model and --path"),
        (["--lora", "x", "--model", "sd3"], "say which model it is of"),
        (["--lora", "x", *MODEL], "--model: says nothing of what to draw and how to score it"),
        (["--lora", "/no/such", *MODEL, *REWARD, "--prompts", "PROMPTS"], "/no/such: no such file or folder"),
    ],
)
def test_what_the_arguments_do_not_say_is_asked_for(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("a red circle\n")
    assert main(["eval", *(str(tmp_path / "a.txt") if one == "PROMPTS" else one for one in arguments)]) == 2
    assert message in capsys.readouterr().err
