"""The records that flow from prompts to optimiser steps. B samples, S trained steps, T steps, *D the shape of a latent.

    Prompted -> Schedule -> Trajectory -> Experience

A conditioning is a NamedTuple of tensors with the batch first, each model family's own; here only what is common to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastgrpo_kernels import NoiseAddress

C = TypeVar("C", bound=tuple)

TRAIN, EVALUATION, SAMPLE, FORWARD = range(4)  # streams of noise; those of a seed never meet
STRIDE = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples lie far apart


def take(conditioning: C, index: Tensor) -> C:
    """The rows `index` of a conditioning."""
    return type(conditioning)(*(tensor[index] for tensor in conditioning))


def concatenate(conditionings: Sequence[C]) -> C:
    """Several conditionings as one batch."""
    return type(conditionings[0])(*(torch.cat(tensors) for tensors in zip(*conditionings, strict=True)))


def noise_address(stream: int, seed: int, iteration: int, sample_id: Tensor) -> NoiseAddress:
    """Where a sample's noise lies: a function of what it is, not of when, where or beside what it is drawn."""
    device = sample_id.device
    return NoiseAddress(
        seed=torch.tensor([_key(stream, seed)], device=device),
        iteration=torch.tensor([iteration], device=device),
        sample_id=sample_id,
    )


def _key(stream: int, seed: int) -> int:
    """The 64 bits of a stream and a seed from 0 on, as the int64 of the same bits.

    A seed of 32 bits stands below its stream, so that no two such pairs have one key. A longer one fills all 64 bits, and
    its streams are `STRIDE` apart: four different keys. Two pairs can meet only where long seeds differ by exactly one, two
    or three STRIDE, or where a long seed lies within 2^34 above -STRIDE to -4 STRIDE, as one in 2^28 does.
    """
    key = stream << 32 | seed if seed < 1 << 32 else (seed + (stream + 1) * STRIDE) % (1 << 64)
    return key - (1 << 64) if key >= 1 << 63 else key


def numpy_generator(seed: int, number: int) -> np.random.Generator:
    """What draws on the host: addressed by a seed of 64 bits and the number of an iteration or an epoch."""
    # numpy would make float64 of a list with a number from 2^63 on, and lose its last bits.
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64)))


class Prompted(NamedTuple):
    """The conditioning of B samples: a row for each prompt, and which row each sample has.

    Samples of one prompt share its row, and batches of one iteration share their rows. A row a sample is made only of the
    batch that runs, by `cond` and `uncond`.
    """

    rows: tuple  # of tensors (P, ...), a row for each of P prompts
    cond_row: Tensor  # (B,) int64, each sample's row
    uncond_row: Tensor | None = None  # (B,) int64, the row that guidance compares each sample with; None: no guidance

    @classmethod
    def of(cls, cond: tuple, uncond: tuple | None = None) -> "Prompted":
        """B samples with rows of their own. cond, uncond: tensors (B, ...)."""
        number = torch.arange(len(cond[0]), device=cond[0].device)
        if uncond is None:
            return cls(cond, number)
        return cls(concatenate([cond, uncond]), number, number + len(number))

    @property
    def cond(self) -> tuple:
        """A row for each sample: tensors (B, ...)."""
        return take(self.rows, self.cond_row)

    @property
    def uncond(self) -> tuple | None:
        """What guidance compares each sample with: tensors (B, ...). None: no guidance."""
        return None if self.uncond_row is None else take(self.rows, self.uncond_row)

    @property
    def asked(self) -> tuple:
        """What the network is asked for in one pass: tensors (B, ...), under guidance (2 B, ...) with `uncond` first."""
        if self.uncond_row is None:
            return self.cond
        return take(self.rows, torch.cat([self.uncond_row, self.cond_row]))

    @property
    def guided(self) -> bool:
        """Whether the network is asked twice for each sample."""
        return self.uncond_row is not None

    @property
    def passes(self) -> int:
        """How often the network is asked for each sample."""
        return 2 if self.guided else 1

    def take(self, index: Tensor) -> "Prompted":
        """The samples `index`, in that order."""
        return self._replace(
            cond_row=self.cond_row[index], uncond_row=None if self.uncond_row is None else self.uncond_row[index]
        )

    def unshared(self) -> "Prompted":
        """The same with rows of each sample's own, so that its shapes do not tell how many prompts there are."""
        number = torch.arange(len(self.cond_row), device=self.cond_row.device)
        if self.uncond_row is None:
            return Prompted(self.asked, number)
        return Prompted(self.asked, number + len(number), number)

    def split(self, size: int) -> list["Prompted"]:
        """Batches of `size` samples in a row."""
        return [self.take(part) for part in torch.arange(len(self.cond_row), device=self.cond_row.device).split(size)]


def join_prompted(parts: Sequence[Prompted]) -> Prompted:
    """Several batches as one. Rows that all of them share stay as they are."""
    rows, starts = parts[0].rows, [0] * len(parts)
    if any(part.rows is not rows for part in parts):
        counts = [len(part.rows[0]) for part in parts]
        rows, starts = concatenate([part.rows for part in parts]), [sum(counts[:i]) for i in range(len(parts))]
    uncond = [part.uncond_row + start for part, start in zip(parts, starts, strict=True) if part.uncond_row is not None]
    return Prompted(
        rows,
        torch.cat([part.cond_row + start for part, start in zip(parts, starts, strict=True)]),
        torch.cat(uncond) if uncond else None,
    )


class Schedule(NamedTuple):
    """The steps of one batch's rollout, made in `fastgrpo.sampling.schedule`. A row is a sample's, or a group's."""

    sigmas: Tensor  # (T + 1,) float32, falling from 1, or where the rollout starts, to 0
    table: Tensor  # (B, T, 4) float32, columns c_x, c_v, s, w
    start: Tensor  # (B,) int64, first trained step
    size: int  # S
    kl_weight: Tensor  # (T,) float32, what multiplies m3 in the KL
    loss_weight: Tensor | None = None  # (B, T) float32, what multiplies a step's policy loss; None: 1
    history: Tensor | None = None  # (B, T) float32, c_p / c_x of `fastgrpo.sampling.after_window`; None: no memory
    siblings: int = 1  # number of consecutive samples that share the first one's initial noise
    prefix: int = 0  # number of steps before the window, without noise, that are computed once for all siblings
    experts: tuple[int, ...] | None = None  # (T,) that make the velocities, by number; None: the model is one network

    @property
    def num_steps(self) -> int:
        """T."""
        return self.table.shape[1]

    def to(self, device: torch.device | str) -> "Schedule":
        """The same on a device."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**moved)

    def of(self, row: Tensor) -> "Schedule":
        """The rows `row` (B,): of groups, those of their samples."""
        by_row = ("table", "start", "loss_weight", "history")
        return self._replace(**{name: rows[row] for name in by_row if (rows := getattr(self, name)) is not None})

    def forward_passes(self, batch: int) -> int:
        """How many samples go through the network in a rollout of `batch`, step by step added up."""
        return batch * (self.num_steps - self.prefix) + batch // self.siblings * self.prefix


@dataclass(frozen=True)
class Trajectory:
    """The sampled steps that are trained on, and the end. Steps come first, so that a step's batch is contiguous."""

    latents: Tensor  # (S + 1, B, *D) float32, before each trained step and after the last
    v_old: Tensor  # (S, B, *D) velocity, under guidance the guided one in float32, else in the model's dtype
    log_prob: Tensor  # (S, B) float32, mean over a latent's elements
    final: Tensor  # (B, *D) float32, sigma = 0


def only_final(x0: Tensor) -> Trajectory:
    """Latents (B, *D) that came without a trajectory."""
    nothing = x0.new_empty(0, *x0.shape)
    return Trajectory(latents=x0[None], v_old=nothing, log_prob=x0.new_empty(0, len(x0)), final=x0)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of samples, before their advantages are known."""

    sample_id: Tensor  # (B,) int64 on the CPU
    prompted: Prompted
    schedule: Schedule | None  # None: the images were given, nothing was rolled out
    trajectory: Trajectory


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Transitions to learn from: those of B samples, S each, or as a micro-batch N of them, each a sample of its own.

    Below, (*) is (S, B) or (N,), and (B) the samples: B or N.
    """

    x: Tensor  # (*, *D) float32, what the network sees
    x_next: Tensor  # (*, *D) float32, after the step; of the forward process the velocity to match
    v_old: Tensor  # (*, *D) velocity, under guidance the guided one in float32, else in the model's dtype
    sigma: Tensor  # (*) float32
    coefficients: Tensor  # (*, 4) float32, columns c_x, c_v, s, w
    kl_weight: Tensor  # (*) float32
    loss_weight: Tensor  # (*) float32
    prompted: Prompted  # of (B)
    advantages: Tensor  # (B,) float32
    weight: Tensor  # (B,) float32, 0 where a sample teaches nothing
    experts: tuple[int, ...] | None = None  # of a micro-batch: those that it asks for on any rank; None: nobody looked

    @property
    def samples(self) -> int:
        """B."""
        return len(self.advantages)

    def select(self, sample: Tensor) -> "Experience":
        """The samples (n,) with all their steps, in that order."""
        by_step = {name: getattr(self, name)[:, sample] for name in TRANSITION_FIELDS}
        return replace(self, **by_step, **self._of_samples(sample))

    def transitions(self, part: slice | Tensor) -> "Experience":
        """Some of its S B transitions, counted step by step, as a micro-batch."""
        steps, batch = self.sigma.shape
        sample = torch.arange(batch, device=self.sigma.device).repeat(steps)[part]  # (N,)
        by_transition = {name: getattr(self, name).flatten(0, 1)[part] for name in TRANSITION_FIELDS}
        return replace(self, **by_transition, **self._of_samples(sample))

    def _of_samples(self, sample: Tensor) -> dict:
        return {
            "prompted": self.prompted.take(sample),
            "advantages": self.advantages[sample],
            "weight": self.weight[sample],
        }


TRANSITION_FIELDS = ("x", "x_next", "v_old", "sigma", "coefficients", "kl_weight", "loss_weight")


def join(experiences: Sequence[Experience]) -> Experience:
    """Several batches as one."""
    by_step: dict[str, Any] = {name: torch.cat([getattr(e, name) for e in experiences], dim=1) for name in TRANSITION_FIELDS}
    return Experience(
        **by_step,
        prompted=join_prompted([e.prompted for e in experiences]),
        advantages=torch.cat([e.advantages for e in experiences]),
        weight=torch.cat([e.weight for e in experiences]),
    )
