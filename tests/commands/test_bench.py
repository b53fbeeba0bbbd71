"""`fastgrpo bench`: what it writes follows from what it counted and timed, and what fails is said."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.helpers import ROOT
from support.runs import ForkServer
from support.tiny_model import load_tiny_model
from torch import nn

from fastgrpo import measure
from fastgrpo.commands.bench import Bench, Record, bench_config
from fastgrpo.commands.cli import main
from fastgrpo.commands.plan import count_model, flops_per_image
from fastgrpo.engine.ranks import OneRank
from fastgrpo.validation import ConfigError

CONFIG = ROOT / "configs" / "tiny_shapes_grpo.yaml"
SMALL = [
    "rollout.batch_size=4", "rollout.group_size=6", "rollout.num_steps=4", "rollout.window={kind: fixed, start: 1, size: 2}"
]  # fmt: skip
ITERATIONS, BATCHES = 2, (3, 1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> tuple[str, dict]:
    """What one run printed and wrote."""
    path = tmp_path_factory.mktemp("bench") / "small.json"
    settings = [part for setting in SMALL for part in ("--set", setting)]
    options = ["--iterations", str(ITERATIONS), "--rounds", "2", "--json", str(path), "--batches", *map(str, BATCHES)]
    printed = fork_server.run("bench", "--config", str(CONFIG), *options, *settings)
    return printed, json.loads(path.read_text())


@pytest.mark.processes
def test_everything_measured_is_printed_and_written(measured: tuple[str, dict]) -> None:
    printed, result = measured
    names = [row["name"] for row in result["measurements"]]
    assert names == ["model", "iteration 1", "iteration 2", "rollout, eager, batch 3", "rollout, eager, batch 1"]
    assert all(f"\n{name}  " in printed for name in names[1:]) and "small.json" in printed.splitlines()[-1]
    assert result["machine"]["packages"]["torch"] == torch.__version__
    assert result["configuration"]["rollout"]["batch_size"] == 4


@pytest.mark.processes
def test_speeds_are_images_over_seconds_and_flops_over_the_peak(measured: tuple[str, dict]) -> None:
    rows = {row["name"]: row for row in measured[1]["measurements"]}
    config = bench_config(CONFIG, SMALL, random_weights=False, output=Path("unused"))
    counts, peak = count_model(config, load_tiny_model()), rows["model"]["peak_flops"]
    for n in range(1, ITERATIONS + 1):
        row = rows[f"iteration {n}"]
        assert (row["images"], row["warms_up"], row["first_ratio_deviation"]) == (24, n == 1, 0.0)
        assert row["images_per_second"] == pytest.approx(24 / row["seconds"], rel=1e-3)
        busy = row["seconds"] - row["phases"]["reward"]
        assert row["images_per_second_without_reward"] == pytest.approx(24 / busy, rel=1e-2)
        work = 24 * sum(flops_per_image(config, counts).values())
        assert row["mfu"] == pytest.approx(work / busy / peak, rel=2e-2, abs=1e-4)
        assert sum(row["phases"].values()) <= row["seconds"]
    for batch in BATCHES:
        row = rows[f"rollout, eager, batch {batch}"]
        assert row["images_per_second"] == pytest.approx(batch / (4 * row["ms_per_step"] / 1e3), rel=1e-2)
        assert row["mfu"] == pytest.approx(
            batch * counts.forward_flops / (row["ms_per_step"] / 1e3) / peak, rel=2e-2, abs=1e-4
        )
        assert row["launch_ms_per_step"] <= row["ms_per_step"]


@pytest.mark.parametrize(
    ("batch", "steps", "group", "images"), [(4, 2, 6, 24), (8, 2, 24, 48), (64, 2, 16, 128), (4, 1, 4, 4), (5, 1, 2, 10)]
)
def test_an_iteration_is_the_smallest_whole_one(batch: int, steps: int, group: int, images: int) -> None:
    settings = [f"rollout.batch_size={batch}", f"rollout.group_size={group}", f"update.steps_per_rollout={steps}"]
    config = bench_config(CONFIG, settings, random_weights=False, output=Path("unused"))
    assert config.rollout.groups * config.rollout.group_size == images and not config.update.skip_dead
    asked = bench_config(CONFIG, [*settings, f"rollout.groups={images}"], random_weights=False, output=Path("unused"))
    assert asked.rollout.groups == images


def test_random_weights_leave_nothing_on_disk() -> None:
    config = bench_config(ROOT / "configs" / "sd3_compressibility.yaml", [], random_weights=True, output=Path("unused"))
    assert config.model.random_weights and config.prompts.cache is None


def test_what_checkpointing_computes_again_is_no_work_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """MFU would otherwise rise as a run gets slower."""
    config = bench_config(
        CONFIG, [*SMALL, "update.gradient_checkpointing=true"], random_weights=False, output=Path("unused")
    )
    counts = count_model(config, load_tiny_model())
    monkeypatch.setattr("fastgrpo.commands.bench.Trainer", lambda *_, **__: None)
    bench = Bench(config, OneRank(), lambda *_, **__: None, counts)
    per_image = flops_per_image(config, counts)
    assert per_image["checkpoints"] > 0 and bench.flops == sum(per_image.values()) - per_image["checkpoints"]


def bench_of(blocks: list[nn.Module]) -> tuple[Bench, list[tuple[str, dict]]]:
    """One without a trainer, and what it says."""
    said: list[tuple[str, dict]] = []
    bench = object.__new__(Bench)
    bench.say, bench.compiled = lambda name, **values: said.append((name, values)), []
    model = SimpleNamespace(blocks=blocks, compile=lambda: [block.compile(backend="eager") for block in blocks])
    bench.trainer = SimpleNamespace(model=model)
    return bench, said


@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_form_has_its_blocks_compiled_or_not_whatever_the_configuration_says(compiled_before: bool) -> None:
    blocks = [nn.Linear(2, 2) for _ in range(2)]
    bench, _ = bench_of(blocks)
    if compiled_before:
        bench.model.compile()
    before = [block._compiled_call_impl for block in blocks]
    kept = []
    for _ in range(2):
        with bench.compiled_blocks(compiled=True):
            kept.append([block._compiled_call_impl for block in blocks])
        with bench.compiled_blocks(compiled=False):
            assert [block._compiled_call_impl for block in blocks] == [None, None]
    assert kept[0] == kept[1] and None not in kept[0], "compiled once, and kept"
    assert [block._compiled_call_impl for block in blocks] == before


def test_a_form_that_fails_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def rollout(self: Bench, form: str, batch: int, rounds: int) -> dict:
        if form == "captured":
            raise torch.OutOfMemoryError("more than there is")
        return {"ms_per_step": batch}

    monkeypatch.setattr(Bench, "_rollout", rollout)
    bench, said = bench_of([])
    forms = ("eager", "captured", "compiled")
    bench.rollouts(forms, (8, 1))
    assert [name for name, _ in said] == [f"rollout, {form}, batch {batch}" for batch in (8, 1) for form in forms]
    errors = [values.get("error") for _, values in said]
    assert errors == [None, "OutOfMemoryError: more than there is", None] * 2


def test_a_killed_run_leaves_what_it_had(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = Record(tmp_path / "b.json", {"name": "mine"})
    record("rollout, captured, batch 8", error="RuntimeError: no\nsecond line")
    assert json.loads((tmp_path / "b.json").read_text())["measurements"] == [
        {"name": "rollout, captured, batch 8", "error": "RuntimeError: no\nsecond line"}
    ]
    assert capsys.readouterr().out.rstrip().endswith("RuntimeError: no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--forms", "graph"], "--forms 'graph': unknown; there are 'eager', 'captured', 'compiled', 'captured, compiled'"),
        (["--json", "no/such/bench.json"], "--json no/such/bench.json: there is no folder"),
        (["--random-weights"], "model.random_weights = True: name the model.architecture"),
        (["--set", "rollout.num_step=3"], "did you mean 'num_steps'"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--config", str(CONFIG), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can capture")
def test_a_graph_on_a_cpu_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--config", str(CONFIG), "--forms", "captured, compiled"]) == 2
    assert "'captured, compiled': a CUDA graph needs a GPU; take eager or compiled" in capsys.readouterr().err


def test_a_known_card_is_held_against_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(measure, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert measure.peak_flops(torch.bfloat16) == (989e12, "data sheet of H100, dense bf16")
    assert measure.peak_bandwidth()[0] == 3.35e12


def test_another_device_is_held_against_what_it_was_seen_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of several products, each of 2 n^3 operations, the last of them at 1024: larger ones would take too long."""
    milliseconds = iter([2.0, 8.0, 30.0, 1000.0])
    monkeypatch.setattr(measure, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(measure, "timed", lambda function: {"min": next(milliseconds), "ms": 4000.0})
    flops, source = measure.peak_flops(torch.float32)
    assert flops == pytest.approx(2 * 1024**3 / 30e-3) and source.endswith("square matrices in float32")
    assert measure.peak_bandwidth()[0] == 2 * 4 * 2**26


def test_all_images_of_a_benchmark_have_one_size_the_first_or_the_one_that_is_named(tmp_path: Path) -> None:
    sizes = "rollout.sizes=[[512, 768], {height: 768, width: 512, weight: 3}]"
    for named, size in ((None, (512, 768)), ("768x512", (768, 512))):
        config = bench_config(CONFIG, [sizes], random_weights=False, output=tmp_path, size=named)
        assert (config.model.height, config.model.width) == size and not config.rollout.sizes
    with pytest.raises(ConfigError, match=r"--size 9x9: is not in rollout\.sizes; there are 512x768, 768x512"):
        bench_config(CONFIG, [sizes], random_weights=False, output=tmp_path, size="9x9")
    with pytest.raises(ConfigError, match=r"there are none, so set model\.height"):
        bench_config(CONFIG, [], random_weights=False, output=tmp_path, size="9x9")
