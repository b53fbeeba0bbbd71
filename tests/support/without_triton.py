"""Hides triton from a process, as on a system for which there is none, and runs what there is to run without it.

    PYTHONPATH=.:kernels:tests python tests/support/without_triton.py RESULTS.pt

Imports that probe for triton find that it is not installed.
"""

import sys
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import Tensor


class WithoutTriton(PathFinder):
    """Finds what `PathFinder` finds, but for triton."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)


def results(suffix: str = "") -> dict[str, Tensor]:
    """Each operation once, and the gradients of its inputs; suffix: "_ref" for the references themselves."""
    import fastgrpo_kernels as kernels

    draw = torch.Generator().manual_seed(1)
    x, x_next, v, v_uncond, v_ref = (torch.randn(3, 5, 7, generator=draw) for _ in range(5))
    table, step = torch.tensor([[0.75, -0.04, 0.70, 1.0], [0.90, -0.10, 0.39, 3.3]]), torch.tensor([1])
    address = kernels.NoiseAddress(torch.tensor([2**40 + 5]), torch.tensor([2]), torch.arange(3))
    velocity = kernels.Guided(v.bfloat16().requires_grad_(), v_uncond.bfloat16().requires_grad_(), 4.5)

    def call(name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(kernels, name + suffix)(*arguments, **options)

    with torch.no_grad():
        taken = call("sde_step", x, velocity, table, step, address, model_dtype=torch.bfloat16)
        guided, noise = call("guided_velocity", velocity), call("normal", address, step, 35)
    moments = call("transition", x_next, x, velocity, taken.v, table[step].expand(3, 4).contiguous(), v_ref=v_ref)
    torch.stack(moments).sum().backward()
    found = {f"step {name}": value for name, value in taken._asdict().items()}
    found |= {f"moment {name}": value.detach() for name, value in moments._asdict().items()}
    return found | {"guided": guided, "noise": noise, "dv": velocity.v.grad, "dv_uncond": velocity.v_uncond.grad}


if __name__ == "__main__":
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton
    torch.save(results(), sys.argv[1])

    from fastgrpo_kernels import normal_triton
    from fastgrpo_kernels.philox import NoiseAddress

    one = torch.ones(1, dtype=torch.int64)
    try:
        normal_triton(NoiseAddress(one, one, one), one, 8)
    except RuntimeError as error:
        print(error)

    from torch._subclasses.fake_tensor import FakeTensorMode

    from fastgrpo_kernels.common import runs_kernels

    # On Windows there are GPUs without Triton.
    with FakeTensorMode():
        assert not runs_kernels(torch.empty(1, device="cuda"))

    import deepspeed  # noqa: F401

    import fastgrpo.trainer  # noqa: F401

    assert "triton" not in sys.modules
