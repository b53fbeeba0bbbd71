"""Folders of runs: what `report`, `eval` and a run that goes on read of them, damaged, odd and half written."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.fuzzing import as_json, damaged, damages, odd_json, works_or_is_refused
from support.helpers import ROOT

from fastgrpo.commands.saved_model import saved_config
from fastgrpo.reporting.report import write_report
from fastgrpo.reporting.run_folder import RunFolder, read_lines
from fastgrpo.reporting.runlog import RunLog
from fastgrpo.trained_files import keep_trained
from fastgrpo.validation import dump_config, has_trained, load_config

SCORES = {"overall": 0.5, "counting": 0.25, "colors": 0.75}
METRICS = {
    "iteration": 1, "reward": 0.5, "rewards": {"jpeg": -3.0, "tiny": 0.5}, "kl": 1e-5, "grad_norm": 0.4,
    "clip_fraction": 0.02, "zero_groups": 0.1, "images": 256, "rollout_forwards": 2560,
    "seconds": {"rollout": 2.0, "update": 1.25},
}  # fmt: skip
EVALUATION = {"iteration": 0, "accuracy": SCORES, "images": 40, "percent": ["overall"], "categories": {"a": SCORES}}
SUMMARY = {
    "base": SCORES, "final": SCORES, "base_accuracy": 0.5, "final_accuracy": 0.75, "percent": ["overall"],
    "train_seconds": 3e3, "images": 256, "seed": 0, "device": "cpu", "status": "finished", "iterations": 2,
}  # fmt: skip
PROMPTS = [{"prompt": "two <b>red</b> circles", "tag": "counting"}, {"prompt": "", "tag": "all"}]
WEIGHTS = {"lora_A": torch.zeros(2, 2)}
TRAINED = {"iteration": 2, "weights": "0" * 64, "files": {"weights.safetensors": "0" * 64}}


def rows(*some: dict) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in some)


def whole() -> dict[str, bytes]:
    """Every file of a run that people, and other programs, may have had in their hands."""
    config = load_config(ROOT / "configs" / "tiny_shapes.yaml")
    return {
        "config.yaml": dump_config(config).encode(),
        "metrics.jsonl": rows(*({**METRICS, "iteration": i} for i in (1, 2, 3))),
        "evaluations.jsonl": rows(EVALUATION, {**EVALUATION, "iteration": 2}),
        "summary.json": as_json(SUMMARY),
        "trained.json": as_json(TRAINED),
        "samples/prompts.json": as_json(PROMPTS),
        "pytorch_lora_weights.safetensors": b"",
    }


WHOLE = whole()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("picture") / "a.png"
    Image.new("RGB", (8, 8), "red").save(file)
    return file.read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, picture: bytes) -> Callable[[str, bytes], Path]:
    """Makes the folder whole again but for one file."""
    folder = tmp_path_factory.mktemp("run")
    for iteration in ("00000", "00002", "00003"):
        (folder / "samples" / iteration).mkdir(parents=True)
        for number in ("000.png", "001.png"):
            (folder / "samples" / iteration / number).write_bytes(picture)

    def make(name: str, content: bytes) -> Path:
        for file, good in {**WHOLE, "samples/00000/000.png": picture}.items():
            (folder / file).write_bytes(content if file == name else good)
        return folder

    return make


def stand_in(folder: Path, weights: dict) -> None:
    (folder / "weights.safetensors").write_bytes(b"weights")


MODEL: Any = SimpleNamespace(save_trained=stand_in)


def check(folder: Path, name: str) -> None:
    """The report shows what there is of any run; whoever goes on with it, or evaluates it, is refused by the file's name."""
    write_report(folder)
    works_or_is_refused(lambda: saved_config(folder, base=False))
    works_or_is_refused(lambda: has_trained(folder))
    for file in (RunFolder(folder).metrics, RunFolder(folder).evaluations):
        works_or_is_refused(lambda file=file: read_lines(file), file)
    if works_or_is_refused(lambda: RunLog(folder, 2), folder / name) is not None:
        assert all(row["iteration"] <= 2 for row in read_lines(RunFolder(folder).metrics))
    keep_trained(MODEL, folder, 2, WEIGHTS)
    assert json.loads(RunFolder(folder).trained_record.read_text(encoding="utf-8"))["iteration"] == 2


@given(name=st.sampled_from([*sorted(WHOLE), "samples/00000/000.png"]), damage=damages)
def test_bytes_of_a_run(name: str, damage: list, run: Callable[[str, bytes], Path], picture: bytes) -> None:
    check(run(name, damaged(WHOLE.get(name, picture), damage)), name)


@given(name=st.sampled_from(("metrics.jsonl", "evaluations.jsonl")), data=st.data())
def test_odd_rows(name: str, data: st.DataObject, run: Callable[[str, bytes], Path]) -> None:
    lines = [json.loads(line) for line in WHOLE[name].splitlines()]
    check(run(name, rows(*(odd_json(data, line) for line in lines))), name)


@given(name=st.sampled_from(("summary.json", "samples/prompts.json", "trained.json")), data=st.data())
def test_odd_values(name: str, data: st.DataObject, run: Callable[[str, bytes], Path]) -> None:
    check(run(name, as_json(odd_json(data, json.loads(WHOLE[name])))), name)
