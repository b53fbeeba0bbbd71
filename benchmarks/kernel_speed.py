"""The transition alone: `sde_step` and `transition` against eager PyTorch as it is usually written, and torch.compile.

    python benchmarks/kernel_speed.py            writes results/kernel_speed_DEVICE.{json,png}

First a trace, the same on every device: launches, syncs and bytes moved for each element. Then times by size, on a GPU as a
share of its memory bandwidth, of the bytes that the same trace counts; buffers take turns, so that none lies in the cache.
On a CPU the two functions run their torch reference and not the kernels, so there the times say nothing about the kernels,
and are left out; the kernels' launches and bytes are counted from their arguments.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import Trace, finish, pyplot
from torch import Tensor
from tqdm import tqdm

from fastgrpo.interpreter import use_interpreter

if not torch.cuda.is_available():
    use_interpreter()

from fastgrpo.measure import DEVICE, peak_bandwidth, seconds
from fastgrpo.records import noise_address
from fastgrpo.sampling import tables as sde
from fastgrpo_kernels import Guided
from fastgrpo_kernels import sde_step as public_sde_step
from fastgrpo_kernels import transition as public_transition
from fastgrpo_kernels.guidance import guided_velocity_fwd_kernel
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
GUIDANCE = 4.5
GRAPH_CALLS, TIMED_CALLS = 32, 1000  # at the least: beside so many, starting a graph and waiting for it take no time
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
        self.table = sde.coefficient_table(sde.sampler_steps("flow_sde", SIGMAS, NOISE_LEVEL)).float().to(DEVICE)
        self.rows = self.table[3].expand(batch, 4).contiguous()
        self.x, self.x_next = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
        self.v, self.v_old, self.v_uncond = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(3))
        self.address = noise_address(0, 0, 0, torch.arange(batch, device=DEVICE))


class Launches:
    """Counts the Triton launches inside it and the bytes of their (B, D) arguments, each moved once."""

    KERNELS = (
        sde_step_fwd_kernel, log_prob_fwd_kernel, transition_fwd_kernel, moments_fwd_kernel, transition_bwd_kernel,
        guided_velocity_fwd_kernel,
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


FUSED = {  # on a GPU the kernels; by name, of one set of inputs
    "fused": lambda i: public_sde_step(i.x, i.v, i.table, i.step, i.address, model_dtype=torch.bfloat16),
    "fused, guided": lambda i: public_sde_step(
        i.x, Guided(i.v, i.v_uncond, GUIDANCE), i.table, i.step, i.address, model_dtype=torch.bfloat16
    ),
    "fused transition": lambda i: public_transition(i.x_next, i.x, i.v, i.v_old, i.rows),
}
WAITS = "usual"  # for the host, which a graph cannot hold
GPU = DEVICE.type == "cuda"


def times() -> list[dict[str, Any]]:
    """On a GPU: microseconds of each form by size, and the fused ones' share of the memory bandwidth."""
    bandwidth, source = peak_bandwidth()
    rows = []
    for shape in tqdm(SIZES, desc="sizes"):
        row: dict[str, Any] = {"shape": list(shape), "bandwidth": source}
        for name, calls in calls_of(shape).items():
            found = measured(calls, math.prod(shape), bandwidth, captured=name != WAITS)
            row |= {f"{name} {key}": value for key, value in found.items()}
        rows.append(row)
    return rows


def calls_of(shape: tuple[int, ...]) -> dict[str, list[Callable[[], Any]]]:
    """Of each form as many calls as there are sets of inputs, in all more than the cache holds."""
    inputs = [Inputs(shape)]
    with Launches(math.prod(shape)) as seen:
        FUSED["fused"](inputs[0])
    if GPU:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        inputs += [Inputs(shape) for _ in range(buffer_sets(seen.bytes, cache) - 1)]
    compiled = torch.compile(table_step, dynamic=False)  # for each size by itself, which is its best
    forms = {
        WAITS: lambda i: usual_step(i.x, i.v, i.t, i.timesteps, i.sigmas),
        "compiled": lambda i: compiled(i.x, i.v, i.rows),
        **FUSED,
    }
    return {name: [partial(form, each) for each in inputs] for name, form in forms.items()}


def measured(calls: Sequence[Callable[[], Any]], elements: int, bandwidth: float, captured: bool) -> dict[str, float]:
    """Microseconds of a call; on a GPU in a graph too, and its share of the bandwidth if the trace knows its kernels."""
    turn = itertools.cycle(calls)
    row = {"us": round(seconds(lambda: next(turn)(), repeats=30) * 1e6, 2)}
    if not (GPU and captured):
        return row
    spent = graphed(calls)
    row["in a graph us"] = round(spent * 1e6, 2)
    with Launches(elements) as seen:
        calls[0]()
    if seen.launches:
        row |= {"bytes per element": round(seen.bytes / elements, 2), "sets": len(calls)}
        row["share of bandwidth"] = round(seen.bytes / spent / bandwidth, 3)
    return row


def buffer_sets(bytes_of_one: int, cache: int) -> int:
    """How many sets of inputs and outputs have to take turns so that a call finds nothing of its own in the cache.

    bytes_of_one: what one call reads and writes. cache: bytes of the device's last cache, which all sets together exceed
    three times, as a cache need not drop the oldest first.
    """
    return 3 * cache // bytes_of_one + 1


def graphed(calls: Sequence[Callable[[], Any]]) -> float:
    """Seconds of one call inside a CUDA graph that makes the calls in turn, where no launch is waited for.

    What a call returns is held until it is that call's turn again, so that others do not write where it did.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph, turns, held = torch.cuda.CUDAGraph(), math.ceil(GRAPH_CALLS / len(calls)), [None] * len(calls)
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for n, call in enumerate(calls):
                held[n] = call()
    replays = math.ceil(TIMED_CALLS / (turns * len(calls)))

    def replay() -> None:
        for _ in range(replays):
            graph.replay()

    return seconds(replay, repeats=5) / (replays * turns * len(calls))


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
    rows = times() if GPU else []
    finish("kernel_speed", {"trace": traced, "times": rows}, draw(traced))


if __name__ == "__main__":
    main()
