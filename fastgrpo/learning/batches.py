"""The transitions to learn from: a rollout's trained steps, without what teaches nothing, in micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class ByExpert:
    """How the transitions of a model of two experts are taken: the first expert's, then the second's.

    A micro-batch that holds transitions of both takes a forward pass of each; so ordered, there is one of them at most. The
    ranks agree on which experts run, as DeepSpeed sums the gradients of the same weights on all of them: a micro-batch of
    one rank that crosses from the first expert to the second makes the others run both.
    """

    rule: Callable[[Tensor], Tensor]  # sigma (*) -> the number of the expert (*) int64
    over_ranks: Callable[[Tensor], Tensor]  # the largest of each number over the ranks, a collective
    trained: tuple[int, ...]  # the numbers of the experts that are trained

    def order(self, experience: Experience) -> Tensor:
        """The transitions in the order in which they are taken, (S B,) int64."""
        return self.rule(experience.sigma.flatten()).argsort(stable=True)

    def asked(self, experience: Experience, size: int) -> list[tuple[int, ...]]:
        """The experts that each micro-batch asks for on any rank. Collective, and the device is waited for."""
        expert = self.rule(experience.sigma.flatten()).sort().values.view(-1, size)
        needed = torch.stack([(expert == number).any(1) for number in (0, 1)], 1).int()
        return [tuple(i for i in (0, 1) if row[i]) for row in self.over_ranks(needed).tolist()]


def micro_batches(experience: Experience, size: int, experts: ByExpert | None = None) -> Iterator[Experience]:
    """Its transitions, step by step and `size` at a time; of a model of several experts one expert after the other."""
    steps, batch = experience.sigma.shape
    if steps * batch % size:
        raise ValueError(f"micro_batch_size {size} does not divide {steps} steps of {batch} samples into whole batches")
    if experts is None:
        for start in range(0, steps * batch, size):
            yield experience.transitions(slice(start, start + size))
        return
    for chosen, asked in zip(experts.order(experience).split(size), experts.asked(experience, size), strict=True):
        yield replace(experience.transitions(chosen), experts=asked)


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
