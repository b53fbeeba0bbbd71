"""The rollout as CUDA graphs: captured once a shape, then replayed.

    new shape     copy the inputs to places of their own, run twice to warm up, capture
    every call    copy the inputs to those places, replay, copy the result out

A graph reads by address. Prompts, windows, coefficients and noise addresses lie in device tensors, which a call fills anew;
the weights are those that the optimiser updates in place (ZeRO-1 and 2), so a replay follows training by itself. All graphs
share one pool of memory: nothing of one has to outlive the replay of another, as results are copied out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgrpo.records import Rollout, Steps
from fastgrpo.sampling.rollout import rollout
from fastgrpo_kernels import NoiseAddress

WARM_UPS = 2  # Triton compiles, cuBLAS makes its workspaces and lazy modules load before a capture, not in it

Capture = Callable[[Callable[[], Rollout]], tuple[Rollout, Callable[[], None]]]


class CudaCapture:
    """Runs a function to warm up, then records it: its result, in places that each replay fills, and the replay."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Rollout]) -> tuple[Rollout, Callable[[], None]]:
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
    policy: nn.Module  # held, so that its id is no other's
    inputs: tuple[Tensor, ...]
    result: Rollout
    replay: Callable[[], None]


class CapturedRollout:
    """`fastgrpo.sampling.rollout.rollout`, its arguments and its result, bit for bit, from graphs.

    One graph a policy and a set of shapes, dtypes and options. What Python decides inside the policy is frozen at capture:
    switch an adapter off and the graph does not follow.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._graphs: dict[tuple, _Captured] = {}

    def __call__(
        self, policy: nn.Module, steps: Steps, address: NoiseAddress, conditioning: tuple, **options: Any
    ) -> Rollout:
        inputs = _tensors(steps, address, conditioning)
        # Numbers of the steps and options count as they are: another length of the window or of the prefix is another loop.
        arguments = (_shape(value) for value in (*steps, *address, *conditioning))
        key = (id(policy), type(conditioning), *arguments, *sorted(options.items()))
        if key not in self._graphs:
            self._graphs[key] = self._record(policy, steps, address, conditioning, options)
        graph = self._graphs[key]
        for place, tensor in zip(graph.inputs, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        result = graph.result
        return Rollout(*(t.clone() for t in (result.latents, result.v_old, result.log_prob, result.final)))

    def _record(
        self, policy: nn.Module, steps: Steps, address: NoiseAddress, conditioning: tuple, options: dict[str, Any]
    ) -> _Captured:
        steps = Steps(*(value.clone().contiguous() if isinstance(value, Tensor) else value for value in steps))
        address = NoiseAddress(*(tensor.clone() for tensor in address))
        conditioning = type(conditioning)(*(tensor.clone() for tensor in conditioning))
        result, replay = self._capture(lambda: rollout(policy, steps, address, conditioning, **options))
        return _Captured(policy, _tensors(steps, address, conditioning), result, replay)


def _tensors(steps: Steps, address: NoiseAddress, conditioning: tuple) -> tuple[Tensor, ...]:
    return tuple(value for value in (*steps, *address, *conditioning) if isinstance(value, Tensor))


def _shape(value: Tensor | int | None) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def captured_or_eager(cuda_graph: bool, device: torch.device) -> tuple[Callable[..., Rollout], str]:
    """The rollout to run, and what it is, with the reason where it is not captured, for people to read."""
    if not cuda_graph:
        return rollout, "eager (rollout.cuda_graph is false)"
    if device.type != "cuda":
        return rollout, f"eager (CUDA graphs need a GPU, this is a {device.type})"
    return CapturedRollout(CudaCapture()), "captured (one CUDA graph a shape)"
