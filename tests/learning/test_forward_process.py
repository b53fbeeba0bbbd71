"""The forward process: moments give the distance to the target, noise has an address, pairs stay together."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastgrpo.learning.batches import live_batches, live_count
from fastgrpo.learning.forward_process import add_noise, noise_levels, target_moments
from fastgrpo.learning.pairs import pairs_of_groups
from fastgrpo.records import FORWARD, TRAIN, Prompted, noise_address
from fastgrpo_kernels import normal, transition

SHAPE = (3, 7, 5)


class Number(NamedTuple):
    """A conditioning that says which sample it belongs to."""

    sample: Tensor  # (B,)


def batch_of(samples: int = 5, levels: int = 2, seed: int = 3, noise_id: Tensor | None = None):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(samples, *SHAPE, generator=generator)
    sigma = torch.rand(samples, levels, generator=generator)
    noise_id = torch.arange(samples) if noise_id is None else noise_id
    experience = add_noise(
        x0, sigma, noise_address(FORWARD, seed, 4, noise_id), Prompted.of(Number(torch.arange(samples))),
        torch.randn(samples, generator=generator), torch.ones(samples),
    )  # fmt: skip
    return x0, sigma, experience


def test_the_noised_samples_are_those_of_the_straight_path() -> None:
    x0, sigma, experience = batch_of()
    for s in range(2):
        noise = normal(noise_address(FORWARD, 3, 4, torch.arange(5)), s, 105).view(5, *SHAPE)
        t = sigma[:, s].view(-1, 1, 1, 1)
        torch.testing.assert_close(experience.x[s], (1 - t) * x0 + t * noise)
        torch.testing.assert_close(experience.x_next[s], noise - x0)
        assert torch.equal(experience.sigma[s], sigma[:, s])
    assert not torch.equal(experience.x_next[0], experience.x_next[1])  # each level has noise of its own


def test_the_noise_is_nobody_elses() -> None:
    """Neither the rollout's, nor another seed's or iteration's."""
    own = normal(noise_address(FORWARD, 3, 4, torch.arange(5)), 0, 105)
    for other in (noise_address(TRAIN, 3, 4, torch.arange(5)), noise_address(FORWARD, 4, 4, torch.arange(5))):
        assert (normal(other, 0, 105) != own).float().mean() > 0.99


def test_moments_give_the_distance_to_the_target() -> None:
    """In float64 from whole tensors: mean((v - v*)^2) = m0 - 2 m1 + m2, and the norms of NFT's two branches."""
    x0, sigma, experience = batch_of()
    v, v_old, v_ref = (torch.randn(5, *SHAPE, requires_grad=grad) for grad in (True, False, False))
    row = experience.coefficients[1]
    moments = transition(experience.x_next[1], experience.x[1], v, v_old, row, v_ref=v_ref)
    found = target_moments(moments, experience.x_next[1], v, v_old, mix=0.3)
    target = experience.x_next[1].double()
    expected = (v.double() - target).square().flatten(1).mean(1)
    torch.testing.assert_close((found.m0 - 2 * found.m1 + found.m2).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.m3.double(), (v - v_ref).double().square().flatten(1).mean(1), rtol=1e-5, atol=1e-6)
    plus = v_old.double() + 0.3 * (v.double() - v_old)
    minus = v_old.double() - 0.3 * (v.double() - v_old)
    torch.testing.assert_close(found.abs_plus.double(), (plus - target).abs().flatten(1).mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.abs_minus.double(), (minus - target).abs().flatten(1).mean(1), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((found.m0 - 2 * found.m1 + found.m2).sum(), v)
    torch.testing.assert_close(gradient.double(), 2 * (v.detach().double() - target) / 105, rtol=1e-4, atol=1e-6)
    assert not found.m0.requires_grad and not found.abs_plus.requires_grad and found.m1.requires_grad


def test_noise_levels_are_different_and_the_same_everywhere() -> None:
    levels = noise_levels(500, 3, range(2, 8), iteration=9, seed=1)
    assert levels.shape == (500, 3) and levels.min() == 2 and levels.max() == 7
    assert all(len(set(row)) == 3 for row in levels.tolist())
    counts = levels.flatten().bincount(minlength=8)[2:]
    assert (counts - 250).abs().max() < 60  # all alike: 250 each, five standard deviations
    assert torch.equal(levels, noise_levels(500, 3, range(2, 8), iteration=9, seed=1))
    assert not torch.equal(levels, noise_levels(500, 3, range(2, 8), iteration=10, seed=1))
    with pytest.raises(ValueError, match="forward.num_timesteps 7: there are 6"):
        noise_levels(5, 7, range(2, 8), iteration=0, seed=0)


def test_pairs_are_best_with_worst() -> None:
    values = torch.tensor([0.1, 2.0, -1.0, 0.5, 3.0, 3.0, 3.0, 3.0, -2.0, 5.0, 0.0, 0.0])
    pairs = pairs_of_groups(values, group_size=4, count=2)
    order = pairs.sort_key.argsort(stable=True).tolist()
    live = [1, 2, 3, 0, 9, 8]  # the second group's are equal, and so are the third's middle two
    assert order[:6] == live
    assert pairs.weight.tolist() == [float(i in live) for i in range(12)]
    assert pairs.noise_id[[2, 0, 8]].tolist() == [1, 3, 9]


def test_pairs_stay_together_in_whole_batches() -> None:
    values = torch.randn(24, generator=torch.Generator().manual_seed(1))
    values[8:16] = 1.0
    pairs = pairs_of_groups(values, group_size=8, count=1)
    _, _, experience = batch_of(24, noise_id=pairs.noise_id)
    whole = replace(experience, advantages=values, weight=pairs.weight)
    batches = [whole.select(torch.arange(start, start + 8)) for start in range(0, 24, 8)]
    count = int(live_count(batches))
    assert count == 1
    packed = live_batches(batches, count, pairs.sort_key)[0]
    chosen, rejected = packed.prompted.cond.sample[:4].view(2, 2).unbind(1)
    assert chosen.tolist() == [values[:8].argmax(), 16 + values[16:].argmax()]
    assert rejected.tolist() == [values[:8].argmin(), 16 + values[16:].argmin()]
    assert packed.weight.tolist() == [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize("count", [0, 3])
def test_more_pairs_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} pairs of a group of 4"):
        pairs_of_groups(torch.zeros(8), group_size=4, count=count)
