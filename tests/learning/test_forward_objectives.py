"""Objectives on the forward process, against their published formulas in float64 on whole tensors, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastgrpo.learning.objectives import StepRows, TargetMoments, awm, dpo, nft, sft
from fastgrpo_kernels.transition import transition_ref

B, SHAPE = 6, (3, 7, 5)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 5.0, -0.3])
EACH = (1, 2, 3)  # the dimensions of a sample


class World:
    """x_t, its target and three velocities of it; v is the leaf."""

    def __init__(self, seed=0, move=0.3):
        draw = torch.Generator().manual_seed(seed)
        self.x0, eps, self.v_old, self.v_ref, step = torch.randn(5, B, *SHAPE, generator=draw, dtype=torch.float64)
        t = torch.rand(B // 2, generator=draw, dtype=torch.float64).mul(0.9).add(0.1).repeat_interleave(2)
        self.t, self.t_wide = t, t.view(B, 1, 1, 1)
        self.target = eps - self.x0
        self.x_t = (1 - self.t_wide) * self.x0 + self.t_wide * eps
        self.v = (self.v_old + move * step).requires_grad_()

    def moments(self, mix=1.0, v_old=None):
        v_old = self.v_old if v_old is None else v_old
        row = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64).expand(B, 4)
        m1, m2, m3 = transition_ref(self.target, self.x_t, self.v, v_old, row, v_ref=self.v_ref)
        with torch.no_grad():
            e, d = self.target - v_old, self.v - v_old
            m0, plus, minus = e.square().mean(EACH), (e - mix * d).abs().mean(EACH), (e + mix * d).abs().mean(EACH)
        return TargetMoments(m1, m2, m3, m0, plus, minus)

    @property
    def step(self):
        return StepRows(s=self.t, w=torch.ones(B), kl_weight=torch.ones(B), loss_weight=torch.ones(B))

    def kl(self):
        return (self.v - self.v_ref).square().mean(EACH)


def released_nft(world, advantages, mix, adv_clip_max, negative=True):
    """Of NVlabs/DiffusionNFT: regressions of x0, each divided by its own mean absolute error."""
    r = (advantages.clamp(-adv_clip_max, adv_clip_max) / adv_clip_max / 2 + 0.5).clamp(0, 1)
    losses = []
    for v in (mix * world.v + (1 - mix) * world.v_old, (1 + mix) * world.v_old - mix * world.v):
        x0_hat = world.x_t - world.t_wide * v
        scale = (x0_hat - world.x0).abs().mean(EACH, keepdim=True).clip(min=1e-5).detach()
        losses.append(((x0_hat - world.x0) ** 2 / scale).mean(EACH))
    return (r * losses[0] / mix + negative * (1 - r) * losses[1] / mix) * adv_clip_max


def released_awm(world, advantages, clip_range, power, time_power, ema_beta, advantage_scale):
    """Of scxue/advantage_weighted_matching: `ghuber`, PPO's clip, and the distance to the average."""

    def log_prob(v):
        error = (v - world.target).square().mean(EACH)
        return -((error + 1e-10) ** power - 1e-10**power) * world.t**time_power / power

    ratio = (log_prob(world.v) - log_prob(world.v_old)).exp()
    a = advantages * advantage_scale
    policy = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))
    return policy + ema_beta * (world.v - world.v_old).square().mean(EACH), ratio


def released_dpo(world, strength):
    """Of flow_grpo/train_sd3_dpo.py: errors of chosen and rejected against those of the reference; (B / 2,)."""
    model, reference = ((v - world.target).square().mean(EACH) for v in (world.v, world.v_old))
    chosen, rejected = (model - reference)[0::2], (model - reference)[1::2]
    return -F.logsigmoid(-0.5 * strength * (chosen - rejected))


def compare(world, loss, expected):
    (expected_grad,) = torch.autograd.grad(expected, world.v, retain_graph=True)
    (grad,) = torch.autograd.grad(loss.loss, world.v, retain_graph=True)
    torch.testing.assert_close(loss.loss.double(), expected.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-12)
    assert grad.abs().max() > 1e-6
    return grad


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("mix, adv_clip_max", [(1.0, 5.0), (0.1, 5.0), (1.0, 2.0)])
def test_nft_is_the_released_loss(mix, adv_clip_max, beta):
    world, weight = World(), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    moments = world.moments(mix)
    loss = nft(moments, world.step, ADVANTAGES, weight, clip_range=1e-4, beta=beta, mix=mix, adv_clip_max=adv_clip_max)
    expected = weight * (released_nft(world, ADVANTAGES.double(), mix, adv_clip_max) + beta * world.kl())
    grad = compare(world, loss, expected.mean())
    assert (grad[2] == 0).all()
    assert loss.clip_fraction == (ADVANTAGES.abs() >= adv_clip_max).double().mean()
    torch.testing.assert_close(loss.drift, (world.v - world.v_old).square().mean().detach())
    one_sided = (weight * released_nft(world, ADVANTAGES.double(), mix, adv_clip_max, negative=False)).mean()
    (one_sided_grad,) = torch.autograd.grad(one_sided, world.v)
    assert (grad - one_sided_grad)[1].abs().max() > 0.1 * grad[1].abs().max()


def test_nft_floors_the_error_it_divides_by():
    """v_old and v both the target, in all samples but one: no division by 0."""
    world = World()
    with torch.no_grad():
        world.v_old[1:], world.v[1:] = world.target[1:], world.target[1:]
    loss = nft(world.moments(), world.step, ADVANTAGES, torch.ones(B), clip_range=1e-4, beta=0.0)
    compare(world, loss, released_nft(world, ADVANTAGES.double(), 1.0, 5.0).mean())


def test_nft_leads_towards_good_samples_and_away_from_bad_ones():
    """On-policy the step is along (2 r - 1) (v* - v_old): A's sign, and none for A = 0."""
    world = World(move=0.0)
    advantages = torch.tensor([2.0, -2.0, 0.0, 5.0, -5.0, 0.1])
    loss = nft(world.moments(), world.step, advantages, torch.ones(B), clip_range=1e-4, beta=0.0)
    (grad,) = torch.autograd.grad(loss.loss, world.v)
    e = world.target - world.v_old
    along = -(grad * e).sum(EACH)
    assert along.sign().tolist() == advantages.sign().tolist()
    torch.testing.assert_close(-grad, (along / e.square().sum(EACH)).view(B, 1, 1, 1) * e)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    "settings",
    [
        {},  # as released
        {"power": 1.0, "time_power": 0.0, "ema_beta": 0.0, "advantage_scale": 1.0},  # the paper's
        {"power": 0.5, "time_power": 2.0, "ema_beta": 0.1, "advantage_scale": 0.2},
    ],
)
def test_awm_is_the_released_loss(settings, beta):
    world, weight = World(), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    whole = {"power": 0.25, "time_power": 1.0, "ema_beta": 1.0, "advantage_scale": 0.2, **settings}
    clip_range = 0.01
    loss = awm(world.moments(), world.step, ADVANTAGES, weight, clip_range=clip_range, beta=beta, **settings)
    policy, ratio = released_awm(world, ADVANTAGES.double(), clip_range, **whole)
    grad = compare(world, loss, (weight * (policy + beta * world.kl())).mean())
    assert (grad[2] == 0).all()
    torch.testing.assert_close(loss.ratio_max, ratio.max().detach())
    torch.testing.assert_close(loss.ratio_mean, ratio.mean().detach())
    assert 0 < loss.clip_fraction == ((ratio - 1).abs() > clip_range).double().mean()
    if settings.get("power") == 1:
        moments = world.moments()
        torch.testing.assert_close(loss.ratio_mean, (2 * moments.m1 - moments.m2).exp().mean().detach(), rtol=1e-12, atol=0)


def test_awm_on_policy_is_advantage_weighted_matching():
    """The paper's A w(t) mean (v - v*)^2, in its gradient."""
    world = World(move=0.0)
    paper = {"power": 1.0, "time_power": 0.0, "ema_beta": 0.0, "advantage_scale": 1.0}
    loss = awm(world.moments(), world.step, ADVANTAGES, torch.ones(B), clip_range=1e-4, beta=0.0, **paper)
    (grad,) = torch.autograd.grad(loss.loss, world.v)
    weighted = (ADVANTAGES * (world.v - world.target).square().mean(EACH)).mean()
    torch.testing.assert_close(grad, torch.autograd.grad(weighted, world.v)[0])
    assert loss.ratio_min == loss.ratio_max == 1 and loss.clip_fraction == 0


def test_awm_at_the_target_is_finite():
    """m0 - 2 m1 + m2 of float32 moments may come out below 0, which has no fourth root."""
    ones = torch.ones(2)
    moments = TargetMoments(ones.clone().requires_grad_(), ones.clone(), ones, ones - 1e-6, ones, ones)
    step = StepRows(ones / 2, ones, ones, ones)
    loss = awm(moments, step, ones, ones, clip_range=10.0, beta=0.0)
    loss.loss.backward()
    assert loss.loss.isfinite() and moments.m1.grad.isfinite().all()
    assert loss.ratio_mean.item() == pytest.approx(math.exp(0.5 * (1 - 1e-10**0.25) / 0.25), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_dpo_is_the_released_loss(strength, beta):
    world, weight = World(), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    loss = dpo(world.moments(), world.step, ADVANTAGES, weight, clip_range=1e-4, beta=beta, strength=strength)
    live = torch.tensor([1.0, 0.0, 1.0])
    expected = (live * released_dpo(world, strength)).mean() + beta * (live.repeat_interleave(2) * world.kl()).mean()
    grad = compare(world, loss, expected)
    assert (grad[2:4] == 0).all() and (grad[[0, 1, 4, 5]].abs().amax(EACH) > 0).all()


def test_dpo_starts_at_log_2_and_prefers_the_chosen():
    world = World(move=0.0)
    loss = dpo(world.moments(), world.step, torch.zeros(B), torch.ones(B), clip_range=1e-4, beta=0.0)
    assert loss.policy.item() == pytest.approx(math.log(2)) and loss.ratio_min == loss.ratio_max == 1
    (grad,) = torch.autograd.grad(loss.loss, world.v)
    towards = -(grad * (world.target - world.v_old)).sum(EACH)
    assert towards.sign().tolist() == [1, -1] * 3


def test_dpo_refuses_half_a_pair():
    world = World()
    part = TargetMoments(*(m[:5] for m in world.moments())), StepRows(*(row[:5] for row in world.step))
    with pytest.raises(ValueError, match="dpo was given 5 samples; a batch must hold whole pairs"):
        dpo(*part, ADVANTAGES[:5], torch.ones(5), clip_range=1e-4, beta=0.0)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    "settings, factor",
    [
        ({}, ADVANTAGES.double().exp()),
        ({"temperature": 2.0}, (ADVANTAGES.double() / 2).exp()),
        ({"advantage": "positive"}, ADVANTAGES.double().clamp(min=0)),
        ({"advantage": "none"}, torch.ones(B)),
    ],
)
def test_sft_is_weighed_matching(settings, factor, beta):
    world, weight = World(), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    loss = sft(world.moments(), world.step, ADVANTAGES, weight, clip_range=1e-4, beta=beta, **settings)
    expected = (weight * (factor * (world.v - world.target).square().mean(EACH) + beta * world.kl())).mean()
    grad = compare(world, loss, expected)
    assert (grad[2] == 0).all()
    assert (loss.ratio_min, loss.ratio_max, loss.clip_fraction, loss.drift) == (1, 1, 0, 0)
    without = world.moments(v_old=torch.zeros_like(world.v_old))
    compare(world, sft(without, world.step, ADVANTAGES, weight, clip_range=1e-4, beta=beta, **settings), expected)
