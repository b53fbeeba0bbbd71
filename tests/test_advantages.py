"""Group advantages against numpy, group by group, and the properties that they must have."""

import numpy as np
import pytest
import torch

from fastgrpo.advantages import group_advantages

G, K = 7, 24


def batch(seed=0, spread=0.2):
    """Rewards (N,) float32 in groups that are shuffled over the batch; groups 2 and 5 are constant."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(G).repeat_interleave(K)[torch.randperm(G * K, generator=generator)]
    rewards = 0.5 + spread * torch.randn(G * K, generator=generator)
    rewards[group == 2] = 0.1
    rewards[group == 5] = 0.0
    return rewards, group


def published(rewards, group, std, adv_clip_max=5.0, eps=1e-4):
    """The released tracker: numpy, float64, one prompt at a time."""
    rewards, group = rewards.numpy().astype(np.float64), group.numpy()
    advantages = np.empty_like(rewards)
    for g in np.unique(group):
        own = rewards[group == g]
        scale = np.std(rewards if std == "global" else own) + eps
        advantages[group == g] = (own - own.mean()) / scale
    return torch.from_numpy(advantages).clamp(-adv_clip_max, adv_clip_max)


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("clip", [5.0, 0.7])
def test_published_advantages(std, clip):
    rewards, group = batch()
    values, weight = group_advantages(rewards, group, num_groups=G, std=std, adv_clip_max=clip)
    assert values.dtype == weight.dtype == torch.float32 and values.shape == weight.shape == rewards.shape
    torch.testing.assert_close(values.double(), published(rewards, group, std, clip), rtol=1e-6, atol=1e-7)
    assert values.abs().max() <= clip


@pytest.mark.parametrize("constant", [0.1, 1e9 + 0.1])  # whose float mean need not be the number
@pytest.mark.parametrize("std", ["group", "global"])
def test_dead_groups_get_nothing(std, constant):
    rewards, group = batch()
    rewards = torch.where(group == 2, constant, rewards.double())
    values, weight = group_advantages(rewards, group, num_groups=G, std=std, adv_clip_max=5.0)
    dead = (group == 2) | (group == 5)
    assert (values[dead] == 0).all() and (weight[dead] == 0).all() and (weight[~dead] == 1).all()
    assert values[~dead].ne(0).all()


def test_a_group_is_dead_by_its_rewards_and_not_by_a_float_std():
    """One ulp of float32 apart is alive; a batch that is constant altogether is dead and finite."""
    rewards, group = torch.full((K,), 0.1), torch.zeros(K, dtype=torch.int64)
    options = {"num_groups": 1, "adv_clip_max": 5.0}
    for std in ("group", "global"):
        values, weight = group_advantages(rewards, group, std=std, **options)
        assert (values == 0).all() and (weight == 0).all()
    rewards[3] = torch.nextafter(rewards[3], torch.tensor(1.0))
    values, weight = group_advantages(rewards, group, std="group", **options)
    assert (weight == 1).all() and values[3] > 0


@pytest.mark.parametrize("offset", [0.0, 1e9])  # so far from 0 that what a sum rounds off is seen in float32
@pytest.mark.parametrize("std", ["group", "global"])
def test_the_order_of_arrival_changes_no_bit(std, offset):
    rewards, group = batch()
    rewards = rewards.double() + offset
    options = {"num_groups": G, "std": std, "adv_clip_max": 5.0}
    values, weight = group_advantages(rewards, group, **options)
    relabel = torch.randperm(G, generator=torch.Generator().manual_seed(9))
    for seed in range(20):
        order = torch.randperm(G * K, generator=torch.Generator().manual_seed(seed))
        again = group_advantages(rewards[order], group[order], **options)
        assert again.values.equal(values[order]) and again.weight.equal(weight[order])
        renamed = group_advantages(rewards[order], relabel[group[order]], **options)
        assert renamed.values.equal(values[order])


def test_float32_rewards_far_from_zero_keep_their_differences():
    rewards, group = batch()
    near = group_advantages(rewards, group, num_groups=G, std="group", adv_clip_max=5.0).values
    far = group_advantages(rewards.double() + 1e6, group, num_groups=G, std="group", adv_clip_max=5.0).values
    torch.testing.assert_close(far, near, rtol=0, atol=1e-6)


def test_groups_of_unequal_size_and_absent_groups():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0])
    group = torch.tensor([3, 0, 3, 3, 1])  # one sample alone teaches nothing; group 2 has none
    values, weight = group_advantages(rewards, group, num_groups=4, std="group", adv_clip_max=5.0)
    assert weight.tolist() == [1, 0, 1, 1, 0]
    alive = group == 3
    torch.testing.assert_close(values.double()[alive], published(rewards, group, "group")[alive])


def test_a_reward_that_is_not_finite_is_not_hidden():
    rewards, group = batch()
    rewards[0] = torch.nan
    values, weight = group_advantages(rewards, group, num_groups=G, std="group", adv_clip_max=5.0)
    assert values[group == group[0]].isnan().all() and weight[0] == 1
    assert values[group != group[0]].isfinite().all()


def test_nothing_asks_the_host():
    """A fake tensor has no values: any .item() or branch on data, and any shape made of them, would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        rewards, group = torch.rand(G * K), torch.zeros(G * K, dtype=torch.int64)
        for std in ("group", "global"):
            values, weight = group_advantages(rewards, group, num_groups=G, std=std, adv_clip_max=5.0)
            assert values.shape == weight.shape == (G * K,)


def test_bad_input_is_refused():
    rewards, group = batch()
    with pytest.raises(ValueError, match=r"\(168,\) and group \(167,\) must both be \(N,\)"):
        group_advantages(rewards, group[1:], num_groups=G, std="group", adv_clip_max=5.0)
    with pytest.raises(ValueError, match="std 'batch' is unknown"):
        group_advantages(rewards, group, num_groups=G, std="batch", adv_clip_max=5.0)
    with pytest.raises(ValueError, match="adv_clip_max 0.0 must be above 0"):
        group_advantages(rewards, group, num_groups=G, std="group", adv_clip_max=0.0)
