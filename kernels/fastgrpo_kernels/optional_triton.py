"""Triton; or, where it is not installed (macOS, Windows), stand-ins with which the files of the kernels can be read.

The stand-ins compute nothing: without Triton the public functions run their torch reference on every device.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError:
    HAS_TRITON = False

    class UnusableKernel:
        """What `triton.jit` makes of a function here."""

        def __init__(self, function: Callable[..., Any]) -> None:
            self.name = function.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> NoReturn:
            raise RuntimeError(
                f"{self.name} needs Triton, which is not installed: install it, or call the public functions "
                "(normal, sde_step, transition, guided_velocity), which then run their torch reference"
            )

    triton = SimpleNamespace(jit=UnusableKernel)
    tl = SimpleNamespace(constexpr=lambda value: SimpleNamespace(value=value))

__all__ = ["HAS_TRITON", "tl", "triton"]
