"""Two networks that share a model's noise levels, as in Wan2.2-A14B: `Experts` is called as if they were one.

    v(x, t) = high(x, t)  where t >= boundary,  else low(x, t)          t = 1000 sigma, for each sample of a batch

Which of them a batch asks for has to be known on the host before anything is launched. Whoever has the noise levels there
says so by `asking`: a rollout, and an update, which looks once for each of its batches. Otherwise the timesteps are read,
and their device is waited for. If a batch asks for both, each runs on the whole of it, and every sample takes its own.
That costs another forward pass, and gives the numbers of a batch of one expert, because the shape is the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# Shared by the experts and the frozen copy of them that full fine-tuning keeps as its reference.
_ASKED: ContextVar[tuple[int, ...] | None] = ContextVar("asked", default=None)


class Experts(nn.ModuleDict):
    """The experts by the names of their folders in the pipeline's: `transformer` for high noise, `transformer_2` for low."""

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float) -> None:
        """boundary: the lowest timestep, from 0 to 1000, that is the high expert's."""
        super().__init__({"transformer": high, "transformer_2": low})
        self.boundary = boundary
        self.idle_on_host = False
        self._waiting: dict[str, HostWeights] = {}

    @property
    def config(self) -> Any:
        """Sizes are the same in both."""
        return self["transformer"].config

    @property
    def trained(self) -> tuple[int, ...]:
        """The experts that have something to train, by number."""
        return tuple(i for i, network in enumerate(self.values()) if any(p.requires_grad for p in network.parameters()))

    def expert_of(self, sigma: Tensor) -> Tensor:
        """The number of the expert that makes the velocity at sigma (*): 0 for high noise, 1 for low; int64."""
        return self._is_low(sigma * 1000).long()

    def _is_low(self, timestep: Tensor) -> Tensor:
        return timestep < self.boundary

    @contextmanager
    def asking(self, experts: tuple[int, ...]) -> Iterator[None]:
        """Inside, batches ask for these experts, and nobody looks."""
        token = _ASKED.set(experts)
        try:
            yield
        finally:
            _ASKED.reset(token)

    def forward(self, *, timestep: Tensor, **inputs: Any) -> tuple[Tensor]:
        """timestep: (B,) float32; inputs: the other arguments of the networks, with return_dict=False."""
        asked = _ASKED.get() or self._read(timestep)
        if self.idle_on_host and not timestep.is_meta:
            self._place(asked)
        networks: list[Any] = list(self.values())
        found = [networks[i](timestep=timestep, **inputs)[0] for i in asked]
        if len(found) == 1:
            return (found[0],)
        high, low = found
        return (torch.where(self._is_low(timestep).view(-1, *[1] * (high.dim() - 1)), low, high),)

    def _read(self, timestep: Tensor) -> tuple[int, ...]:
        """The experts that the batch asks for; all of them where there are no numbers to look at."""
        if timestep.is_meta:
            return tuple(range(len(self)))
        return tuple(sorted(set(self._is_low(timestep).long().tolist())))

    def _place(self, asked: tuple[int, ...]) -> None:
        """Have the frozen weights of these experts on the device, and those of no other.

        The backward pass of a batch must be over by then: it reads the weights again.
        """
        if not self._waiting:  # at the first batch, as DeepSpeed moves everything to the device when it starts
            self._waiting = {name: HostWeights(network) for name, network in self.items()}
        for wanted in (False, True):  # first out, then in
            for number, weights in enumerate(self._waiting.values()):
                if (number in asked) == wanted:
                    weights.move(to_device=wanted)

    def enable_gradient_checkpointing(self) -> None:
        """As that of diffusers' networks."""
        networks: list[Any] = list(self.values())
        for network in networks:
            network.enable_gradient_checkpointing()


class HostWeights:
    """The frozen weights beside a network's LoRA, with a copy on the host that takes their place while nobody needs them.

    They never change, so that the way out is no copy at all. Pinned, the way back does not wait for the device.
    """

    def __init__(self, network: nn.Module) -> None:
        # By name: while an adapter is switched off, its weights do not require a gradient either.
        self.frozen = [p for name, p in network.named_parameters() if "lora_" not in name]
        self.device, self.on_device = self.frozen[0].device, True
        self.on_host = [p.detach().to("cpu", copy=True) for p in self.frozen]
        if self.device.type == "cuda":
            self.on_host = [copy.pin_memory() for copy in self.on_host]

    def move(self, *, to_device: bool) -> None:
        """To the device, or out of its memory; nothing where they are there already."""
        if self.on_device == to_device:
            return
        for p, copy in zip(self.frozen, self.on_host, strict=True):
            p.data = torch.empty_like(copy, device=self.device).copy_(copy, non_blocking=True) if to_device else copy
        self.on_device = to_device


def experts_of(pipeline: Any, *, idle_on_host: bool = False) -> Experts | None:
    """The two transformers of a pipeline of diffusers as one; None where it has a single one.

    idle_on_host: the frozen weights of an expert that a batch does not ask for are on the host meanwhile.
    """
    low = getattr(pipeline, "transformer_2", None)
    if low is None:
        return None
    boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
    experts = Experts(pipeline.transformer, low, boundary)
    experts.idle_on_host = idle_on_host
    return experts
