"""Files of tensors that a run's folder or a cache may hold: LoRAs, whole transformers, embeddings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from support.fuzzing import as_json, damaged, damages, odd_json, odd_texts, works_or_is_refused
from torch import Tensor, nn

from fastgrpo.data.embeddings import Embeddings
from fastgrpo.engine.ranks import OneRank
from fastgrpo.models.folder import check_file
from fastgrpo.models.headers import read_header
from fastgrpo.models.lora_file import read_lora
from fastgrpo.models.trained import check_state
from fastgrpo.tensor_files import read_tensors

SHAPES = ((), (0,), (1,), (2, 4), (4, 2), (3, 2), (2, 3), (2, 2, 2), (1, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
NAMES = ("transformer.0.lora_A.weight", "transformer.0.lora_B.weight", "0.weight", "0.bias", "text", "mask", "x")
SAID = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.target_modules": ["0"], "transformer.use_dora": False}

tensors = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), st.sampled_from(SHAPES), st.sampled_from(DTYPES))


class Conditioning(NamedTuple):
    text: Tensor  # (B, 3)
    mask: Tensor  # (B,) bool


class Model:
    """As far as embeddings need one."""

    Conditioning, dtype, device, encoder_settings, encoders = Conditioning, torch.float32, torch.device("cpu"), (), ()

    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning(torch.ones(len(prompts), 3), torch.ones(len(prompts), dtype=torch.bool))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


def lora() -> dict[str, Tensor]:
    return {"transformer.0.lora_A.weight": torch.zeros(2, 4), "transformer.0.lora_B.weight": torch.zeros(3, 2)}


def content(weights: dict[str, Tensor], said: Any = SAID) -> bytes:
    return save(weights, metadata={"format": "pt", "lora_adapter_metadata": as_json(said).decode()})


def check_lora(file: Path, network: nn.Module) -> None:
    read = works_or_is_refused(lambda: read_lora(file, network), file)
    if read is not None:
        assert read.layers["0"].b.shape == (3, read.rank)


def embeddings(file: Callable[[Path], None], folder: Path) -> None:
    """Puts a file where the embeddings of a prompt are looked for, and asks for them."""
    cache = Embeddings(Model(), folder)
    cache.prepare(["a", "b"], OneRank())
    for place in folder.rglob("*.safetensors"):
        if place.stem == max(one.stem for one in folder.rglob("*.safetensors")):
            file(place)
    works_or_is_refused(lambda: cache.prompted(["a", "b"], 1.0), folder)


@given(damage=damages)
def test_bytes_of_a_lora(damage: list, network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "pytorch_lora_weights.safetensors"
    file.write_bytes(damaged(content(lora()), damage))
    check_lora(file, network)


@given(damage=damages, data=st.data())
def test_heads_of_weights(damage: list, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a folder's check reads of them, and makes tensors of on the meta device: damaged bytes, and odd JSON."""
    file = tmp_path_factory.getbasetemp() / "head.safetensors"
    whole = content(lora())
    end = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        head = as_json(odd_json(data, json.loads(whole[8:end])))
        whole = len(head).to_bytes(8, "little") + head + whole[end:]
    file.write_bytes(damaged(whole, damage) if data.draw(st.booleans()) else whole)
    if works_or_is_refused(lambda: check_file(file, file.parent, "model.path = x") == {}, file.name):
        assert all(torch.empty(held.shape, device="meta").shape == held.shape for held in read_header(file).values())


@given(
    weights=st.dictionaries(st.sampled_from(NAMES) | odd_texts.filter(str.isprintable), tensors, max_size=3), data=st.data()
)
def test_contents_of_a_lora(
    weights: dict, data: st.DataObject, network: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "pytorch_lora_weights.safetensors"
    said = odd_json(data, SAID) if data.draw(st.booleans()) else SAID
    file.write_bytes(content({**(lora() if data.draw(st.booleans()) else {}), **weights}, said))
    check_lora(file, network)


@given(weights=st.dictionaries(st.sampled_from(NAMES), tensors, max_size=3), damage=damages | st.just([]))
def test_whole_transformers(
    weights: dict, damage: list, network: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "model.safetensors"
    file.write_bytes(damaged(save({**network.state_dict(), **weights}), damage))
    state = works_or_is_refused(lambda: read_tensors(file)[0], file)
    if state is not None and works_or_is_refused(lambda: check_state(file, state, network) or True, file):
        network.load_state_dict(state)


@given(damage=damages)
def test_bytes_of_embeddings(damage: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cache")
    embeddings(lambda place: place.write_bytes(damaged(place.read_bytes(), damage)) and None, folder)


@given(held=st.dictionaries(st.sampled_from(NAMES), tensors, max_size=3))
def test_contents_of_embeddings(held: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cache")
    embeddings(lambda place: save_file(held, place), folder)


def test_what_the_properties_start_from_is_good(network: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "lora").write_bytes(content(lora()))
    read = read_lora(tmp_path / "lora", network)
    assert read.layers.keys() == {"0"} and read.rank == 2
    assert json.loads(as_json(SAID)) == SAID
