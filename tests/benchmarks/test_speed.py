"""The benchmarks of speed measure what they say: counts by hand, buffers that no cache holds, and rows whatever fails."""

import json
import re
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import common
import kernel_speed
import rollout_speed
from common import Trace
from kernel_speed import Inputs, Launches, buffer_sets, graphed, trace

from fastgrpo_kernels import Guided, guided_velocity_triton, sde_step_triton, transition_triton


def test_a_trace_counts_what_a_gpu_would_do() -> None:
    """One product and one sum are launched, one number is waited for; a view is free."""
    a = torch.ones(10, 4)
    with Trace() as seen:
        (a * a).view(40).sum().item()
    assert (seen.launches, seen.syncs) == (2, 1)
    assert seen.bytes == 2 * 160 + 160 + 4  # a read once and a * a written; a * a read and its sum written


def test_one_transition_is_two_launches_and_no_sync() -> None:
    counts = trace()
    assert counts["rollout, fused"] == {"launches": 2, "syncs": 0, "bytes_per_element": 12.0}
    assert counts["update, fused"]["launches"] == 3 and counts["update, fused"]["syncs"] == 0
    assert counts["rollout, usual"]["syncs"] == 19 and counts["rollout, usual"]["launches"] > 50
    assert counts["rollout, usual"]["bytes_per_element"] > 100


def test_bytes_of_a_launch_are_those_of_its_arguments() -> None:
    """x and v are read, x' and its bf16 copy written; under guidance also v_uncond read and the guided v written in fp32."""
    shape = (2, 4, 8, 8)
    i, count = Inputs(shape), 2 * 4 * 8 * 8
    guided, found = Guided(i.v, i.v_uncond, 4.5), []
    for call in (
        partial(sde_step_triton, i.x, i.v, i.table, i.step, i.address, model_dtype=torch.bfloat16),
        partial(sde_step_triton, i.x, guided, i.table, i.step, i.address, model_dtype=torch.bfloat16),
        partial(transition_triton, i.x_next, i.x, i.v, i.v_old, i.rows),
        partial(transition_triton, i.x_next, i.x, guided, i.v_old, i.rows),
    ):
        with Launches(count) as seen:
            call()
        assert seen.launches == 2
        found.append(seen.bytes / count)
    assert found == [4 + 2 + 4 + 2, 4 + 2 + 2 + 4 + 2 + 4, 4 + 4 + 2 + 2, 4 + 4 + 2 + 2 + 2]
    with Launches(count) as seen:
        guided_velocity_triton(guided)
    assert (seen.launches, seen.bytes / count) == (1, 2 + 2 + 4)


def test_buffers_exceed_the_cache_three_times() -> None:
    megabyte = 2**20
    assert buffer_sets(megabyte, 50 * megabyte) == 151
    assert buffer_sets(800 * megabyte, 50 * megabyte) == 1
    for one in (1, 1000, 786_432, 7_077_888):
        assert (buffer_sets(one, 52_428_800) - 1) * one <= 3 * 52_428_800 < buffer_sets(one, 52_428_800) * one


@pytest.mark.parametrize("sets", [1, 3, 40])
def test_a_graph_holds_what_the_other_calls_wrote(monkeypatch, sets: int) -> None:
    """With a stand-in for CUDA's graphs: all calls take turns in it, each beside the outputs of all others."""
    captured, replayed, outputs = [], [], {}

    def call(n: int) -> torch.Tensor:
        outputs[n] = weakref.ref(written := torch.zeros(1))
        captured.append((n, {m for m, output in outputs.items() if output() is not None}))
        return written

    def capture(_) -> nullcontext:
        captured.clear()  # what was run to warm up
        return nullcontext()

    for name, value in {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "current_stream": lambda: None,
        "stream": lambda _: nullcontext(), "synchronize": lambda: None, "graph": capture,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replayed.append(1)),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def seconds(function, **_) -> float:
        """A clock on which each captured call takes 2."""
        function()
        return 2.0 * len(captured) * len(replayed)

    monkeypatch.setattr(kernel_speed, "seconds", seconds)
    assert graphed([partial(call, n) for n in range(sets)]) == 2.0
    assert len(captured) >= 32 and len(captured) * len(replayed) >= 1000
    assert [n for n, _ in captured] == list(range(sets)) * (len(captured) // sets)
    assert all(alive == set(range(sets)) for _, alive in captured[sets:])


def test_a_form_that_fails_leaves_the_others_their_numbers(monkeypatch) -> None:
    """One at once, one in the middle, and one whose model could not be made; a warm-up counts for nothing."""
    turns = dict.fromkeys(("diffusers", "at once", "in the middle", "eager"), 0)

    def form(name: str, fails_at: int = 100) -> None:
        turns[name] += 1
        if turns[name] == fails_at:
            raise torch.OutOfMemoryError(f"{name} does not fit")

    def seconds(function, **_) -> float:
        function()
        return 100.0 if max(turns.values()) <= rollout_speed.WARM_UPS else 4.0

    monkeypatch.setattr(rollout_speed, "seconds", seconds)
    functions = {
        "diffusers": partial(form, "diffusers"), "at once": partial(form, "at once", 1), "not made": "ValueError: no units",
        "in the middle": partial(form, "in the middle", 4), "eager": partial(form, "eager"),
    }  # fmt: skip
    measured = rollout_speed.measure(functions, rounds=3)
    assert turns == {"diffusers": 5, "at once": 1, "in the middle": 4, "eager": 5}
    row = rollout_speed.row_of(measured, batch=8, num_steps=10, guidance=1.0, work=0.01)
    whole = {"images_per_second": 2.0, "ms_per_step": 400.0, "mfu": 0.2, "speedup_over_diffusers": 1.0}
    assert row == {
        "batch": 8, "steps": 10, "guidance": 1.0, "diffusers": whole, "eager": whole,
        "at once": {"error": "OutOfMemoryError: at once does not fit"}, "not made": {"error": "ValueError: no units"},
        "in the middle": {"error": "OutOfMemoryError: in the middle does not fit"},
    }  # fmt: skip
    without = rollout_speed.row_of({"diffusers": "Error: gone", "eager": 4.0}, 8, 10, 1.0, 0.01)
    assert without["eager"]["images_per_second"] == 2.0 and "speedup_over_diffusers" not in without["eager"]
    bars = rollout_speed.draw([{"resolution": 512, "rows": [row]}]).axes[0].containers
    assert [bool(form[0].get_height() > 0) for form in bars] == [True, False, False, False, True]


def test_a_run_that_is_killed_leaves_the_rows_it_had(monkeypatch, tmp_path: Path, capsys) -> None:
    """The form that a torch without 8-bit products cannot make has its error there, too."""

    def refusing(*_: torch.Tensor, **__: object) -> torch.Tensor:
        raise RuntimeError("no 8-bit rows here")

    def killed(*_: object, measure=rollout_speed.measure) -> dict:
        monkeypatch.setattr(rollout_speed, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        return measure(*_)

    monkeypatch.setattr(torch, "_scaled_mm", refusing)
    monkeypatch.setattr(rollout_speed, "measure", killed)
    monkeypatch.setattr(rollout_speed, "peak_flops", lambda _: (1e9, "made up"))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    options = "--model tiny --batches 2 1 --steps 3 --guidance 1 --rounds 1 --no-compile --fp8"
    monkeypatch.setattr(sys, "argv", ["rollout_speed.py", *options.split()])
    with pytest.raises(KeyboardInterrupt):
        rollout_speed.main()
    (printed,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    (result,) = json.loads(next(tmp_path.glob("rollout_speed_*.json")).read_text())["results"]
    assert result["rows"] == [printed] and printed["batch"] == result["phase_batch"] == 2
    assert printed["eager"]["images_per_second"] > 0 and set(result["phase_seconds"]) == {"network", "transition", "decoder"}
    assert re.search(r"ValueError: rollout\.precision = 'fp8'.*no 8-bit rows here", printed["fp8"]["error"])
