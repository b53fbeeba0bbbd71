"""The GPU suite: a phase that fails, hangs or comes too late leaves the others; and a rehearsal of what it measures."""

import json
import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from textwrap import dedent

import pytest
from support.helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_picture  # noqa: E402
from gpu_iterations import RUNS, VERL_OMNI, configuration  # noqa: E402
from gpu_suite import (  # noqa: E402
    ALONE,
    SETUP_SECONDS,
    SUMMARY_CHARACTERS,
    SUMMARY_SECONDS,
    TOGETHER,
    Phase,
    Suite,
    summary,
)

SCRIPT = """
import os, subprocess, sys, time
sys.path.insert(0, {benchmarks!r})
from gpu_phase import main

def right(phase):
    phase.record("number", value=1)

def wrong(phase):
    with phase.step("first"):
        phase.record("before", value=1)
        raise ValueError("no such thing")
    phase.check("two is three", 2 == 3, two=2)
    with phase.step("third"):
        phase.record("after", value=2)

def hangs(phase):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    phase.record("before", child=child.pid)
    time.sleep(600)

def dies(phase):
    phase.record("before", value=1)
    os.kill(os.getpid(), 9)

def lost(phase):
    class Cuda:
        is_initialized = is_available = staticmethod(lambda: True)
        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        def memory_summary(self, abbreviated):
            return "who holds what"
    sys.modules["torch"] = type("Torch", (), {{"cuda": Cuda()}})
    with phase.step("kernel"):
        raise RuntimeError("CUDA out of memory")
    phase.record("after", value=1)

if __name__ == "__main__":
    main({{f.__name__: f for f in (right, wrong, hangs, dies, lost)}})
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "phases.py"
    path.write_text(dedent(SCRIPT.format(benchmarks=str(BENCHMARKS))))
    return path


def rows(out: Path, phase: str) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line["name"]: line for line in lines if line["phase"] == phase}


def runs(pid: int) -> bool:
    """Whether the process is there, and not only waiting to be reaped."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.processes
def test_what_goes_wrong_in_a_phase_stays_there(script: Path, tmp_path: Path) -> None:
    names = ("wrong", "hangs", "dies", "lost", "right")
    wrong, hangs, dies, lost, right = (Phase(name, script, expected=1, limit=2) for name in names)
    missing = Phase("right", tmp_path / "missing.py", 1, 2)
    late = Phase("late", script, expected=10_000, limit=10_000)
    suite = Suite(200, tmp_path / "out")
    suite.run([hangs, wrong], [dies, lost, late, right])
    assert suite.statuses == {
        "hangs": "timed out", "wrong": "some failed", "dies": "exit -9", "lost": "lost the GPU", "right": "ok",
        "late": suite.statuses["late"],
    }  # fmt: skip
    assert suite.statuses["late"].startswith("not begun")

    found = rows(suite.out, "wrong")
    assert {"before", "FAILED first", "FAILED two is three", "after", "END"} == found.keys()
    assert found["FAILED first"]["error"] == "ValueError: no such thing" and found["FAILED first"]["seconds"] >= 0
    assert "raise ValueError" in found["FAILED first"]["traceback"][-1]

    assert rows(suite.out, "dies").keys() == {"before", "END"}
    log = (suite.out / "suite.log").read_text()
    assert "Timeout" in log and "in hangs" in log, "it did not say where it hung"
    assert not runs(rows(suite.out, "hangs")["before"]["child"]), "what it had started outlived it"

    found = rows(suite.out, "lost")
    assert found["FAILED kernel"]["memory_summary"] == "who holds what"
    assert "illegal memory" in found["FAILED CUDA context lost"]["error"] and "after" not in found

    broken = Suite(200, tmp_path / "again")
    broken.run([], [missing])
    assert broken.statuses == {"right": "exit 2"}
    assert "missing.py" in rows(broken.out, "right")["END"]["traceback"][-1]


def test_the_summary_is_short_and_ends_with_what_matters(tmp_path: Path) -> None:
    lines = [{"phase": "tests", "name": "END", "status": "timed out", "seconds": 1.0, "printed_last": "in test_seven"}]
    lines += [{"phase": "rollouts", "name": "FAILED batch 24", "error": "e" * 9000, "traceback": ["t" * 4000]}]
    lines += [{"phase": "rollouts", "name": f"batch {n}", "ms": n + 1 / 3, "spread": {"min": n}} for n in range(200)]
    lines += [{"phase": "kernels", "name": "a case", "detail": True, "error": 0}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = summary(tmp_path)
    assert SUMMARY_CHARACTERS / 2 < len(text) <= SUMMARY_CHARACTERS
    assert "  batch 199: ms=199.3 spread=(min=199)\n" in text and "a case" not in text and "ttt" not in text
    *_, failure, end = text.splitlines()
    assert failure.startswith("rollouts: FAILED batch 24: error=eee")
    assert end == "tests: timed out after 1.0 s in test_seven"


def test_results_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="earlier run"):
        Suite(100, tmp_path)


def test_what_is_worth_most_fits_into_500_seconds() -> None:
    """Everything before the phase called compiled, at the seconds that are expected."""
    first = list(takewhile(lambda phase: phase.name != "compiled", ALONE))
    expected = max(phase.expected for phase in TOGETHER) + sum(phase.expected for phase in first)
    assert {"rollouts", "update", "qwen", "flux"} <= {phase.name for phase in first}
    assert SETUP_SECONDS + expected + SUMMARY_SECONDS <= 500
    readme = (BENCHMARKS / "README.md").read_text()
    for phase in (*TOGETHER, *ALONE):
        assert phase.expected < phase.limit and phase.script.exists()
        assert f"| `{phase.name}` | {phase.expected} |" in readme


def test_every_run_is_of_whole_groups_and_few_images(tmp_path: Path) -> None:
    for phase, runs in RUNS.items():
        for run in runs:
            config = configuration(run, tmp_path)
            assert config.model.random_weights and config.prompts.cache is None and not config.update.skip_dead
            images = config.rollout.groups * config.rollout.group_size
            assert images % (config.rollout.batch_size * config.update.steps_per_rollout) == 0
            assert images <= (4 if phase == "models" else 48), run
    (run,) = RUNS["qwen"]
    rollout = configuration(run, tmp_path).rollout
    assert (rollout.num_steps, rollout.guidance_scale, rollout.window.size, rollout.window.range) == (10, 4, 2, (0, 5))


REHEARSED = {  # phase -> rows that must be there
    "tests": {"pytest"},
    "tiny": {"deepspeed", "last iteration", "iteration 1 against a CPU", "iteration 2 against a CPU"},
    "kernels": {"largest errors"},
    "capture": {
        "graph of noise", "graph of network, guided", "graph of a rollout", "after the LoRA moved",
        "a second shape in the pool", "first ratio, attention as chosen", "engine: graph before an update",
        "engine: replay after updates", "engine: updates show in a replay", "engine: a rollout waits for nothing",
        "engine: a new shape after updates", "first ratio, compiled",
    },
    "rollouts": {
        *(f"batch {batch}, {form}" for batch in (2, 1, 3) for form in ("diffusers", "eager", "captured")),
        "batch 2, compiled", "batch 2, captured, compiled", "batch 2, captured, fp8", "batch 2, captured, fp8, compiled",
    },
    "update": {"SD3.5-M: iteration 3", "gradient at scale 2^0", "SD3.5-M, checkpointed: iteration 1"},
    "qwen": {"Qwen-Image: model", "Qwen-Image: iteration 1", "Qwen-Image: iteration 2"},
    "compiled": {"SD3.5-M, compiled, attention by cuDNN: iteration 2", "Qwen-Image, compiled: iteration 2"},
    "profile": {"rollout of 3 steps", "forward and backward", "decoder"},
    "bandwidth": {f"{form} (2, 4, 8, 8)" for form in ("usual", "fused", "fused, guided", "fused transition")},
    "ncu": {"ncu"},
    "models": {f"{name}: iteration 2" for name in ("FLUX.1-dev", "Z-Image", "Wan2.1-1.3B", "BAGEL")},
}  # fmt: skip


@pytest.mark.processes
def test_a_rehearsal_of_what_a_gpu_will_run(tmp_path: Path) -> None:
    """The same lines, with tiny models on the CPU. Left out are phases that differ from one of these in a name alone."""
    settings = {"REHEARSE": "1", "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where the command `deepspeed` is
    done = subprocess.run(
        ["bash", "benchmarks/gpu_suite.sh", "1500", *REHEARSED], cwd=ROOT, env=os.environ | settings | {"PATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.endswith("every phase ended ok\n") and "======== summary" in done.stdout
    for phase, names in REHEARSED.items():
        found = rows(tmp_path, phase)
        assert names <= found.keys(), f"{phase}: {names - found.keys()}"
        assert found["END"]["status"] == "ok" and not [name for name in found if name.startswith("FAILED")]
    for speed in (row for phase in ("rollouts", "update", "qwen", "models") for row in rows(tmp_path, phase).values()):
        assert speed.get("images_per_second", 1) > 0 and speed.get("first_ratio_deviation", 0) == 0
    qwen = rows(tmp_path, "qwen")["Qwen-Image: iteration 2"]
    for key, published in VERL_OMNI.items():
        assert qwen[f"published_{key}"] == published
        assert qwen[f"share_of_published_{key}"] == pytest.approx(qwen[key] / published, abs=1e-3)
    assert rows(tmp_path, "tiny")["iteration 1 against a CPU"]["reward_equal"]
    assert {"trace.json.gz", "tests.log", "tiny.log", "suite.log"} <= {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) < 8, "eight files come back, and one is the console's"


@pytest.mark.processes
def test_the_command_says_what_it_cannot_do(tmp_path: Path) -> None:
    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"} | settings
        command = ["bash", "benchmarks/gpu_suite.sh", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    unknown = run("100", "rolouts", REHEARSE="1")
    assert unknown.returncode == 2 and "'rolouts' is unknown; there are tests, tiny" in unknown.stderr
    late = run("9", "qwen", REHEARSE="1")
    assert late.returncode == 1 and "not begun" in late.stdout and "not ok: qwen" in late.stdout


def test_results_become_a_picture(tmp_path: Path) -> None:
    """Of several runs, the last number of each; what failed, was not begun or warmed up is no number."""
    first = [
        {"phase": "rollouts", "name": "batch 8, eager", "images_per_second": 9.0},
        {"phase": "rollouts", "name": "batch 8, captured, compiled", "images_per_second": 17.5},
        {"phase": "rollouts", "name": "batch 24, eager", "not_begun": "21 s were left"},
        {"phase": "update", "name": "SD3.5-M: iteration 1", "phases": {"rollout": 9.0}, "images_per_second": 1.0},
        {"phase": "models", "name": "BAGEL: iteration 2", "phases": {"rollout": 9.0}, "images_per_second": 1.0},
        {"phase": "bandwidth", "name": "fused, guided (9, 16, 64, 64)", "us": 90.0, "share of bandwidth": 0.35},
        {"phase": "bandwidth", "name": "usual (9, 16, 64, 64)", "us": 900.0},
    ]
    last = {
        "phase": "update", "name": "SD3.5-M: iteration 2", "phases": {"rollout": 4.0, "update": 5.0}, "images": 8,
        "images_per_second": 4.5, "mfu": 0.2,
    }  # fmt: skip
    for name, lines in (("results.jsonl", first), ("results_2.jsonl", [last])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = gpu_picture.read(tmp_path)
    assert gpu_picture.speeds(rows) == {"eager": {"8": 9.0}, "captured, compiled": {"8": 17.5}}
    assert gpu_picture.iterations(rows) == {"SD3.5-M": last}
    assert gpu_picture.shares(rows) == {"fused, guided": {"9x16x64x64": 0.35}}
    assert len(gpu_picture.draw(rows).axes) == 3
    with pytest.raises(SystemExit, match=r"holds no results\*\.jsonl"):
        gpu_picture.read(tmp_path / "nothing")
