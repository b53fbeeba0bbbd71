"""What a LoRA's file may say: weights of the transformer's own layers, rank and alpha, and nothing that runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgrpo.models.lora_file import Lora, read_lora

A, B = "transformer.0.lora_A.weight", "transformer.0.lora_B.weight"
GOOD = {A: torch.arange(8.0).view(2, 4), B: torch.arange(6.0).view(3, 2)}
NETWORK = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def read(tmp_path: Path, weights: dict[str, Tensor], **said: object) -> Lora:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    notes = {f"transformer.{key}": value for key, value in said.items()}
    save_file(weights, file, metadata={"lora_adapter_metadata": json.dumps(notes)} if notes else None)
    return read_lora(file, NETWORK)


def test_rank_and_alpha_are_all_that_is_taken(tmp_path: Path) -> None:
    read_plain = read(tmp_path, GOOD)
    assert read_plain.rank == 2 and torch.equal(read_plain.layers["0"].b, GOOD[B])  # without a word, alpha is the rank
    # PEFT would import a module of that name.
    said = {"r": 2, "lora_alpha": 5, "megatron_core": "os", "megatron_config": {"a": 1}, "init_lora_weights": "eva"}
    scaled = read(tmp_path, GOOD, **said).layers["0"]
    assert torch.equal(scaled.a, GOOD[A]) and torch.equal(scaled.b, GOOD[B] * 5 / 2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "holds no weights"),
        ({A: GOOD[A]}, "stands without its other half"),
        ({**GOOD, "x": torch.zeros(1)}, "'x' is no weight of a LoRA"),
        (
            {A: torch.zeros(2, 5), B: GOOD[B]},
            r"the A of 'transformer.0' is torch.float32 \(2, 5\), and the layer has 4 values",
        ),
        ({A: torch.zeros(1, 4), B: GOOD[B]}, "has rank 1 on one side and 2 on the other"),
        ({A: torch.zeros(2, 4, dtype=torch.int64), B: GOOD[B]}, "is torch.int64"),
        ({name.replace(".0.", ".1."): one for name, one in GOOD.items()}, "has no linear layer '1'"),
        ({name.replace(".0.", ".7."): one for name, one in GOOD.items()}, "has no linear layer '7'"),
    ],
)
def test_weights_of_something_else_are_refused_by_the_files_name(weights: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"pytorch_lora_weights\.safetensors: .*{message}"):
        read(tmp_path, weights)


@pytest.mark.parametrize(
    "said", [{"r": 3}, {"lora_alpha": "2"}, {"lora_alpha": 0}, {"use_dora": True}, {"rank_pattern": {"0": 1}}]
)
def test_another_formula_is_refused(said: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"its settings say .*{'rank' if 'r' in said else next(iter(said))}"):
        read(tmp_path, GOOD, **said)


def test_a_cut_file_is_refused_by_name(tmp_path: Path) -> None:
    read(tmp_path, GOOD)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is no whole file of safetensors"):
        read_lora(file, NETWORK)
