"""Helpers shared by the tests."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A batch as published at 512 px, (B, *D): too much for an interpreter of kernels.
REAL_SHAPES = ((9, 16, 64, 64),) if DEVICE == "cuda" else ()
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU can do it")
# By its own choice: how a child has Triton, and which group of processes it is in.
NOT_INHERITED = ("TRITON_INTERPRET", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(*paths: Path, device: str = "cpu", **settings: str) -> dict[str, str]:
    """What a child process is given: this one's environment, with `settings`, and one thread.

    It imports this project, then from `paths`, then what the caller's PYTHONPATH carries. It sees a GPU only for
    device="cuda", so that a test is the same on every machine.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    places = [str(path) for path in (ROOT, ROOT / "kernels", ROOT / "tests", *paths)] + [inherited.get("PYTHONPATH", "")]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
    return inherited | own | hidden | settings


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Between two sets of weights, by name."""
    assert a.keys() == b.keys()
    return sum((a[name].double() - b[name].double()).square().sum().item() for name in a) ** 0.5


class NoSync(TorchDispatchMode):
    """Fails on every operation for which the host would wait for the device, or copy data to it.

    On the CPU nothing waits, but the same operations pass through the dispatcher: so a machine without a GPU
    can prove that a loop has no host in it."""

    FORBIDDEN = frozenset(
        {
            "aten::_local_scalar_dense",  # .item(), int(t), float(t), bool(t), `if t`
            "aten::is_nonzero",
            "aten::equal",  # torch.equal
            "aten::nonzero",  # torch.where(t), indexing with a boolean mask
            "aten::masked_select",
            "aten::_unique2",
            "aten::unique_dim",
            "aten::repeat_interleave.Tensor",
            "aten::lift_fresh",  # torch.tensor(data): a copy from pageable host memory
        }
    )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.name()
        assert name not in self.FORBIDDEN and name.split(".")[0] not in self.FORBIDDEN, f"host sync: {name}"
        if name.startswith("aten::index"):
            for index in args[1] if isinstance(args[1], (list, tuple)) else ():
                assert not (isinstance(index, Tensor) and index.dtype == torch.bool), f"host sync: {name} by mask"
        return function(*args, **(kwargs or {}))
