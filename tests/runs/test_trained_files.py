"""What a run hands out is whole, and of its last checkpoint, whatever happened to it meanwhile."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo.trained_files import keep_trained, weights_hash, write_trained


class Model:
    """Writes a file, or for every weight a folder of two, as the families do; counts how often."""

    def __init__(self, full: bool = False) -> None:
        self.full, self.written, self.dies = full, 0, False

    def save_trained(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.written += 1
        if not self.full:
            save_file(weights, folder / "pytorch_lora_weights.safetensors")
        else:
            (folder / "transformer").mkdir()
            (folder / "transformer" / "config.json").write_text("{}")
            save_file(weights, folder / "transformer" / "model.safetensors")
        if self.dies:
            raise KeyError("killed")


def weights(value: float) -> dict[str, Tensor]:
    return {"b": torch.full((3, 2), value), "a": torch.arange(4.0)}


def file_of(folder: Path, full: bool) -> Path:
    return folder / ("transformer/model.safetensors" if full else "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("full", [False, True])
def test_it_says_what_it_is_of_and_is_left_alone_while_it_is(full: bool, tmp_path: Path) -> None:
    model = Model(full)
    for iteration in (1, 2):  # the second takes the place of the first
        write_trained(model, tmp_path, iteration, weights(iteration))
    record = json.loads((tmp_path / "trained.json").read_text())
    assert record["iteration"] == 2 and record["weights"] == weights_hash(weights(2))
    assert list(record["files"])[-1] == str(file_of(tmp_path, full).relative_to(tmp_path))
    keep_trained(model, tmp_path, 2, weights(2))
    assert model.written == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["trained.json", file_of(Path(), full).parts[0]])


def older(folder: Path, full: bool) -> None:
    shutil.copy(folder / "older", file_of(folder, full))


SPOILED = {
    "missing": lambda folder, full: file_of(folder, full).unlink(),
    "cut": lambda folder, full: file_of(folder, full).write_bytes(file_of(folder, full).read_bytes()[:-4]),
    "older": older,
    "without record": lambda folder, _: (folder / "trained.json").unlink(),
    "record cut": lambda folder, _: (folder / "trained.json").write_text('{"iteration": 2'),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("how", SPOILED)
def test_what_does_not_fit_the_checkpoint_is_written_again(how: str, full: bool, tmp_path: Path) -> None:
    model = Model(full)
    write_trained(model, tmp_path, 1, weights(1))
    shutil.copy(file_of(tmp_path, full), tmp_path / "older")
    write_trained(model, tmp_path, 2, weights(2))
    SPOILED[how](tmp_path, full)
    keep_trained(model, tmp_path, 2, weights(2))
    assert model.written == 3 and torch.equal(load_file(file_of(tmp_path, full))["b"], weights(2)["b"])


def test_other_weights_of_the_same_iteration_do_not_fit(tmp_path: Path) -> None:
    model = Model()
    write_trained(model, tmp_path, 2, weights(1))
    keep_trained(model, tmp_path, 2, weights(2))
    assert model.written == 2


def test_an_error_while_writing_leaves_the_last_ones_whole(tmp_path: Path) -> None:
    model = Model()
    write_trained(model, tmp_path, 1, weights(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.dies = True
    with pytest.raises(KeyError, match="killed"):
        write_trained(model, tmp_path, 2, weights(2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_hash_is_of_names_and_values(tmp_path: Path) -> None:
    one = weights(1)
    assert weights_hash(one) == weights_hash(dict(reversed(one.items())))
    assert len({weights_hash(w) for w in (one, weights(2), {"c": one["b"], "a": one["a"]})}) == 3
