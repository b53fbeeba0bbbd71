"""Folders of checkpoints and of whole runs with damage anywhere: an older one is taken, or the run is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.drawn_run import draw_run
from support.fuzzing import as_json, damaged, damages, not_hanging, odd_json, works_or_is_refused

from fastgrpo.engine.checkpoint import Saved, load
from fastgrpo.engine.ranks import OneRank
from fastgrpo.verification import verify

FILES = ("rank_00000.safetensors", "rank_00001.safetensors", "averages.safetensors", "state.json", "COMPLETE")
PLACES = (
    *(f"checkpoints/{i}/{file}" for i in ("00002", "00004") for file in FILES), "config.yaml", "metrics.jsonl",
    "evaluations.jsonl", "faults.jsonl", "inputs.json", "summary.json", "trained.json", "best/trained.json",
    "weights.safetensors", "best/weights.safetensors", "samples/prompts.json", "prompts_train.jsonl", "prompts_eval.jsonl",
)  # fmt: skip
JSON = tuple(place for place in PLACES if place.endswith((".json", "COMPLETE")))
HANDED_OUT = (*PLACES[:10], "weights.safetensors", "best/weights.safetensors")  # of which a hash is kept


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, bytes]], Path]:
    """Makes the folder whole again but for some files."""
    folder = tmp_path_factory.mktemp("damaged") / "run"

    def make(contents: dict[str, bytes]) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return folder

    return make


def check(folder: Path, whole: Path, contents: dict[str, bytes]) -> None:
    """What is loaded is what was saved, whatever lies there; `verify` names what it finds and changes nothing."""
    with not_hanging():
        findings = list(verify(folder))
    changed = [name for name, content in contents.items() if content != (whole / name).read_bytes()]
    if any(name in HANDED_OUT and not name.endswith("COMPLETE") for name in changed):
        assert any(finding.fault for finding in findings)
    saved: Saved | None = works_or_is_refused(lambda: load(folder / "checkpoints", OneRank()), folder / "checkpoints")
    if saved is None:
        return
    assert saved.iteration in (2, 4)
    for name in FILES[:-1]:
        place = f"checkpoints/{saved.iteration:05d}/{name}"
        assert (folder / place).read_bytes() == (whole / place).read_bytes()
    assert saved.shards.read("master/w", 0, 4).tolist() == [float(saved.iteration)] * 4


@given(places=st.lists(st.sampled_from(PLACES), min_size=1, max_size=3, unique=True), damage=damages)
def test_bytes_of_a_run(
    places: list[str], damage: list, run: Callable[[dict[str, bytes]], Path], whole: Path, capsys: pytest.CaptureFixture
) -> None:
    contents = {place: damaged((whole / place).read_bytes(), damage) for place in places}
    check(run(contents), whole, contents)


@given(place=st.sampled_from(JSON), data=st.data())
def test_odd_values_of_a_run(place: str, data: st.DataObject, run: Callable[[dict[str, bytes]], Path], whole: Path) -> None:
    contents = {place: as_json(odd_json(data, json.loads((whole / place).read_bytes())))}
    check(run(contents), whole, contents)
