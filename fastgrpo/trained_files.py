"""The trained weights that a run hands out: written whole, and never of another iteration than its last checkpoint.

    trained.json                        the iteration, a hash of the averaged weights, and of each file below
    pytorch_lora_weights.safetensors    or transformer/, and those of a second expert: what `save_trained` writes

The files are written aside and renamed, trained.json last. A run that goes on compares it with the checkpoint and with the
files, and writes them again where one is missing or does not fit: a kill between the checkpoint and here costs nothing.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgrpo.files import file_hash, json_text, json_value, move_into_place, write_atomically, writing_to
from fastgrpo.finite import check_weights
from fastgrpo.policy import Model
from fastgrpo.reporting.run_folder import RunFolder


def write_trained(model: Model, folder: Path, iteration: int, weights: Mapping[str, Tensor]) -> None:
    """Writes the averaged weights of an iteration into a run's folder. OSError names the folder if that cannot be.

    weights: parameter name in the transformer -> float32 value. NotFinite: one of them is not, and nothing is written.
    """
    check_weights("average", weights)
    aside = folder / "trained.partial"
    try:
        with writing_to(folder):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            model.save_trained(aside, weights)
            record = {"iteration": iteration, "weights": weights_hash(weights), "files": _hashes(aside)}
            for written in sorted(aside.iterdir()):
                final = folder / written.name
                if final.is_dir():  # a folder cannot be replaced by renaming
                    shutil.rmtree(final)
                move_into_place(written, final)
            write_atomically(RunFolder(folder).trained_record, json_text(record, indent=1) + "\n")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def keep_trained(model: Model, folder: Path, iteration: int, weights: Mapping[str, Tensor]) -> None:
    """Writes them again if what lies in the folder is not the whole of these weights."""
    if _record(folder).get("weights") == weights_hash(weights) and not faults_of_trained(folder, iteration):
        return
    write_trained(model, folder, iteration, weights)


def faults_of_trained(folder: Path, iteration: int | None) -> list[str]:
    """What is wrong with the trained weights in a folder: nothing, or a line for each. iteration: that they should be of."""
    record = _record(folder)
    files = record.get("files")
    if not isinstance(files, dict) or not files:
        return [f"{RunFolder(folder).trained_record.name} does not say what they are"]
    faults = [f"{name} is not what was written" for name, one in files.items() if one is None or _hash(folder / name) != one]
    if iteration is not None and record.get("iteration") != iteration:
        faults.append(f"they are of iteration {record.get('iteration')}, and should be of {iteration}")
    return faults


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """A hash of names and values, whatever the order and the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json_value(RunFolder(folder).trained_record.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _hashes(folder: Path) -> dict[str, str | None]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _hash(file) for file in files}


def _hash(file: Path) -> str | None:
    """None where there is no such file."""
    return file_hash(file) if file.is_file() else None
