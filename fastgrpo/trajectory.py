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

TRAIN, EVALUATION, SAMPLE = range(3)  # streams of noise that never meet


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


@dataclass(frozen=True)
class Rollout:
    """What the behaviour policy did, as far as it is trained on. Steps come first, so that a step's batch is contiguous."""

    latents: Tensor  # (S + 1, B, *D) float32, before each trained step and after the last
    v_old: Tensor  # (S, B, *D) velocity, under guidance the guided one in float32, else in the model's dtype
    log_prob: Tensor  # (S, B) float32, mean over a latent's elements
    final: Tensor  # (B, *D) float32, sigma = 0


@dataclass(frozen=True)
class Experience:
    """One batch to learn from. It has the shape of its rollout, so that the ratio of the first update is exactly 1."""

    rollout: Rollout
    conditioning: tuple  # of tensors (B, ...), or (2 B, ...) under guidance
    steps: Steps
    advantages: Tensor  # (B,) float32
    weight: Tensor  # (B,) float32, 0 where the group teaches nothing
