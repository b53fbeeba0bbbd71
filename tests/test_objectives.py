"""The clipped objective from moments, against torch.distributions and autograd of the direct formula."""

import math
from typing import NamedTuple

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastgrpo.objectives import OBJECTIVES, Loss, StepRows, effective_clip_range, grpo_clip
from fastgrpo.sde import coefficient_table, kl_weights

B, D = 6, 501
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0])
STEP = torch.tensor([0, 1, 2, 3, 0, 2])  # (B,) each sample's step
NOISE = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 5.0, -0.3])
ALL = torch.ones(B)


class Moments(NamedTuple):
    m1: torch.Tensor
    m2: torch.Tensor
    m3: torch.Tensor


def transition(sampler, move, seed=0):
    """A stored transition in float64: x', the old, new and reference means, and s; v is a leaf."""
    generator = torch.Generator().manual_seed(seed)
    x, v_old, v_ref, step, eps = torch.randn(5, B, D, generator=generator, dtype=torch.float64)
    v = (v_old + move * step).requires_grad_()
    v_ref = v_old + move * v_ref
    c_x, c_v, s, w = coefficient_table(sampler, SIGMAS, NOISE[sampler])[STEP].T[:, :, None]  # (B, 1) each
    mu_old, mu, mu_ref = (c_x * x + c_v * each for each in (v_old, v, v_ref))
    return v, mu_old + s * eps, mu_old, mu, mu_ref, s, w[:, 0]


def moments_of(x_next, mu_old, mu, mu_ref):
    e, d, k = x_next - mu_old, mu - mu_old, mu - mu_ref
    return Moments((e * d).mean(dim=1), (d * d).mean(dim=1), (k * k).mean(dim=1))


def rows(sampler, s, w, kl="paper"):
    return StepRows(s[:, 0], w, kl_weights(sampler, SIGMAS, NOISE[sampler], kl)[STEP], torch.ones_like(w))


def direct_loss(x_next, mu_old, mu, mu_ref, s, advantages, weight, clip_range, beta):
    """Flow-GRPO eq. 4, from log-probs."""
    old, new, reference = (Normal(mean, s.expand_as(mean)) for mean in (mu_old, mu, mu_ref))
    ratio = (new.log_prob(x_next).mean(dim=1) - old.log_prob(x_next).mean(dim=1)).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy = torch.max(-advantages * ratio, -advantages * clipped)
    kl = kl_divergence(new, reference).mean(dim=1)
    return (weight * (policy + beta * kl)).mean(), ratio, kl


@pytest.mark.parametrize("move", [1e-3, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("sampler", NOISE)
def test_loss_and_gradient_of_the_direct_formula(sampler, beta, move):
    v, x_next, mu_old, mu, mu_ref, s, w = transition(sampler, move)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    clip_range = 0.5 * move / math.sqrt(D)  # so that some samples are clipped and some are not
    expected, ratio, kl = direct_loss(x_next, mu_old, mu, mu_ref, s, ADVANTAGES, weight, clip_range, beta)
    (expected_grad,) = torch.autograd.grad(expected, v, retain_graph=True)
    loss = grpo_clip(
        moments_of(x_next, mu_old, mu, mu_ref), rows(sampler, s, w), ADVANTAGES, weight,
        clip_range=clip_range, beta=beta,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss.loss, v)
    torch.testing.assert_close(loss.loss.double(), expected.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-12)
    assert 0 < (grad.abs().amax(dim=1) > 0).sum() < B
    torch.testing.assert_close(loss.policy + beta * loss.kl, loss.loss.double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss.kl, (weight * kl.detach()).mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss.ratio_mean, ratio.mean().detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(loss.ratio_min, ratio.min().detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(loss.ratio_max, ratio.max().detach(), rtol=1e-11, atol=0)
    assert loss.clip_fraction == ((ratio - 1).abs() > clip_range).double().mean()
    divergence = kl_divergence(Normal(mu, s.expand_as(mu)), Normal(mu_old, s.expand_as(mu)))
    torch.testing.assert_close(loss.drift, divergence.mean().detach(), rtol=1e-9, atol=0)


def test_reference_kl_is_that_of_the_released_code():
    """mean((mu - mu_ref)^2) / (2 std_dev_t^2), std_dev_t without dt."""
    _, x_next, mu_old, mu, mu_ref, s, w = transition("flow_sde", 0.3)
    loss = grpo_clip(
        moments_of(x_next, mu_old, mu, mu_ref), rows("flow_sde", s, w, "reference"), ADVANTAGES, ALL,
        clip_range=1e-4, beta=1.0,
    )  # fmt: skip
    sigma = SIGMAS.double()[STEP]
    std_dev_t = 0.7 * torch.sqrt(sigma / (1 - torch.where(sigma == 1, SIGMAS.double()[1], sigma)))
    expected = ((mu - mu_ref) ** 2).mean(dim=1) / (2 * std_dev_t**2)
    torch.testing.assert_close(loss.kl, expected.mean().detach(), rtol=1e-6, atol=0)


def test_weight_of_the_released_cps_code():
    """Its log-prob is -(x' - mu)^2, without the variance."""
    _, x_next, mu_old, mu, mu_ref, s, _ = transition("cps", 1e-2)
    w = coefficient_table("cps", SIGMAS, 0.8, log_prob_weight="cps_reference")[STEP, 3]
    loss = grpo_clip(
        moments_of(x_next, mu_old, mu, mu_ref), rows("cps", s, w), ADVANTAGES, ALL, clip_range=1e-4, beta=0.0
    )
    log_ratio = (-((x_next - mu) ** 2) + (x_next - mu_old) ** 2).mean(dim=1)
    torch.testing.assert_close(loss.ratio_mean, log_ratio.exp().mean().detach(), rtol=1e-12, atol=0)


def zero_moments(m3=0.0):
    return Moments(*(torch.full((B,), value, requires_grad=True) for value in (0.0, 0.0, m3)))


ROWS = StepRows(torch.full((B,), 0.5), torch.full((B,), 2.0), torch.full((B,), 2.0), torch.ones(B))


def test_on_policy_the_ratio_is_exactly_one():
    loss = grpo_clip(zero_moments(), ROWS, ADVANTAGES, ALL, clip_range=2e-6, beta=0.0)
    assert loss.ratio_mean == loss.ratio_min == loss.ratio_max == 1
    assert loss.clip_fraction == loss.drift == loss.kl == 0
    torch.testing.assert_close(loss.policy, -ADVANTAGES.double().mean(), rtol=1e-7, atol=0)


def test_on_policy_the_gradient_is_reinforce():
    moments = zero_moments()
    loss = grpo_clip(moments, ROWS, ADVANTAGES, ALL, clip_range=2e-6, beta=0.0)
    loss.loss.backward()
    torch.testing.assert_close(moments.m1.grad, -ADVANTAGES * ROWS.w * 2 / B)
    torch.testing.assert_close(moments.m2.grad, ADVANTAGES * ROWS.w / B)


def test_only_the_side_that_gains_is_clipped():
    moments = Moments(*(torch.zeros(4, requires_grad=True) for _ in range(3)))
    log_ratio = torch.tensor([3e-6, -3e-6, 3e-6, -3e-6])
    moments.m1.data = log_ratio / 4  # w (2 m1) with w = 2
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    step = StepRows(*(column[:4] for column in ROWS))
    loss = grpo_clip(moments, step, advantages, torch.ones(4), clip_range=2e-6, beta=0.0)
    loss.loss.backward()
    assert (moments.m1.grad != 0).tolist() == [False, True, True, False]
    assert loss.clip_fraction == 1


def test_ratios_are_finer_than_float32():
    """A log-ratio of 2e-8, under half an ulp of float32 at 1, is measured; from float32 moments."""
    moments = Moments(torch.full((B,), 5e-9), torch.zeros(B), torch.zeros(B))
    loss = grpo_clip(moments, ROWS, ADVANTAGES, ALL, clip_range=1e-8, beta=0.0)
    assert (loss.ratio_mean - 1).item() == pytest.approx(2e-8, rel=1e-6)
    assert loss.clip_fraction == 1


@pytest.mark.parametrize("bad", [0.0, 1e30, math.inf, math.nan])
def test_weight_zero_is_exactly_nothing(bad):
    """Also where the sample that is out has moments that would overflow."""
    moments = Moments(*(torch.full((B,), 1e-3) for _ in range(3)))
    for moment in moments:
        moment[2] = bad
        moment.requires_grad_()
    weight = ALL.index_fill(0, torch.tensor([2]), 0.0)
    loss = grpo_clip(moments, ROWS, ADVANTAGES, weight, clip_range=1.0, beta=0.04)
    loss.loss.backward()
    assert loss.loss.isfinite() and loss.policy.isfinite() and loss.kl.isfinite()
    for moment in moments:
        assert moment.grad[2] == 0
        assert (moment.grad[weight > 0] != 0).all()


def test_all_out_is_zero_and_finite():
    moments = zero_moments(m3=1.0)
    loss = grpo_clip(moments, ROWS, ADVANTAGES, torch.zeros(B), clip_range=1e-4, beta=0.04)
    loss.loss.backward()
    assert loss.loss == 0 and all((moment.grad == 0).all() for moment in moments)


def test_the_mean_does_not_depend_on_how_the_batch_is_split():
    moments = Moments(*(1e-3 * torch.rand(3, B, generator=torch.Generator().manual_seed(3))))
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    inputs = (moments, ROWS, ADVANTAGES, weight)

    def part(rows):
        m, step, advantages, w = inputs
        cut = Moments(*(x[rows] for x in m)), StepRows(*(x[rows] for x in step)), advantages[rows], w[rows]
        return grpo_clip(*cut, clip_range=1e-4, beta=0.04)

    halves = [part(slice(0, 3)), part(slice(3, 6))]
    for name in ("loss", "policy", "kl", "ratio_mean", "clip_fraction", "drift"):
        mean = torch.stack([getattr(half, name) for half in halves]).mean()
        torch.testing.assert_close(mean, getattr(part(slice(None)), name), rtol=1e-6, atol=0)


def test_steps_without_noise_are_harmless():
    """An ODE row: s = w = 0."""
    step = StepRows(torch.zeros(B), torch.zeros(B), torch.zeros(B), torch.ones(B))
    moments = Moments(*(torch.ones(B, requires_grad=True) for _ in range(3)))
    loss = grpo_clip(moments, step, ADVANTAGES, ALL, clip_range=1e-4, beta=0.04)
    loss.loss.backward()
    assert loss.ratio_mean == 1 and loss.drift == 0 and loss.kl == 0
    assert all((moment.grad == 0).all() for moment in moments)


def test_record():
    loss = OBJECTIVES["grpo_clip"](zero_moments(), ROWS, ADVANTAGES, ALL, clip_range=1e-4, beta=0.04)
    assert isinstance(loss, Loss) and loss.loss.dtype == torch.float32
    assert all(value.ndim == 0 for value in loss)
    assert [name for name, value in loss._asdict().items() if value.requires_grad] == ["loss"]


def test_effective_clip_range():
    assert effective_clip_range(1e-5, 65_536) == 1e-5
    assert effective_clip_range(1e-5, 262_144) == pytest.approx(5e-6)  # FLUX at 1024 px
    assert effective_clip_range(1e-5, 224_640) == pytest.approx(0.54e-5, rel=1e-2)  # Wan, 33 x 240 x 416
    with pytest.raises(ValueError, match="clip_range 0 must be above 0"):
        effective_clip_range(0, 65_536)


@pytest.mark.parametrize("elements", [1024, 16_384])
def test_the_same_move_spreads_the_log_ratio_by_one_over_sqrt_d(elements):
    """What the rule rests on: std(log r) = delta / sqrt(D), so the share that is clipped stays the same."""
    n, delta = 2000, 1e-3
    generator = torch.Generator().manual_seed(4)
    eps = torch.randn(n, elements, generator=generator)
    log_ratio = delta * eps.mean(dim=1, dtype=torch.float64) - delta**2 / 2
    assert log_ratio.std().item() == pytest.approx(delta / math.sqrt(elements), rel=5 / math.sqrt(2 * n))
    share = ((log_ratio + delta**2 / 2).abs() > effective_clip_range(delta / 256, elements)).double().mean()
    assert share.item() == pytest.approx(0.3173, abs=5 * math.sqrt(0.3173 * 0.6827 / n))
