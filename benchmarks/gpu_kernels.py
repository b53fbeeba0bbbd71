"""Phases of the GPU suite about the kernels alone.

kernels      each against its definition in float64 on the CPU, at the sizes of real models: the errors as numbers
bandwidth    microseconds of a call, and the share of what a copy does
"""

import math
from typing import Any

import torch
from gpu_phase import REHEARSE, Phase, main
from kernel_speed import WAITS, Inputs, calls_of, measured
from torch import Tensor

from fastgrpo.measure import DEVICE, seconds
from fastgrpo_kernels import Guided, NoiseAddress, sde_step, transition
from fastgrpo_kernels.philox import normal_ref, normal_triton
from fastgrpo_kernels.sde_step import sde_step_ref, sde_step_triton
from fastgrpo_kernels.transition import transition_ref, transition_triton

CUDA = DEVICE.type == "cuda"
# The published batch at 512 px, an odd one, one image at 1024 px.
SHAPES = [(2, 4, 8, 8), (3, 5, 7, 11)] if REHEARSE else [(9, 16, 64, 64), (3, 5, 7, 11), (1, 16, 128, 128)]
SPEED_SHAPES = [(2, 4, 8, 8)] if REHEARSE else [(9, 16, 64, 64), (64, 16, 64, 64), (64, 16, 128, 128), (1, 16, 64, 64)]
# Largest errors that rounding explains, those of the tests: of x' and log_prob absolute, of moments by the batch's largest.
BOUNDS = {"noise": 2e-6, "x": 5e-5, "log_prob": 1e-5, "moments": 1e-3}
TABLE = torch.tensor([[0.75, -0.04, 0.70, 1.02], [1.0, -0.2, 0.0, 0.0], [0.90, -0.10, 0.39, 3.29]])
STEP = torch.tensor([2])
GUIDANCE = 4.5


def kernels(phase: Phase) -> None:
    worst = dict.fromkeys(BOUNDS, 0.0)
    for shape in SHAPES:
        with phase.step(f"noise {shape}"):
            worst["noise"] = max(worst["noise"], noise_error(shape))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for guided in (False, True):
                name = f"{tuple(shape)} {str(dtype)[6:]}{', guided' if guided else ''}"
                with phase.step(name):
                    errors, exact = Case(shape, dtype, guided).errors()
                    shown = {key: float(f"{error:.2e}") for key, error in errors.items()}
                    phase.check(name, exact, on_policy_is_0_and_gradient_finite=exact, detail=exact, **shown)
                    worst |= {key: max(worst[key], error) for key, error in errors.items()}
    right = all(worst[key] <= bound for key, bound in BOUNDS.items())
    phase.check("largest errors", right, **{key: float(f"{error:.2e}") for key, error in worst.items()}, bounds=BOUNDS)


def address_of(batch: int, device: torch.device) -> NoiseAddress:
    """A seed past 32 bits, which is two words of a key."""
    seed, iteration = torch.tensor([2**40 + 5], device=device), torch.tensor([7], device=device)
    return NoiseAddress(seed, iteration, torch.arange(100, 100 + batch, device=device))


def noise_error(shape: tuple[int, ...]) -> float:
    size = math.prod(shape[1:])
    noise = normal_triton(address_of(shape[0], DEVICE), STEP.to(DEVICE), size).cpu()
    return largest(noise - normal_ref(address_of(shape[0], STEP.device), STEP, size))


def largest(difference: Tensor) -> float:
    """Of the absolute values; infinite where one is not finite, as no comparison finds that out."""
    return difference.abs().max().item() if difference.isfinite().all() else math.inf


class Case:
    """One transition: the kernels on the device, their definitions on the CPU."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, guided: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(shape, generator=generator)
        v, v_uncond = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        self.velocity = Guided(v, v_uncond, GUIDANCE) if guided else Guided(v)
        self.rows = TABLE[STEP].expand(shape[0], 4).contiguous()

    def errors(self) -> tuple[dict[str, float], bool]:
        """By quantity, and whether what has to be exact is: moments 0 on-policy, a gradient that is finite."""
        batch, dtype = len(self.x), self.velocity.v.dtype
        velocity, x, table, rows = moved_to(self.velocity, DEVICE), *(t.to(DEVICE) for t in (self.x, TABLE, self.rows))
        taken = sde_step_triton(x, velocity, table, STEP.to(DEVICE), address_of(batch, DEVICE), model_dtype=dtype)
        there = address_of(batch, STEP.device)
        wanted = sde_step_ref(self.x, self.velocity, TABLE, STEP, there, model_dtype=dtype)
        on_policy = transition_triton(taken.x_next, x, velocity, taken.v, rows, v_ref=taken.v)
        moved = (self.velocity.v.float() * 1.01).to(dtype).to(DEVICE).requires_grad_()
        moments = transition_triton(taken.x_next, x, velocity._replace(v=moved), taken.v, rows)
        moments.m1.sum().backward()
        exact = all(bool((m == 0).all()) for m in on_policy) and bool(moved.grad.isfinite().all())
        errors = {
            "x": largest(taken.x_next.cpu() - wanted.x_next), "log_prob": largest(taken.log_prob.cpu() - wanted.log_prob),
            "moments": self._moments_error(moments[:2], taken.x_next, velocity._replace(v=moved.detach()), taken.v),
        }  # fmt: skip
        return errors, exact

    def _moments_error(self, found: tuple, x_next: Tensor, velocity: Guided, v_old: Tensor) -> float:
        """Against float64, from the very numbers that the kernel read."""
        x_next, v_old, velocity = x_next.cpu().double(), v_old.cpu().double(), moved_to(velocity, "cpu", torch.float64)
        wanted = transition_ref(x_next, self.x.double(), velocity, v_old, self.rows.double())[:2]
        return max(largest((a.detach().cpu() - b) / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def moved_to(velocity: Guided, *target: Any) -> Guided:
    """Both velocities after `.to(*target)`."""
    return Guided(*(value.to(*target) if isinstance(value, Tensor) else value for value in velocity))


def bandwidth(phase: Phase) -> None:
    """Each form of a transition, as `kernel_speed.py` times it, beside what a plain copy does on this very card."""
    copied = copy_speed(phase) if CUDA else 1.0
    for shape in SPEED_SHAPES:
        with phase.step(f"{shape}"):
            for name, calls in calls_of(shape).items():
                with phase.step(f"{name} {shape}"):
                    phase.record(f"{name} {shape}", **measured(calls, math.prod(shape), copied, captured=name != WAITS))


def copy_speed(phase: Phase) -> float:
    """Bytes a second of a plain copy of a GiB: what the memory can do."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    speed = 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats=5)
    phase.record("copy of 1 GiB", terabytes_per_second=round(speed / 1e12, 3))
    return speed


def launch_for_counters() -> None:
    """What `ncu` looks at: each kernel at three sizes."""
    for shape in [(9, 16, 64, 64), (64, 16, 128, 128), (256, 16, 128, 128)]:
        inputs = Inputs(shape)
        sde_step(inputs.x, inputs.v, inputs.table, inputs.step, inputs.address, model_dtype=torch.bfloat16)
        v = inputs.v.requires_grad_()
        transition(inputs.x_next, inputs.x, v, inputs.v_old, inputs.rows).m1.sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main({"kernels": kernels, "bandwidth": bandwidth})
