"""Everything that needs a GPU, in phases, for a machine that is lent for minutes:   bash benchmarks/gpu_suite.sh 500

Every phase is a process. All start at once, import what they need (slow, and nothing for a GPU to do), and wait for their
turn. What only has to be right takes its turn first and together; what is timed has the GPU to itself, one after the other
in the order of its value. Each has a limit of its own: one that fails, hangs or loses the GPU leaves the others running, and
what it had found by then is written down. In $OUT:

    results.jsonl    every number, see gpu_phase.py; of each phase a last line END with its status
    suite.log        what this program and all phases printed
    ...              what single phases leave: tests.log, tiny.log, longer.log, trace.json.gz, ncu.csv

The exit status is 0 if every phase ended "ok".
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gpu_phase import LONG, LOST_GPU, REHEARSE, ROOT, SOME_FAILED, append

HERE = Path(__file__).resolve().parent
READY_SECONDS = 90  # at most, from start to READY
SUMMARY_SECONDS = 8  # kept for the end
GRACE_SECONDS = 5  # a phase ends itself at its limit, and says where it was
SUMMARY_CHARACTERS = 11_000  # a summary that is longer may be cut by whoever shows the end of the output
MEANINGS = {0: "ok", SOME_FAILED: "some failed", LOST_GPU: "lost the GPU"}  # of exit statuses


@dataclass(frozen=True)
class Phase:
    name: str
    script: Path
    expected: int  # seconds that its turn takes on an H200 with 16 cores, about
    limit: int  # seconds after which it is ended


SETUP_SECONDS = 30  # until the phases are ready, with the wheels' installation
TOGETHER = (
    Phase("tests", HERE / "gpu_commands.py", 90, 130),
    Phase("tiny", HERE / "gpu_commands.py", 70, 130),
    Phase("longer", HERE / "gpu_commands.py", 100, 150),
    Phase("kernels", HERE / "gpu_kernels.py", 70, 110),
    Phase("capture", HERE / "gpu_capture.py", 110, 140),
    Phase("models", HERE / "gpu_iterations.py", 90, 130),
)
ALONE = (
    Phase("rollouts", HERE / "gpu_rollouts.py", 110, 130),
    Phase("update", HERE / "gpu_iterations.py", 60, 90),
    Phase("qwen", HERE / "gpu_iterations.py", 85, 105),
    Phase("flux", HERE / "gpu_iterations.py", 45, 70),
    Phase("profile", HERE / "gpu_rollouts.py", 16, 40),
    Phase("bandwidth", HERE / "gpu_kernels.py", 18, 45),
    Phase("compiled", HERE / "gpu_iterations.py", 170, 220),
    Phase("ncu", HERE / "gpu_commands.py", 30, 45),
)


class Process:
    """A phase's process, from its start to its end."""

    def __init__(self, phase: Phase, suite: "Suite") -> None:
        self.phase, self._suite = phase, suite
        self._ready, self._tail, self._gone = threading.Event(), deque(maxlen=15), False
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(phase.script), phase.name], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
            start_new_session=True, env=os.environ | {"OUT": str(suite.out)},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.strip() == "READY":
                self._ready.set()
            else:
                self._tail.append(line.rstrip()[:400])
                self._suite.say(f"{self.phase.name}| {self._tail[-1]}")
        self._ready.set()  # it is dead, and nobody has to wait for it

    def turn(self) -> None:
        """Its turn, as soon as it is ready, until it ends or is ended."""
        self._ready.wait(timeout=max(1, min(READY_SECONDS, self._suite.left())))
        limit = max(1, self._suite.left() if REHEARSE else min(self.phase.limit, self._suite.left()))
        self._suite.say(f"-- {self.phase.name}, {limit:.0f} s at most")
        began = time.monotonic()
        with suppress(OSError):  # it is dead, and its exit status will tell
            self._process.stdin.write(f"{limit}\n")
            self._process.stdin.flush()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=limit + GRACE_SECONDS)
        seconds, code = time.monotonic() - began, self._process.poll()
        self.end()
        self._reader.join(timeout=5)  # what it printed last
        status = MEANINGS.get(code, f"exit {code}")
        if code is None or status.startswith("exit") and seconds >= limit:
            status = "timed out"
        self._suite.ended(self.phase, status, round(seconds, 1), () if status == "ok" else tuple(self._tail))

    def end(self) -> None:
        """The process and all that it started, which its group is: compile workers, launchers, tests."""
        if self._gone:
            return
        self._gone = True
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, kind)
            except ProcessLookupError:
                break
            time.sleep(0.3)
        with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot be ended
            self._process.wait(timeout=5)


class Suite:
    """A run: its clock, its files, its phases and how they ended."""

    def __init__(self, seconds: float, out: Path) -> None:
        self.seconds, self.out, self.statuses = seconds, out, {}
        self._began, self._lock = time.monotonic(), threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        if (out / "results.jsonl").exists():
            raise SystemExit(f"error: {out} holds the results of an earlier run; set OUT to another folder, or empty it")

    def left(self) -> float:
        return self.seconds - SUMMARY_SECONDS - (time.monotonic() - self._began)

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self._began:6.1f}s] {text}"
        with self._lock, (self.out / "suite.log").open("a", encoding="utf-8") as log:
            print(line, flush=True)
            log.write(line + "\n")

    def ended(self, phase: Phase, status: str, seconds: float = 0.0, tail: Sequence[str] = ()) -> None:
        self.statuses[phase.name] = status
        last = {"printed_last": tail[-1][:150], "traceback": tail} if tail else {}
        append(self.out, {"phase": phase.name, "name": "END", "status": status, "seconds": seconds, **last})
        self.say(f"== {phase.name}: {status} after {seconds} s")

    def run(self, together: Sequence[Phase], alone: Sequence[Phase]) -> None:
        processes = {phase: Process(phase, self) for phase in (*together, *alone)}
        try:
            self._environment()
            with ThreadPoolExecutor(max_workers=len(processes)) as pool:
                list(pool.map(lambda phase: processes[phase].turn(), together))
            for phase in alone:
                if self.left() < phase.expected / 2:
                    processes[phase].end()
                    self.ended(phase, f"not begun, {self.left():.0f} s were left")
                else:
                    processes[phase].turn()
        finally:
            for process in processes.values():
                process.end()

    def _environment(self) -> None:
        """What the machine is, before anything can fail on it."""
        shown = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.limit"
        commands = {
            "gpu": f"nvidia-smi --query-gpu={shown} --format=csv,noheader",
            "cpu": "nproc; free -g | sed -n 2p; df -h /tmp | tail -1",
            "tools": "which nvcc ncu; nvcc --version | tail -2",
            "network": "ls /sys/class/net | tr '\\n' ' '",
        }
        for name, command in commands.items():
            command = f"timeout 20 sh -c {shlex.quote(command)} 2>&1"
            self._describe(name, subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True).stdout.strip())
        names = "torch triton numpy transformers diffusers deepspeed peft accelerate pydantic pytest".split()
        self._describe("packages", ", ".join(["python " + sys.version.split()[0], *(f"{n} {version(n)}" for n in names)]))

    def _describe(self, name: str, text: str) -> None:
        append(self.out, {"phase": "environment", "name": name, "text": text[:1500]})
        self.say(f"{name}: {text[:300]}")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def summary(out: Path) -> str:
    """Every number in short by phase, then what went wrong, then how the phases ended: the most important last."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["phase"] != "environment" and not row.get("detail")]
    ends = [row for row in rows if row["name"] == "END"]
    failed = [row for row in rows if row["name"].startswith("FAILED")]
    numbers = [row for row in rows if row not in ends and row not in failed]
    lines = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        lines += [phase, *(f"  {row['name']}: {_values(row)}" for row in numbers if row["phase"] == phase)]
    lines += [f"{row['phase']}: {row['name']}: {_values(row)}" for row in failed]
    lines += [f"{end['phase']}: {end['status']} after {end['seconds']} s {end.get('printed_last', '')}" for end in ends]
    return "\n".join(cut(lines, SUMMARY_CHARACTERS))


def cut(lines: list[str], characters: int) -> list[str]:
    """The lines, all at the greatest width at which they have no more characters together."""
    fits = (w for w in range(500, 10, -5) if sum(min(len(line), w) + 1 for line in lines) <= characters)
    width = next(fits, 10)
    return [line[:width] for line in lines]


def _values(row: dict) -> str:
    """What is one number first, as the end of a line may be cut off."""
    keys = [key for key in row if key not in ("phase", "name", "at", *LONG)]
    keys.sort(key=lambda key: isinstance(row[key], dict | list))
    return " ".join(f"{key}={_value(row[key])}" for key in keys)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "(" + " ".join(f"{key}={_value(each)}" for key, each in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    phases = {phase.name: phase for phase in (*TOGETHER, *ALONE)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, nargs="?", default=500.0, help="for everything, 500 by default")
    parser.add_argument("phases", nargs="*", metavar="phase", help=f"all by default: {', '.join(phases)}")
    arguments = parser.parse_args()
    for name in arguments.phases:
        if name not in phases:
            parser.error(f"phase {name!r} is unknown; there are {', '.join(phases)}")
    chosen = [phases[name] for name in arguments.phases or phases]
    suite = Suite(arguments.seconds, Path(os.environ["OUT"]))
    suite.run([p for p in chosen if p in TOGETHER], [p for p in chosen if p in ALONE])
    print(f"\n======== summary\n{summary(suite.out)}")
    wrong = [name for name, status in suite.statuses.items() if status != "ok"]
    print(f"not ok: {', '.join(wrong)}" if wrong else "every phase ended ok", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
