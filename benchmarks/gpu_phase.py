"""One phase of the GPU suite in a process of its own: how it waits for its turn and writes down what it finds.

    def speed(phase: Phase) -> None:
        for batch in (8, 1):
            with phase.step(f"batch {batch}"):
                phase.record(f"batch {batch}", ms=...)

    if __name__ == "__main__":
        main({"speed": speed})

The script imports at its top whatever is slow to import: that happens beside other phases, and may not touch the GPU. `main`
then says READY and waits on standard input for the seconds that the phase may take. By hand:

    echo 60 | OUT=/tmp/out python benchmarks/gpu_kernels.py kernels

Every number goes to $OUT/results.jsonl the moment it is known, as a line of JSON:

    phase     the phase's name
    name      what was found; "FAILED ..." says what went wrong
    at        seconds since the phase's turn began
    detail    true where a summary leaves the line out
    ...       the numbers
"""

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
REHEARSE = os.environ.get("REHEARSE") == "1"  # on a CPU with tiny models: to find mistakes before a GPU does
SOME_FAILED, LOST_GPU = 3, 4  # exit statuses
LONG = ("traceback", "memory_summary", "kernels")  # values for the file only


def append(out: Path, row: dict[str, Any]) -> None:
    """One line of results.jsonl, in one write, as several processes append to it."""
    with (out / "results.jsonl").open("ab", buffering=0) as file:
        file.write((json.dumps(row, default=str) + "\n").encode())


class Phase:
    """What a phase's function is given."""

    def __init__(self, name: str, limit: float, out: Path) -> None:
        self.name, self.limit, self.out = name, limit, out
        self.failures = 0
        self._began = time.monotonic()

    def left(self) -> float:
        """Seconds until the phase is ended."""
        return self.limit - (time.monotonic() - self._began)

    def record(self, name: str, /, **values: Any) -> None:
        append(self.out, {"phase": self.name, "name": name, "at": round(self.limit - self.left(), 1), **values})
        shown = {key: value for key, value in values.items() if key not in LONG}
        print(name, json.dumps(shown, default=str)[:360], flush=True)

    def check(self, name: str, right: bool, /, **values: Any) -> None:
        """Record it, as a failure where it is not right."""
        self.failures += not right
        self.record(name if right else f"FAILED {name}", **values)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One measurement: what goes wrong in it is written down, and the phase goes on with the next."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.check(name, False, seconds=round(time.monotonic() - began, 1), **explained(error))
            self._leave_without_gpu()

    def _leave_without_gpu(self) -> None:
        """After some errors every further call to CUDA fails in this process: leave at once, with what is written."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").item()
            torch.cuda.empty_cache()
        except Exception as error:
            self.check("CUDA context lost", False, error=str(error)[:300])
            leave(LOST_GPU)


def explained(error: Exception) -> dict[str, Any]:
    """What it takes to mend it: the message, the last frames, and of a full memory who holds it."""
    frames = traceback.extract_tb(error.__traceback__)
    found: dict[str, Any] = {
        "error": f"{type(error).__name__}: {error}"[:900],
        "traceback": [f"{short(frame.filename)}:{frame.lineno} {frame.line}" for frame in frames[-14:]],
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and "out of memory" in str(error).lower():
        found["memory_summary"] = torch.cuda.memory_summary(abbreviated=True)[:3000]
    return found


def short(filename: str) -> str:
    return filename.split("site-packages/")[-1].removeprefix(f"{ROOT}/")


def leave(status: int) -> NoReturn:
    """Without waiting for compile workers, or for NCCL to say goodbye."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(phases: dict[str, Callable[[Phase], None]]) -> NoReturn:
    """Run the phase that the command line names, when its turn comes."""
    name = sys.argv[1]
    function = phases[name]
    print("READY", flush=True)
    turn = sys.stdin.readline()
    if not turn:
        sys.exit("the suite is gone")
    phase = Phase(name, float(turn), Path(os.environ["OUT"]))
    faulthandler.dump_traceback_later(phase.limit, exit=True)  # says where it hung
    with phase.step(name):
        function(phase)
    leave(SOME_FAILED if phase.failures else 0)
