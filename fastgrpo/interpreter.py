"""The Triton kernels on a machine without a GPU: for tests, and for counts that are the same on any device.

use_interpreter()          before anything imports triton or fastgrpo_kernels
normal_triton(...)         now runs in Triton's interpreter, on CPU tensors, slowly
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, version


def use_interpreter() -> None:
    """Makes the kernels of this process run in Triton's interpreter.

    RuntimeError where triton was imported before, as that decides it for good, or where its interpreter cannot work with
    the numpy that is here.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before, as a compiler: call use_interpreter() before anything imports it")
    try:
        triton, numpy = version("triton"), version("numpy")
        if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
            raise RuntimeError(
                f"triton {triton} takes int() of arrays in its interpreter, which numpy {numpy} refuses: "
                "pip install 'numpy<2.4', or take triton>=3.7"
            )
    except PackageNotFoundError:
        pass  # torch for ROCm brings its triton under a name of its own
    os.environ["TRITON_INTERPRET"] = "1"


def _release(number: str) -> tuple[int, ...]:
    return tuple(int(part) for part in number.split(".")[:2])
