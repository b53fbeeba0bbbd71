"""The records that flow from rollout to update. B samples, S trained steps, *D the shape of a latent.

A conditioning is a NamedTuple of tensors with the batch first, each model family's own; here only what is common to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastgrpo_kernels import NoiseAddress

C = TypeVar("C", bound=tuple)

TRAIN, EVALUATION, SAMPLE, FORWARD = range(4)  # streams of noise that never meet


def take(conditioning: C, index: Tensor) -> C:
    """The rows `index` of a conditioning."""
    return type(conditioning)(*(tensor[index] for tensor in conditioning))


def concatenate(conditionings: Sequence[C]) -> C:
    """Several conditionings as one batch."""
    return type(conditionings[0])(*(torch.cat(tensors) for tensors in zip(*conditionings, strict=True)))


def with_unconditional(conditioning: C, unconditional: C | None) -> C:
    """Rows for classifier-free guidance: the empty prompt B times, then the B prompts; without guidance those alone."""
    if unconditional is None:
        return conditioning
    batch = len(conditioning[0])
    empty = (tensor.expand(batch, *tensor.shape[1:]) for tensor in unconditional)
    return concatenate([type(conditioning)(*empty), conditioning])


def noise_address(stream: int, seed: int, iteration: int, sample_id: Tensor) -> NoiseAddress:
    """Where a sample's noise lies: a function of what it is, not of when, where or beside what it is drawn."""
    device = sample_id.device
    return NoiseAddress(
        seed=torch.tensor([stream << 32 | seed], device=device),
        iteration=torch.tensor([iteration], device=device),
        sample_id=sample_id,
    )


class Steps(NamedTuple):
    """The coefficients of one batch's rollout."""

    sigmas: Tensor  # (T + 1,) float32, falling from 1 to 0
    table: Tensor  # (B, T, 4) float32, columns c_x, c_v, s, w
    start: Tensor  # (B,) int64, first trained step
    size: int  # S
    kl_weight: Tensor  # (T,) float32, what multiplies m3 in the KL
    loss_weight: Tensor | None = None  # (B, T) float32, what multiplies a step's policy loss; None: 1
    history: Tensor | None = (
        None  # (B, T) float32, c_p / c_x of `fastgrpo.sampling.after_window`; None: no step has a memory
    )
    siblings: int = 1  # so many samples in a row start from the noise of the first
    prefix: int = 0  # steps before the window, without noise, that are computed once for all siblings

    def to(self, device: torch.device) -> "Steps":
        return Steps(*(value.to(device) if isinstance(value, Tensor) else value for value in self))

    def of(self, row: Tensor) -> "Steps":
        """The rows `row` (B,): of groups, those of their samples."""
        by_row = ("table", "start", "loss_weight", "history")
        return self._replace(**{name: rows[row] for name in by_row if (rows := getattr(self, name)) is not None})

    def forwards(self, batch: int) -> int:
        """Rows that go through the network in a rollout of `batch` rows, which under guidance are two for each sample."""
        return batch * (self.table.shape[1] - self.prefix) + batch // self.siblings * self.prefix


@dataclass(frozen=True)
class Rollout:
    """What the behaviour policy did, as far as it is trained on. Steps come first, so that a step's batch is contiguous."""

    latents: Tensor  # (S + 1, B, *D) float32, before each trained step and after the last
    v_old: Tensor  # (S, B, *D) velocity, under guidance the guided one in float32, else in the model's dtype
    log_prob: Tensor  # (S, B) float32, mean over a latent's elements
    final: Tensor  # (B, *D) float32, sigma = 0


@dataclass(frozen=True)
class Experience:
    """One batch of transitions to learn from, S of each of B samples, in the rollout's shape where there was one."""

    x: Tensor  # (S, B, *D) float32, what the network sees
    x_next: Tensor  # (S, B, *D) float32, after the step; of the forward process the velocity to match
    v_old: Tensor  # (S, B, *D) velocity, under guidance the guided one in float32, else in the model's dtype
    sigma: Tensor  # (S, B) float32
    coefficients: Tensor  # (S, B, 4) float32, columns c_x, c_v, s, w
    kl_weight: Tensor  # (S, B) float32
    loss_weight: Tensor  # (S, B) float32
    conditioning: tuple  # of tensors (B, ...), or (2 B, ...) under guidance
    advantages: Tensor  # (B,) float32
    weight: Tensor  # (B,) float32, 0 where the group teaches nothing


class Batch(NamedTuple):
    """What an iteration has of some samples, before they are learned from."""

    sample_id: Tensor  # (B,) int64 on the CPU
    conditioning: tuple
    steps: Steps | None  # None where nothing was rolled out
    rollout: Rollout


STEPS_FIRST = ("x", "x_next", "v_old", "sigma", "coefficients", "kl_weight", "loss_weight")  # (S, B, ...)


def experience_of(rollout: Rollout, steps: Steps, conditioning: tuple, advantages: Tensor, weight: Tensor) -> Experience:
    """The trained steps of a rollout, in its own shape, so that the ratio of the first update is exactly 1."""
    batch = len(advantages)
    rows = torch.arange(batch, device=steps.start.device)
    index = torch.arange(steps.size, device=steps.start.device)[:, None] + steps.start  # (S, B) step of the rollout
    kl_weight = steps.kl_weight[index]
    loss_weight = torch.ones_like(kl_weight) if steps.loss_weight is None else steps.loss_weight[rows, index]
    return Experience(
        rollout.latents[:-1], rollout.latents[1:], rollout.v_old, steps.sigmas[index], steps.table[rows, index],
        kl_weight, loss_weight, conditioning, advantages, weight,
    )  # fmt: skip


def only_final(x0: Tensor) -> Rollout:
    """Latents (B, *D) that came without a trajectory."""
    nothing = x0.new_empty(0, *x0.shape)
    return Rollout(latents=x0[None], v_old=nothing, log_prob=x0.new_empty(0, len(x0)), final=x0)


def conditioning_rows(conditioning: C, sample: Tensor, batch: int) -> C:
    """The rows of samples of a batch; under guidance, of the empty prompt first."""
    guided = len(conditioning[0]) == 2 * batch
    return take(conditioning, torch.cat([sample, sample + batch]) if guided else sample)


def select(experience: Experience, sample: Tensor) -> Experience:
    """The samples (n,) of an experience, in that order."""
    return Experience(
        **{name: getattr(experience, name)[:, sample] for name in STEPS_FIRST},
        conditioning=conditioning_rows(experience.conditioning, sample, len(experience.advantages)),
        advantages=experience.advantages[sample],
        weight=experience.weight[sample],
    )


def join(experiences: Sequence[Experience]) -> Experience:
    """Several batches as one."""
    guided = len(experiences[0].conditioning[0]) == 2 * len(experiences[0].advantages)
    conditioning = [e.conditioning for e in experiences]
    if guided:  # the empty prompts of all before the prompts of all
        halves = [[type(c)(*(t.chunk(2)[half] for t in c)) for c in conditioning] for half in (0, 1)]
        conditioning = [*halves[0], *halves[1]]
    joined = {name: torch.cat([getattr(e, name) for e in experiences], dim=1) for name in STEPS_FIRST}
    return Experience(
        **joined,
        conditioning=concatenate(conditioning),
        advantages=torch.cat([e.advantages for e in experiences]),
        weight=torch.cat([e.weight for e in experiences]),
    )
