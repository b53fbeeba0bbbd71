"""The rollout as CUDA graphs: captured once a shape, then replayed.

    new shape     copy the inputs to buffers of their own, run twice to warm up, capture
    every call    copy the inputs to those buffers, replay, copy the result out

A graph reads by address. Prompts, windows, coefficients and noise addresses lie in device tensors, which a call fills anew;
the weights are those that the optimiser updates in place (ZeRO-1 and 2), so a replay follows training by itself. All graphs
share one pool of memory: nothing of one has to outlive the replay of another, as results are copied out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.policy import Policy
from fastgrpo.records import Prompted, Schedule, Trajectory
from fastgrpo.sampling.rollout import rollout
from fastgrpo_kernels import NoiseAddress

WARM_UPS = 2  # Triton compiles, cuBLAS makes its workspaces and lazy modules load before a capture, not in it

Capture = Callable[[Callable[[], Trajectory]], tuple[Trajectory, Callable[[], None]]]


class CudaCapture:
    """Runs a function to warm up, then records it: its result, in buffers that each replay fills, and the replay."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Trajectory]) -> tuple[Trajectory, Callable[[], None]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only what this thread does can spoil the capture: not the allocation of a reward model in a thread of its own.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return result, graph.replay


class _Captured(NamedTuple):
    policy: Policy  # held, so that its id is no other's
    inputs: tuple[Tensor, ...]
    result: Trajectory
    replay: Callable[[], None]


class CapturedRollout:
    """`fastgrpo.sampling.rollout.rollout`, its arguments and its result, bit for bit, from graphs.

    One graph a policy, a size, a guidance scale and a set of shapes and dtypes. What Python decides inside the policy is
    frozen at capture: switch an adapter off and the graph does not follow.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.graphs: dict[tuple, _Captured] = {}

    def __call__(
        self, policy: Policy, schedule: Schedule, address: NoiseAddress, prompted: Prompted, guidance_scale: float
    ) -> Trajectory:
        prompted = prompted.unshared()
        values = _flat(schedule, address, prompted)
        # Numbers of the schedule count as they are: another length of the window or of the prefix is another loop. So does
        # the size: a wide image and a tall one may have latents of one shape, and other positions.
        shapes = (policy.size, policy.latent_shape, *(_shape(value) for value in values))
        key = (id(policy), type(prompted.rows), prompted.guided, guidance_scale, *shapes)
        if key not in self.graphs:
            self.graphs[key] = self._record(policy, schedule, address, prompted, guidance_scale)
        graph = self.graphs[key]
        for buffer, tensor in zip(graph.inputs, _tensors(values), strict=True):
            buffer.copy_(tensor)
        graph.replay()
        result = graph.result
        return Trajectory(*(t.clone() for t in (result.latents, result.v_old, result.log_prob, result.final)))

    def _record(
        self, policy: Policy, schedule: Schedule, address: NoiseAddress, prompted: Prompted, guidance_scale: float
    ) -> _Captured:
        schedule, address = _copied(schedule), _copied(address)
        prompted = _copied(prompted)._replace(rows=_copied(prompted.rows))
        result, replay = self._capture(lambda: rollout(policy, schedule, address, prompted, guidance_scale))
        return _Captured(policy, _tensors(_flat(schedule, address, prompted)), result, replay)


def _flat(schedule: Schedule, address: NoiseAddress, prompted: Prompted) -> tuple:
    return (*schedule, *address, *prompted.rows, prompted.cond_row, prompted.uncond_row)


def _tensors(values: tuple) -> tuple[Tensor, ...]:
    return tuple(value for value in values if isinstance(value, Tensor))


def _copied(record: Any) -> Any:
    """A NamedTuple whose tensors have memory of their own."""
    return type(record)(*(value.clone().contiguous() if isinstance(value, Tensor) else value for value in record))


def _shape(value: Tensor | float | None) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


RunRollout = Callable[[Policy, Schedule, NoiseAddress, Prompted, float], Trajectory]


def captured_or_eager(cuda_graph: bool, device: torch.device) -> tuple[RunRollout, str]:
    """The rollout to run, and what it is, with the reason where it is not captured, for people to read."""
    if not cuda_graph:
        return rollout, "eager (rollout.cuda_graph is false)"
    if device.type != "cuda":
        return rollout, f"eager (CUDA graphs need a GPU, this is a {device.type})"
    return CapturedRollout(CudaCapture()), "captured (one CUDA graph a shape)"
