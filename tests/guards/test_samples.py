"""Samples that are not whole are counted and left out, and nothing waits for the device before the one reading."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.engine.ranks import OneRank
from fastgrpo.guards.samples import GRID, Samples, pixels_of, spread_of, without
from fastgrpo.learning.advantages import group_advantages
from fastgrpo.records import Trajectory

STEPS, BATCH = 2, 4


def trajectory() -> Trajectory:
    return Trajectory(
        torch.randn(STEPS + 1, BATCH, 3, 5), torch.randn(STEPS, BATCH, 3, 5), torch.randn(STEPS, BATCH),
        torch.randn(BATCH, 3, 5),
    )  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_by_kind_and_sample(value: float) -> None:
    samples, one, two = Samples(OneRank()), trajectory(), trajectory()
    one.v_old[1, 2, 0, :2] = value
    one.latents[0, 2, 1, 1] = value
    two.log_prob[0, 1] = value
    two.final[3, 0, 0] = value
    with Waits() as waits:
        first, second = samples.add(one), samples.add(two)
        samples.look(torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8))
        samples.look(torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8))
    assert waits.seen == []
    rewards = torch.zeros(2 * BATCH)
    rewards[0] = value
    bad, totals, spread = samples.read(rewards, group_size=4)
    assert totals == [2, 2, 1, 1] and spread == 0
    expected = torch.zeros(8, 4, dtype=torch.int64)
    expected[2, 0], expected[2, 1], expected[5, 2], expected[7, 1], expected[0, 3] = 2, 1, 1, 1, 1
    assert torch.equal(bad, expected)
    # What is decoded is finite, and the others' is what it was.
    assert (first[2] == 0).all() and torch.equal(first[[0, 1, 3]], one.final[[0, 1, 3]])
    assert (second[[1, 3]] == 0).all() and torch.equal(second[[0, 2]], two.final[[0, 2]])
    kept = without(one, bad[:BATCH].sum(1) == 0)
    for before, after in zip(vars(one).values(), vars(kept).values(), strict=True):
        assert after.isfinite().all() and (before.dim() == 3 or torch.equal(before[:, 1], after[:, 1]))


def test_finite_samples_are_left_as_they_are() -> None:
    samples, one = Samples(OneRank()), trajectory()
    assert torch.equal(samples.add(one), one.final)
    bad, totals, spread = samples.read(None, 2)
    assert totals == [0, 0, 0, 0] and spread is None and bad.shape == (BATCH, 4)


def test_latents_without_a_trajectory_are_counted_too() -> None:
    """Those of an offline run, which has no steps."""
    final = torch.randn(BATCH, 3, 5)
    final[1, 0, 0] = math.nan
    samples = Samples(OneRank())
    samples.add(Trajectory(final[None], final.new_empty(0, *final.shape), final.new_empty(0, BATCH), final))
    assert samples.read(None, 2).totals == [0, 2, 0, 0]  # it is the first and the last


@pytest.mark.parametrize("shape", [(3, 512, 512), (3, 40, 24), (5, 3, 32, 64), (3, 8, 8)])
def test_alike_images_have_no_spread_and_others_that_of_their_pixels(shape: tuple[int, ...]) -> None:
    images = torch.randint(256, (4, *shape), dtype=torch.uint8)
    alike = images[:1].expand(4, *shape)
    assert spread_of(pixels_of(alike), 2).item() == 0 and pixels_of(images).shape[1] <= 3 * (2 * GRID) ** 2
    levels = images.clone()
    levels[::2], levels[1::2] = 10, 30  # in each group of two: a standard deviation of 10
    assert spread_of(pixels_of(levels), 2).item() == 10


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_group_is_compared_without_the_sample_that_is_left_out(std: str) -> None:
    """As if it had never been drawn; a group of which nothing is left has weight 0."""
    scores, size = torch.tensor([1.0, 2.0, 9.0, 4.0, 0.0, 1.0, 5.0, 5.5, 7.0]), 3
    whole = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 0]).bool()
    kept = torch.arange(9)[whole]
    found = group_advantages(scores[kept], kept // size, num_groups=3, std=std, adv_clip_max=5.0).spread(kept, 9)

    def advantage(group: Tensor, mine: Tensor) -> Tensor:
        scale = (group if std == "group" else scores[kept]).double().std(correction=0)
        return ((mine - group.double().mean()) / (scale + 1e-4)).float()

    expected = torch.zeros(9)
    expected[:2], expected[3:6] = advantage(scores[:2], scores[:2]), advantage(scores[3:6], scores[3:6])
    torch.testing.assert_close(found.values, expected)
    assert found.weight.tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 0]
