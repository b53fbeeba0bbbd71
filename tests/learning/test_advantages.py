"""Group advantages against numpy, group by group and pair by pair, and the properties that they must have."""

from itertools import product

import numpy as np
import pytest
import torch
from support.helpers import NoSync

from fastgrpo.learning.advantages import batch_std, best_and_worst, group_advantages, win_rate

G, K = 7, 24
EPS = 1e-4
WEIGHTS = (1.0, -0.3, 0.25)
MODES = [
    {"std": std, "combine": combine, "pairwise": pairwise, "keep": keep}
    for std, combine, pairwise, keep in product(["group", "global"], ["sum", "each"], [False, True], [None, 2, 4])
]


def name(mode):
    return "-".join(f"{key}_{value}" for key, value in mode.items())


def batch(seed=0, spread=0.2):
    """Rewards (N,) float32 in groups that are shuffled over the batch; groups 2 and 5 are constant."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(G).repeat_interleave(K)[torch.randperm(G * K, generator=generator)]
    rewards = 0.5 + spread * torch.randn(G * K, generator=generator)
    rewards[group == 2] = 0.1
    rewards[group == 5] = 0.0
    return rewards, group


def uneven_batch(seed=0):
    """Scores (N, 3) float32, groups of 1 to 9 and sample ids, all shuffled; N = 31, no multiple of a vector's width.

    A graded reward with ties, a strict one and one of real numbers. In group 2 all rewards are constant, in group 5
    the first, in group 6 all but the second.
    """
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(G).repeat_interleave(torch.tensor([5, 9, 3, 1, 2, 6, 5]))
    group = group[torch.randperm(len(group), generator=generator)]
    n = len(group)
    graded = torch.randint(5, (n,), generator=generator) / 4
    strict = torch.randint(2, (n,), generator=generator).float()
    scores = torch.stack([graded, strict, torch.randn(n, generator=generator)], dim=1)
    scores[group == 2] = torch.tensor([0.1, 1.0, 0.3])
    scores[group == 5, 0] = 0.1
    scores[group == 6] = torch.tensor([0.1, 0.0, 0.7])
    scores[(group == 6).nonzero()[1], 1] = 1.0
    return scores, group, torch.randperm(n, generator=generator)


def published(rewards, group, std, adv_clip_max=5.0, eps=EPS):
    """The released tracker: numpy, float64, one prompt at a time."""
    rewards, group = rewards.numpy().astype(np.float64), group.numpy()
    advantages = np.empty_like(rewards)
    for g in np.unique(group):
        own = rewards[group == g]
        scale = np.std(rewards if std == "global" else own) + eps
        advantages[group == g] = (own - own.mean()) / scale
    return torch.from_numpy(advantages).clamp(-adv_clip_max, adv_clip_max)


def won(rewards, group):
    """Each sample against each other of its group, one pair after the other."""
    rate = np.zeros(len(rewards))
    for i in range(len(rewards)):
        rivals = [j for j in range(len(rewards)) if group[j] == group[i] and j != i]
        points = [1.0 if rewards[i] > rewards[j] else 0.5 if rewards[i] == rewards[j] else 0.0 for j in rivals]
        rate[i] = sum(points) / len(points) if points else 0.0
    return rate


def written_out(scores, group, ids, *, weights, std, combine, pairwise, keep, adv_clip_max):
    """The methods by themselves, in numpy and loops: values and weight."""
    scores, group, ids = scores.numpy().astype(np.float64), group.numpy(), ids.numpy()
    n, r = scores.shape
    total = np.array([sum(weights[k] * scores[i, k] for k in range(r)) for i in range(n)]).astype(np.float32)
    rewards = [total.astype(np.float64)] if combine == "sum" else [scores[:, k] for k in range(r)]
    rewards = [won(one, group) for one in rewards] if pairwise else rewards
    dead = {g: all(len(set(one[group == g])) == 1 for one in rewards) for g in group}

    values = np.zeros(n)
    for one, weight in zip(rewards, weights if combine == "each" else [1.0], strict=True):
        for g in set(group):
            if len(set(one[group == g])) > 1:
                scale = np.std(one if std == "global" else one[group == g])
                values[group == g] += weight * (one[group == g] - one[group == g].mean()) / (scale + EPS)
    if combine == "each":
        values = (values - values.mean()) / (np.std(values) + EPS)

    weight = np.zeros(n)
    for g in set(group):
        rising = sorted((values[i], ids[i], i) for i in range(n) if group[i] == g)
        taken = rising if keep is None else rising[: keep // 2] + rising[-(keep // 2) :]
        for _, _, i in taken:
            weight[i] = 0 if dead[g] else 1
    return np.clip(values, -adv_clip_max, adv_clip_max) * weight, weight


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("clip", [5.0, 0.7])
def test_published_advantages(std, clip):
    rewards, group = batch()
    values, weight = group_advantages(rewards, group, num_groups=G, std=std, adv_clip_max=clip)
    assert values.dtype == weight.dtype == torch.float32 and values.shape == weight.shape == rewards.shape
    torch.testing.assert_close(values.double(), published(rewards, group, std, clip), rtol=1e-6, atol=1e-7)
    assert values.abs().max() <= clip


@pytest.mark.parametrize("mode", MODES, ids=name)
@pytest.mark.parametrize("clip", [5.0, 0.7])
def test_every_mode_written_out(mode, clip):
    for seed in range(5):
        scores, group, ids = uneven_batch(seed)
        options = {"weights": WEIGHTS, "adv_clip_max": clip, **mode}
        found = group_advantages(scores, group, num_groups=G, sample_id=ids, **options)
        values, weight = written_out(scores, group, ids, **options)
        assert found.weight.tolist() == weight.tolist()
        torch.testing.assert_close(found.values.double(), torch.from_numpy(values), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES, ids=name)
@pytest.mark.parametrize("offset", [0.0, 1e9])  # so far from 0 that what a sum rounds off is seen in float32
def test_samples_take_their_bits_along(mode, offset):
    """Whatever the order of arrival and the groups' names; of five rewards, for torch.sum adds fewer one by one."""
    scores, group, ids = uneven_batch()
    scores = torch.cat([scores, scores[:, 1:] * 0.7 + 0.1], dim=1).double() + offset
    options = {"weights": (*WEIGHTS, 0.1, 0.7), "num_groups": G, "adv_clip_max": 5.0, **mode}
    values, weight = group_advantages(scores, group, sample_id=ids, **options)
    assert 0 < weight.sum() < len(weight)
    relabel = torch.randperm(G, generator=torch.Generator().manual_seed(9))
    for seed in range(20):
        order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
        again = group_advantages(scores[order], relabel[group[order]], sample_id=ids[order], **options)
        assert again.values.equal(values[order]) and again.weight.equal(weight[order])


def test_the_batch_std_is_the_same_bits_in_any_order():
    """In float64: float32 would hide a difference nearly always."""
    rewards = 1e9 + batch()[0].double()
    orders = [torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert len({batch_std(rewards[order]).item() for order in orders}) == 1


def test_one_reward_may_be_a_vector_or_a_column():
    rewards, group = batch()
    options = {"num_groups": G, "std": "group", "adv_clip_max": 5.0}
    vector, column = group_advantages(rewards, group, **options), group_advantages(rewards[:, None], group, **options)
    assert vector.values.equal(column.values) and vector.weight.equal(column.weight)


# Combination of several rewards


def test_gdpo_keeps_apart_what_a_sum_makes_equal():
    """Figure 2 of the paper: two strict rewards, two samples; a win in both is worth twice a win in one."""
    scores = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    group, options = torch.tensor([0, 0, 1, 1]), {"num_groups": 2, "std": "group", "adv_clip_max": 5.0}
    total = group_advantages(scores, group, weights=(1, 1), **options).values
    torch.testing.assert_close(total, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=0, atol=2 * EPS)
    each = group_advantages(scores, group, weights=(1, 1), combine="each", **options).values
    torch.testing.assert_close(each[2:], 2 * each[:2])
    assert each.square().mean().sqrt().item() == pytest.approx(1, abs=EPS)


def test_gdpo_is_dead_only_where_every_reward_is_constant():
    """Rewards that add up to the same for all: nothing to learn from the sum, but from each at unequal weights."""
    scores = torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    group, options = torch.zeros(3, dtype=torch.int64), {"num_groups": 1, "std": "group", "adv_clip_max": 5.0}
    values, weight = group_advantages(scores, group, weights=(1, 1, 1), **options)
    assert weight.tolist() == values.tolist() == [0, 0, 0]
    values, weight = group_advantages(scores, group, weights=(2, 1, 1), combine="each", **options)
    assert weight.tolist() == [1, 1, 1] and values[0] == values[1] > 0 > values[2]
    # The only reward that varies has no weight: it is watched, not trained on.
    for combine in ("sum", "each"):
        values, weight = group_advantages(scores, group, weights=(0, 0, 1), combine=combine, **options)
        assert weight.tolist() == values.tolist() == [0, 0, 0]


def test_sums_that_differ_by_rounding_are_equal():
    """In float64 0.1 + 0.2 > 0.3: a win rate would make a whole victory of it."""
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for pairwise in (False, True):
        values, weight = group_advantages(
            scores, torch.zeros(2, dtype=torch.int64), num_groups=1, std="group", adv_clip_max=5.0,
            weights=(0.1, 0.2, 0.3), pairwise=pairwise,
        )  # fmt: skip
        assert weight.tolist() == values.tolist() == [0, 0]


def test_a_reward_that_is_constant_in_a_group_adds_exactly_nothing_there():
    """Even where the float mean of equal numbers is not that number."""
    rewards, group = batch()
    scores = torch.stack([rewards.double(), torch.full_like(rewards, 0.7, dtype=torch.float64) + 1e10], dim=1)
    options = {"num_groups": G, "std": "group", "adv_clip_max": 5.0, "combine": "each"}
    alone = group_advantages(rewards, group, **options)
    both = group_advantages(scores, group, weights=(1.0, 1.0), **options)
    assert both.values.equal(alone.values) and both.weight.equal(alone.weight)


# Win rates


def test_win_rates():
    rewards, group = torch.tensor([3.0, 1.0, 7.0, 1.0, 2.0, 5.0]), torch.tensor([0, 0, 1, 0, 0, 2])
    assert win_rate(rewards, group).tolist() == [1.0, 0.5 / 3, 0.0, 0.5 / 3, 2 / 3, 0.0]  # alone: nothing to win
    for seed in range(5):
        scores, group, _ = uneven_batch(seed)
        assert win_rate(scores[:, 0], group).tolist() == won(scores[:, 0].numpy(), group.numpy()).tolist()


def test_a_win_rate_sees_the_order_and_not_the_distance():
    rewards, group = batch()
    options = {"num_groups": G, "std": "group", "adv_clip_max": 5.0, "pairwise": True}
    values, weight = group_advantages(rewards, group, **options)
    again = group_advantages((8 * rewards.double()).exp(), group, **options)  # any rising function
    assert again.values.equal(values) and again.weight.equal(weight)
    dead = (group == 2) | (group == 5)
    assert (weight[dead] == 0).all() and (weight[~dead] == 1).all()
    # K ranks without a tie, spread evenly from 0 to 1.
    expected = (torch.arange(K) / (K - 1) - 0.5) / (np.sqrt((K + 1) / (12 * (K - 1))) + EPS)
    torch.testing.assert_close(values[group == 0].sort().values, expected.float())


# Selection


def test_the_best_and_the_worst_are_kept():
    rewards, group = batch()
    options = {"num_groups": G, "std": "global", "adv_clip_max": 5.0}
    everyone, chosen = group_advantages(rewards, group, **options), group_advantages(rewards, group, keep=6, **options)
    for g in range(G):
        kept = chosen.weight[group == g] == 1
        assert kept.sum() == (0 if g in (2, 5) else 6)
        if kept.any():
            own = rewards[group == g].sort().values
            assert rewards[group == g][kept].sort().values.tolist() == [*own[:3].tolist(), *own[-3:].tolist()]
    # The advantages are still those among all samples of the group.
    assert chosen.values.equal(everyone.values * chosen.weight)
    whole = group_advantages(rewards, group, keep=K, **options)
    assert whole.values.equal(everyone.values) and whole.weight.equal(everyone.weight)


def test_selection_looks_behind_the_clip():
    rewards, group = torch.tensor([9.0, 0.0, 10.0, -1.0, 8.0, 1.0]), torch.zeros(6, dtype=torch.int64)
    values, weight = group_advantages(rewards, group, num_groups=1, std="group", adv_clip_max=0.5, keep=2)
    assert values.tolist() == [0, 0, 0.5, -0.5, 0, 0] and weight.tolist() == [0, 0, 1, 1, 0, 0]


def test_equal_advantages_are_told_apart_by_sample_id():
    values, group = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 0, 0, 1, 1])
    # By position: the lowest are the first zeros, the highest the one and the last zero; group 1 is smaller than keep.
    assert best_and_worst(values, group, 4).tolist() == [True, True, True, False, True, True, True]
    ids = torch.tensor([40, 3, 20, 10, 30, 6, 5])
    assert best_and_worst(values, group, 4, ids).tolist() == [True, True, True, True, False, True, True]
    assert best_and_worst(values, group, 2, ids).tolist() == [False, True, False, True, False, True, True]


# Properties of the normalisation


@pytest.mark.parametrize("constant", [0.1, 1e9 + 0.1])  # whose float mean need not be the number
@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("combine", ["sum", "each"])
def test_dead_groups_get_nothing(std, constant, combine):
    rewards, group = batch()
    rewards = torch.where(group == 2, constant, rewards.double())
    values, weight = group_advantages(rewards, group, num_groups=G, std=std, adv_clip_max=5.0, combine=combine)
    dead = (group == 2) | (group == 5)
    assert (values[dead] == 0).all() and (weight[dead] == 0).all() and (weight[~dead] == 1).all()
    assert values[~dead].ne(0).all()


@pytest.mark.parametrize("mode", MODES, ids=name)
def test_a_batch_that_is_constant_altogether_is_dead_and_finite(mode):
    scores, group = torch.full((K, 2), 0.1), torch.zeros(K, dtype=torch.int64)
    values, weight = group_advantages(scores, group, num_groups=1, adv_clip_max=5.0, weights=(1.0, 0.3), **mode)
    assert (values == 0).all() and (weight == 0).all()


def test_a_group_is_dead_by_its_rewards_and_not_by_a_float_std():
    """One ulp of float32 apart is alive."""
    rewards, group = torch.full((K,), 0.1), torch.zeros(K, dtype=torch.int64)
    rewards[3] = torch.nextafter(rewards[3], torch.tensor(1.0))
    values, weight = group_advantages(rewards, group, num_groups=1, std="group", adv_clip_max=5.0)
    assert (weight == 1).all() and values[3] > 0


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


@pytest.mark.parametrize("mode", MODES, ids=name)
def test_a_reward_that_is_not_finite_is_not_hidden(mode):
    rewards, group = batch()
    rewards[0] = torch.nan
    values, weight = group_advantages(rewards, group, num_groups=G, adv_clip_max=5.0, **mode)
    assert values[(group == group[0]) & (weight == 1)].isnan().all() and weight[0] == 1
    if mode["std"] == "group" and mode["combine"] == "sum":
        assert values[group != group[0]].isfinite().all()


@pytest.mark.parametrize("mode", MODES, ids=name)
def test_nothing_asks_the_host(mode):
    """A fake tensor has no values: any .item() or branch on data, and any shape made of them, would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    options = {"num_groups": G, "adv_clip_max": 5.0, "weights": WEIGHTS, **mode}
    with FakeTensorMode():
        scores, group = torch.rand(G * K, 3), torch.zeros(G * K, dtype=torch.int64)
        values, weight = group_advantages(scores, group, **options)
        assert values.shape == weight.shape == (G * K,)
    scores, group, _ = uneven_batch()
    with NoSync():
        group_advantages(scores, group, **options)


def test_bad_input_is_refused():
    rewards, group = batch()
    options = {"num_groups": G, "std": "group", "adv_clip_max": 5.0}
    with pytest.raises(ValueError, match=r"scores \(168, 1\) must be .* and group \(167,\) \(N,\)"):
        group_advantages(rewards, group[1:], **options)
    with pytest.raises(ValueError, match=r"1 weights \(1.0,\) for 2 rewards: give one for each"):
        group_advantages(rewards[:, None].expand(-1, 2), group, **options)
    with pytest.raises(ValueError, match="std 'batch' is unknown; use 'group' or 'global'"):
        group_advantages(rewards, group, **options | {"std": "batch"})
    with pytest.raises(ValueError, match="combine 'product' is unknown; use 'sum' or 'each'"):
        group_advantages(rewards, group, **options, combine="product")
    with pytest.raises(ValueError, match="adv_clip_max 0.0 must be above 0"):
        group_advantages(rewards, group, **options | {"adv_clip_max": 0.0})
    for keep in (3, 0, -2):
        with pytest.raises(ValueError, match=f"keep {keep}: .* an even number, at least 2"):
            group_advantages(rewards, group, **options, keep=keep)
