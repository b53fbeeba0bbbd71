"""Everything that a measurement needs of the device that this process computes on: its peaks, honest times, memory."""

import importlib.metadata
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 2**30
# Dense bf16 FLOP/s and bytes/s of memory, from the makers' data sheets (SXM parts).
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12), "B200": (2250e12, 8.0e12)}
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "deepspeed", "numpy", "fastgrpo")


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    model = re.search(r"model name\s*:\s*(.+)", about)
    return f"{model.group(1) if model else 'CPU'}, {torch.get_num_threads()} threads"


def machine() -> dict[str, Any]:
    """The machine that a number was measured on: device, memory, the processor's cores, releases of what computes."""
    found: dict[str, Any] = {"device": device_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        found |= {"device_gib": round(properties.total_memory / GIB, 1), "cuda": torch.version.cuda or torch.version.hip}
    return found | {"packages": {name: _release(name) for name in PACKAGES}}


def _release(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_flops(dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s to hold a speed against, and where the number is from."""
    for name, (flops, _) in PEAKS.items():
        if DEVICE.type == "cuda" and name in device_name() and dtype != torch.float32:
            return flops, f"data sheet of {name}, dense bf16"
    best, ms = 0.0, 0.0
    for n in (256, 512, 1024, 2048, 4096, 8192):
        if ms < 20:  # the next takes eight times as long, or more
            a = torch.randn(n, n, device=DEVICE, dtype=dtype)
            ms = timed(partial(torch.mm, a, a))["min"]
            best = max(best, 2e3 * n**3 / ms)
    return best, f"measured: the fastest product of square matrices in {str(dtype).removeprefix('torch.')}"


def peak_bandwidth() -> tuple[float, str]:
    """Bytes/s of memory, and where the number is from."""
    for name, (_, bandwidth) in PEAKS.items():
        if DEVICE.type == "cuda" and name in device_name():
            return bandwidth, f"data sheet of {name}"
    a = torch.randn(1 << 26, device=DEVICE)
    b = torch.empty_like(a)
    return 2e3 * a.nbytes / timed(lambda: b.copy_(a))["min"], "measured: copy of 256 MB"


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], repeats: int, warm_ups: int = 2) -> float:
    """Median wall time of a call, the device's work included."""
    return timed(function, repeats, warm_ups)["ms"] / 1e3


def timed(function: Callable[[], Any], rounds: int = 5, warm_ups: int = 2) -> dict[str, float]:
    """Milliseconds of a call: median, least and most of its wall time with the device's work, and the median until the host
    has launched it all. Where the two medians are near each other, the device waits for the host."""
    for _ in range(warm_ups):
        function()
    whole, launch = [], []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        function()
        launch.append(1e3 * (time.perf_counter() - began))
        synchronize()
        whole.append(1e3 * (time.perf_counter() - began))
    return {
        "ms": statistics.median(whole), "min": min(whole), "max": max(whole), "launch_ms": statistics.median(launch),
    }  # fmt: skip


def memory(reset: bool = False) -> dict[str, float]:
    """GiB of the GPU: the most that tensors took, the most that torch held, and now; nothing on a CPU.

    reset: hand back what torch holds without need, and count the most anew from here on.
    """
    if DEVICE.type != "cuda":
        return {}
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    values = {
        "peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved(),
        "now_gib": torch.cuda.memory_allocated(),
    }  # fmt: skip
    return {name: round(value / GIB, 2) for name, value in values.items()}
