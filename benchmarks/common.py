"""What the benchmarks share: a counting trace, results as one JSON line and a picture."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from checkout import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.measure import DEVICE, device_name

RESULTS = ROOT / "benchmarks" / "results"


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

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
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
    result_path(name, "json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def finish(name: str, result: dict[str, Any], figure: Any = None) -> None:
    """Keep the result and its picture, and print it as one line of JSON."""
    result = keep(name, result)
    if figure is not None:
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(result_path(name, "png"), dpi=120)
    print(json.dumps(result))
