"""The transitions to learn from: a rollout's trained steps, without what teaches nothing, in micro-batches."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgrpo.records import Batch, Experience, join


def experience_of(batch: Batch, advantages: Tensor, weight: Tensor) -> Experience:
    """The trained steps of a rollout, in its own shape, so that the ratio of the first update is exactly 1.

    advantages, weight: (B,) float32.
    """
    schedule, trajectory = batch.schedule, batch.trajectory
    if schedule is None:
        raise ValueError("this batch was not rolled out: it has no steps to learn from")
    rows = torch.arange(len(advantages), device=schedule.start.device)
    index = torch.arange(schedule.size, device=schedule.start.device)[:, None] + schedule.start  # (S, B) step of the rollout
    kl_weight = schedule.kl_weight[index]
    return Experience(
        x=trajectory.latents[:-1],
        x_next=trajectory.latents[1:],
        v_old=trajectory.v_old,
        sigma=schedule.sigmas[index],
        coefficients=schedule.table[rows, index],
        kl_weight=kl_weight,
        loss_weight=torch.ones_like(kl_weight) if schedule.loss_weight is None else schedule.loss_weight[rows, index],
        prompted=batch.prompted,
        advantages=advantages,
        weight=weight,
    )


def micro_batches(experience: Experience, size: int) -> Iterator[Experience]:
    """Its transitions, step by step and `size` at a time."""
    steps, batch = experience.sigma.shape
    if steps * batch % size:
        raise ValueError(f"micro_batch_size {size} does not divide {steps} steps of {batch} samples into whole batches")
    for start in range(0, steps * batch, size):
        yield experience.transitions(slice(start, start + size))


def live_batches(experiences: Sequence[Experience], count: int, sort_key: Tensor | None = None) -> list[Experience]:
    """The samples that teach something, in `count` batches of the same size, the last filled up with others.

    Samples of weight 0 add nothing to the gradient: a batch of them need not be run. The shapes stay what they were, so
    that neither ratios nor captured graphs nor compiled blocks know of it.

    sort_key: (n,) all samples are sorted by it; without one, live samples simply come first.
    """
    if count == len(experiences) and sort_key is None:
        return list(experiences)
    batch, every = experiences[0].samples, join(experiences)
    order = ((every.weight == 0).to(torch.uint8) if sort_key is None else sort_key).argsort(stable=True)
    return [every.select(chosen) for chosen in order[: count * batch].split(batch)]


def live_count(experiences: Sequence[Experience]) -> Tensor:
    """How many batches their live samples fill, () int64; at least one, as an optimiser step needs a gradient."""
    live = torch.stack([(experience.weight > 0).sum() for experience in experiences]).sum()
    batch = experiences[0].samples
    return torch.div(live + batch - 1, batch, rounding_mode="floor").clamp(min=1)
