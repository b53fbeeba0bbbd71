"""What the benchmarks share: the device, honest timing, a counting trace, results as one JSON line and a picture."""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # so that a clone runs without being installed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Dense bf16 FLOP/s and bytes/s of memory, from the makers' data sheets (SXM parts).
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12), "B200": (2250e12, 8.0e12)}


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{model.group(1) if model else 'CPU'}, {torch.get_num_threads()} threads"


def peak_flops(dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s to hold a speed against, and where the number is from."""
    for name, (flops, _) in PEAKS.items():
        if DEVICE.type == "cuda" and name in device_name() and dtype != torch.float32:
            return flops, f"data sheet of {name}, dense bf16"
    n = 2048 if DEVICE.type == "cpu" else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ a, repeats=5), f"measured: {n}x{n} matmul in {dtype}"


def peak_bandwidth() -> tuple[float, str]:
    """Bytes/s of memory, and where the number is from."""
    for name, (_, bandwidth) in PEAKS.items():
        if DEVICE.type == "cuda" and name in device_name():
            return bandwidth, f"data sheet of {name}"
    a = torch.randn(1 << 26, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a), repeats=5), "measured: copy of 256 MB"


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], repeats: int, warm_ups: int = 2) -> float:
    """Median wall time of a call, the device's work included."""
    for _ in range(warm_ups):
        function()
    times = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Trace(TorchDispatchMode):
    """Counts what eager PyTorch would launch, wait for and move on a GPU, on any device.

    A launch is an operation that computes: views, allocations and metadata are none. A sync is one for whose result the host
    waits. Bytes are those of its tensors, read and written once each.
    """

    SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")
    FREE = ("aten::empty", "aten::detach", "aten::alias", "aten::_unsafe_view", "aten::lift_fresh", "aten::new_empty")

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.syncs = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        name = function.name().split(".")[0]
        if name in self.SYNCS:
            self.syncs += 1
        if name != "aten::_local_scalar_dense" and not function.is_view and not name.startswith(self.FREE):
            self.launches += 1
            self.bytes += sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, result)))
        return result


def _tensors(value: Any) -> list[Tensor]:
    """Each tensor once, however deep: an in-place operation's result is its input."""
    found: dict[int, Tensor] = {}

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif isinstance(item, dict):
            visit(list(item.values()))
        elif isinstance(item, list | tuple):
            for part in item:
                visit(part)

    visit(value)
    return list(found.values())


def pyplot() -> Any:
    """matplotlib's, drawing to files: loaded by those who draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def result_path(name: str, suffix: str) -> Path:
    """results/NAME_DEVICE.SUFFIX: one file a kind of device."""
    device = "cpu" if DEVICE.type == "cpu" else re.sub(r"\W+", "_", device_name().lower()).strip("_")
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}_{device}.{suffix}"


def keep(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result, what there is of it so far, with where it was measured; returned as it is written."""
    result = {"benchmark": name, "device": device_name(), "torch": torch.__version__, **result}
    result_path(name, "json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def finish(name: str, result: dict[str, Any], figure: Any = None) -> None:
    """Keep the result and its picture, and print it as one line of JSON."""
    result = keep(name, result)
    if figure is not None:
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(result_path(name, "png"), dpi=120)
    print(json.dumps(result))
