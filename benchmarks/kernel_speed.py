"""The transition alone: `sde_step` and `transition` against eager PyTorch as it is usually written, and torch.compile.

    python benchmarks/kernel_speed.py            writes results/kernel_speed_DEVICE.{json,png}

First a trace, the same on every device: launches, syncs and bytes moved for each element. Then times by size, on a GPU as a
share of its memory bandwidth. On a CPU the two functions run their torch reference and not the kernels, so there the times
say nothing about the kernels, and are left out; the kernels' launches and bytes are counted from their arguments.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE, Trace, finish, peak_bandwidth, pyplot, seconds
from torch import Tensor
from tqdm import tqdm

from fastgrpo.interpreter import use_interpreter

if not torch.cuda.is_available():
    use_interpreter()

from fastgrpo import sde
from fastgrpo.trajectory import noise_address
from fastgrpo_kernels import sde_step as public_sde_step
from fastgrpo_kernels import transition as public_transition
from fastgrpo_kernels.sde_step import log_prob_fwd_kernel, sde_step_fwd_kernel, sde_step_triton
from fastgrpo_kernels.transition import (
    moments_fwd_kernel,
    transition_bwd_kernel,
    transition_fwd_kernel,
    transition_triton,
)

NOISE_LEVEL = 0.7
SIGMAS = torch.tensor([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0])  # SD3.5, 10 steps
TRACED = (9, 16, 64, 64)  # the published batch at 512 px
SIZES = [(1, 16, 64, 64), (9, 16, 64, 64), (64, 16, 64, 64), (64, 16, 128, 128), (256, 16, 128, 128)]


def usual_step(x: Tensor, v: Tensor, t: Tensor, timesteps: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """One Flow-SDE step as trainers write it: the schedule looked up sample by sample on the host."""
    x, v = x.float(), v.float()
    index = [(timesteps == each).nonzero()[0].item() for each in t]
    following = [i + 1 for i in index]
    sigma, sigma_next = sigmas[index].view(-1, 1, 1, 1), sigmas[following].view(-1, 1, 1, 1)
    dt, first = sigma_next - sigma, sigmas[1].item()
    std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, first, sigma))) * NOISE_LEVEL
    mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    x_next = mean + std * torch.sqrt(-dt) * torch.randn_like(x)
    return x_next, gaussian_log_prob(x_next, mean, std * torch.sqrt(-dt))


def gaussian_log_prob(x_next: Tensor, mean: Tensor, s: Tensor) -> Tensor:
    log_prob = -((x_next.detach() - mean) ** 2) / (2 * s**2) - torch.log(s) - math.log(math.sqrt(2 * math.pi))
    return log_prob.mean(dim=tuple(range(1, x_next.dim())))


def usual_ratio(x: Tensor, v: Tensor, v_old: Tensor, x_next: Tensor, c: Tensor) -> Tensor:
    """log p_new - log p_old of a stored transition, both from their means, as trainers write it."""
    c_x, c_v, s, _ = c.view(-1, 4, 1, 1, 1).unbind(1)
    new = gaussian_log_prob(x_next, c_x * x.float() + c_v * v.float(), s)
    return new - gaussian_log_prob(x_next, c_x * x.float() + c_v * v_old.float(), s).detach()


def table_step(x: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The transition without any lookup, for torch.compile at its best; torch draws the noise."""
    c_x, c_v, s, _ = rows.view(-1, 4, 1, 1, 1).unbind(1)
    eps = torch.randn_like(x)
    x_next = c_x * x + c_v * v.float() + s * eps
    log_prob = -eps.square().mean((1, 2, 3)) / 2 - torch.log(s.flatten()) - 0.5 * math.log(2 * math.pi)
    return x_next, x_next.to(v.dtype), log_prob


class Inputs:
    """Everything that the functions above and the kernels read, in bf16 and fp32 as in a rollout."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        batch = shape[0]
        self.sigmas = SIGMAS.to(DEVICE)
        self.timesteps, self.step = self.sigmas[:-1] * 1000, torch.tensor([3], device=DEVICE)
        self.t = self.timesteps[3].expand(batch)
        self.table = sde.coefficient_table("flow_sde", SIGMAS, NOISE_LEVEL).float().to(DEVICE)
        self.rows = self.table[3].expand(batch, 4).contiguous()
        self.x, self.x_next = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
        self.v, self.v_old = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(2))
        self.address = noise_address(0, 0, 0, torch.arange(batch, device=DEVICE))


class Launches:
    """Counts the Triton launches inside it and the bytes of their (B, D) arguments, each moved once."""

    KERNELS = (
        sde_step_fwd_kernel, log_prob_fwd_kernel, transition_fwd_kernel, moments_fwd_kernel, transition_bwd_kernel
    )  # fmt: skip

    def __init__(self, elements: int) -> None:
        self.launches, self.bytes, self._elements = 0, 0, elements

    def __enter__(self) -> "Launches":
        self._saved = [kernel.run for kernel in self.KERNELS]
        for kernel, run in zip(self.KERNELS, self._saved, strict=True):
            kernel.run = self._counting(run)
        return self

    def __exit__(self, *_: Any) -> None:
        for kernel, run in zip(self.KERNELS, self._saved, strict=True):
            kernel.run = run

    def _counting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            large = {t.data_ptr(): t for t in args if isinstance(t, Tensor) and t.numel() == self._elements}
            self.bytes += sum(t.nbytes for t in large.values())
            return run(*args, **kwargs)

        return counted


def trace() -> dict[str, dict[str, float]]:
    """Launches, syncs and bytes an element of one step of a rollout, and of one transition of an update with gradient."""
    shape = TRACED if DEVICE.type == "cuda" else (TRACED[0], 4, 16, 16)  # the interpreter is slow, and counts the same
    inputs, elements = Inputs(shape), math.prod(shape)
    counted = {}

    def usual_rollout() -> None:
        x_next, _ = usual_step(inputs.x, inputs.v, inputs.t, inputs.timesteps, inputs.sigmas)
        x_next.to(inputs.v.dtype)

    def usual_update() -> None:
        v = inputs.v.clone().requires_grad_()
        usual_ratio(inputs.x, v, inputs.v_old, inputs.x_next, inputs.rows).sum().backward()

    for name, function in (("rollout, usual", usual_rollout), ("update, usual", usual_update)):
        with Trace() as seen:
            function()
        counted[name] = _counts(seen.launches, seen.syncs, seen.bytes / elements)

    def fused_rollout() -> None:
        sde_step_triton(inputs.x, inputs.v, inputs.table, inputs.step, inputs.address, model_dtype=torch.bfloat16)

    def fused_update() -> None:
        v = inputs.v.clone().requires_grad_()
        moments = transition_triton(inputs.x_next, inputs.x, v, inputs.v_old, inputs.rows)
        (2 * moments.m1 - moments.m2).sum().backward()

    for name, function in (("rollout, fused", fused_rollout), ("update, fused", fused_update)):
        with Launches(elements) as seen, Trace() as host:
            function()
        counted[name] = _counts(seen.launches, host.syncs, seen.bytes / elements)
    return counted


def _counts(launches: int, syncs: int, bytes_an_element: float) -> dict[str, float]:
    return {"launches": launches, "syncs": syncs, "bytes_per_element": round(bytes_an_element, 2)}


def times() -> list[dict[str, Any]]:
    """On a GPU: microseconds of each form by size, and the fused one's share of the memory bandwidth."""
    bandwidth, source = peak_bandwidth()
    compiled = torch.compile(table_step)
    rows = []
    for shape in tqdm(SIZES, desc="sizes"):
        i = Inputs(shape)
        forms = {
            "usual": lambda i=i: usual_step(i.x, i.v, i.t, i.timesteps, i.sigmas),
            "compiled": lambda i=i: compiled(i.x, i.v, i.rows),
            "fused": lambda i=i: public_sde_step(i.x, i.v, i.table, i.step, i.address, model_dtype=torch.bfloat16),
            "fused transition": lambda i=i: public_transition(i.x_next, i.x, i.v, i.v_old, i.rows),
        }
        row: dict[str, Any] = {"shape": list(shape), "megabytes": round(i.x.numel() * 16 / 2**20, 1)}
        for name, function in forms.items():
            row[f"{name} us"] = round(seconds(function, repeats=30) * 1e6, 2)
            if name != "usual":  # it waits for the host, which a graph cannot hold
                row[f"{name} in a graph us"] = round(graphed(function) * 1e6, 2)
        # x and v read, x', its bf16 copy and v in fp32 written
        moved = i.x.numel() * (4 + 2 + 4 + 2 + 4)
        row["fused share of bandwidth"] = round(moved / (row["fused in a graph us"] / 1e6) / bandwidth, 3)
        row["bandwidth"] = source
        rows.append(row)
    return rows


def graphed(function: Callable[[], Any], calls: int = 50) -> float:
    """Seconds of a call inside a CUDA graph of many, where no launch is waited for."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return seconds(graph.replay, repeats=20) / calls


def draw(traced: dict[str, dict[str, float]]) -> Any:
    plt = pyplot()

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axes, key in zip(panels, ("launches", "syncs", "bytes_per_element"), strict=True):
        values = [counts[key] for counts in traced.values()]
        bars = axes.barh(list(traced), values, color=["#9aa5b1", "#9aa5b1", "#2f6fdb", "#2f6fdb"])
        axes.bar_label(bars, padding=3)
        axes.invert_yaxis()
        axes.set_title(key.replace("_", " ") + " of one transition")
        axes.margins(x=0.15)
    return figure


def main() -> None:
    traced = trace()
    rows = times() if DEVICE.type == "cuda" else []
    finish("kernel_speed", {"trace": traced, "times": rows}, draw(traced))


if __name__ == "__main__":
    main()
