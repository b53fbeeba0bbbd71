"""The GPU suite: a phase that fails, hangs or comes too late leaves the others; and a rehearsal of what it measures."""

import json
import sys
from pathlib import Path
from textwrap import dedent

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_suite import ALONE, READY_SECONDS, SETUP, SUMMARY_CHARACTERS, SUMMARY_SECONDS, TOGETHER  # noqa: E402
from gpu_suite import Phase as Planned  # noqa: E402
from gpu_suite import Suite, summary  # noqa: E402

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


def test_what_goes_wrong_in_a_phase_stays_there(script: Path, tmp_path: Path) -> None:
    names = ("wrong", "hangs", "dies", "lost", "right")
    wrong, hangs, dies, lost, right = (Planned(name, script, expected=1, limit=2) for name in names)
    missing = Planned("right", tmp_path / "missing.py", 1, 2)
    late = Planned("late", script, expected=10_000, limit=10_000)
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
