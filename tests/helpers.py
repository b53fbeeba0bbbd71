"""Helpers shared by the tests."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
                assert not (isinstance(index, Tensor) and index.dtype == torch.bool), (
                    f"host sync: {name} by mask"
                )
        return function(*args, **(kwargs or {}))
