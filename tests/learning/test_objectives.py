"""Objectives on transitions, against torch.distributions and autograd of the published formulas, and what all share."""

import math
from typing import NamedTuple

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastgrpo.config.schema import ConfigError
from fastgrpo.learning.objectives import (
    OBJECTIVES,
    Loss,
    StepRows,
    TargetMoments,
    clip,
    dppo,
    effective_clip_range,
    guard,
    settings_of,
)
from fastgrpo.sampling.tables import coefficient_table, kl_weights, sampler_steps
from fastgrpo_kernels.transition import transition_ref

B, SHAPE = 6, (3, 7, 23)
D = math.prod(SHAPE)
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0])
STEP = torch.tensor([0, 1, 2, 3, 0, 2])  # (B,) each sample's step
NOISE = {"flow_sde": 0.7, "dance_sde": 0.3, "wan_sde": 1.0, "cps": 0.8}
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
    c_x, c_v, s, w = coefficient_table(sampler_steps(sampler, SIGMAS, NOISE[sampler]))[STEP].T[:, :, None]  # (B, 1) each
    mu_old, mu, mu_ref = (c_x * x + c_v * each for each in (v_old, v, v_ref))
    return v, mu_old + s * eps, mu_old, mu, mu_ref, s, w[:, 0]


def kernel_moments(sampler, move, seed=0):
    """`transition`'s leaf, means and s, and the moments of the same that the kernel's reference returns."""
    v, x_next, mu_old, mu, mu_ref, s, w = transition(sampler, move, seed)
    generator = torch.Generator().manual_seed(seed)
    x, v_old, v_ref, _, _ = torch.randn(5, B, D, generator=generator, dtype=torch.float64)
    rows = coefficient_table(sampler_steps(sampler, SIGMAS, NOISE[sampler]))[STEP]
    image = (B, *SHAPE)
    moments = transition_ref(
        x_next.view(image), x.view(image), v.view(image), v_old.view(image), rows,
        v_ref=(v_old + move * v_ref).view(image),
    )  # fmt: skip
    return moments, v, x_next, mu_old, mu, mu_ref, s, w


def moments_of(x_next, mu_old, mu, mu_ref):
    e, d, k = x_next - mu_old, mu - mu_old, mu - mu_ref
    return Moments((e * d).mean(dim=1), (d * d).mean(dim=1), (k * k).mean(dim=1))


def rows(sampler, s, w, kl="paper"):
    return StepRows(s[:, 0], w, kl_weights(sampler_steps(sampler, SIGMAS, NOISE[sampler]), kl)[STEP], torch.ones(B))


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
    loss = clip(
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
    loss = clip(
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
    w = coefficient_table(sampler_steps("cps", SIGMAS, 0.8), log_prob_weight="cps_reference")[STEP, 3]
    loss = clip(moments_of(x_next, mu_old, mu, mu_ref), rows("cps", s, w), ADVANTAGES, ALL, clip_range=1e-4, beta=0.0)
    log_ratio = (-((x_next - mu) ** 2) + (x_next - mu_old) ** 2).mean(dim=1)
    torch.testing.assert_close(loss.ratio_mean, log_ratio.exp().mean().detach(), rtol=1e-12, atol=0)


def zero_moments(m3=0.0):
    return Moments(*(torch.full((B,), value, requires_grad=True) for value in (0.0, 0.0, m3)))


ROWS = StepRows(torch.full((B,), 0.5), torch.full((B,), 2.0), torch.full((B,), 2.0), torch.ones(B))


def test_on_policy_the_ratio_is_exactly_one():
    loss = clip(zero_moments(), ROWS, ADVANTAGES, ALL, clip_range=2e-6, beta=0.0)
    assert loss.ratio_mean == loss.ratio_min == loss.ratio_max == 1
    assert loss.clip_fraction == loss.drift == loss.kl == 0
    torch.testing.assert_close(loss.policy, -ADVANTAGES.double().mean(), rtol=1e-7, atol=0)


def test_on_policy_the_gradient_is_reinforce():
    moments = zero_moments()
    loss = clip(moments, ROWS, ADVANTAGES, ALL, clip_range=2e-6, beta=0.0)
    loss.loss.backward()
    torch.testing.assert_close(moments.m1.grad, -ADVANTAGES * ROWS.w * 2 / B)
    torch.testing.assert_close(moments.m2.grad, ADVANTAGES * ROWS.w / B)


def test_only_the_side_that_gains_is_clipped():
    moments = Moments(*(torch.zeros(4, requires_grad=True) for _ in range(3)))
    log_ratio = torch.tensor([3e-6, -3e-6, 3e-6, -3e-6])
    moments.m1.data = log_ratio / 4  # w (2 m1) with w = 2
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    step = StepRows(*(column[:4] for column in ROWS))
    loss = clip(moments, step, advantages, torch.ones(4), clip_range=2e-6, beta=0.0)
    loss.loss.backward()
    assert (moments.m1.grad != 0).tolist() == [False, True, True, False]
    assert loss.clip_fraction == 1


def test_ratios_are_finer_than_float32():
    """A log-ratio of 2e-8, under half an ulp of float32 at 1, is measured; from float32 moments."""
    moments = Moments(torch.full((B,), 5e-9), torch.zeros(B), torch.zeros(B))
    loss = clip(moments, ROWS, ADVANTAGES, ALL, clip_range=1e-8, beta=0.0)
    assert (loss.ratio_mean - 1).item() == pytest.approx(2e-8, rel=1e-6)
    assert loss.clip_fraction == 1


def test_all_out_is_zero_and_finite():
    moments = zero_moments(m3=1.0)
    loss = clip(moments, ROWS, ADVANTAGES, torch.zeros(B), clip_range=1e-4, beta=0.04)
    loss.loss.backward()
    assert loss.loss == 0 and all((moment.grad == 0).all() for moment in moments)


@pytest.mark.parametrize("objective", [clip, guard, dppo])
def test_steps_without_noise_are_harmless(objective):
    """An ODE row: s = w = 0."""
    step = StepRows(torch.zeros(B), torch.zeros(B), torch.zeros(B), torch.ones(B))
    moments = Moments(*(torch.ones(B, requires_grad=True) for _ in range(3)))
    loss = objective(moments, step, ADVANTAGES, ALL, clip_range=1e-4, beta=0.04)
    loss.loss.backward()
    assert loss.ratio_mean == 1 and loss.drift == 0 and loss.kl == 0 and loss.clip_fraction == 0
    assert all((moment.grad == 0).all() for moment in moments if moment.grad is not None)  # guard reads no m2


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


def direct_guard(x_next, mu_old, mu, mu_ref, s, advantages, weight, dt, clip_range, beta):
    """GRPO-Guard: each sample's own mean correction, the std of the transition in the exponent, and 1 / |dt|."""
    old, new, reference = (Normal(mean, s.expand_as(mean)) for mean in (mu_old, mu, mu_ref))
    log_ratio = new.log_prob(x_next).mean(dim=1) - old.log_prob(x_next).mean(dim=1)
    correction = (mu - mu_old).square().mean(dim=1) / (2 * s[:, 0] ** 2)
    ratio = ((log_ratio + correction) * s[:, 0]).exp()
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)) / dt
    kl = kl_divergence(new, reference).mean(dim=1)
    batch_ratio = ((log_ratio + correction.mean()) * s[:, 0]).exp()  # the released code's slip
    return (weight * (policy + beta * kl)).mean(), ratio, batch_ratio


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("sampler", NOISE)
def test_guard_is_the_published_formula_sample_by_sample(sampler, beta):
    moments, v, x_next, mu_old, mu, mu_ref, s, w = kernel_moments(sampler, 0.3)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    dt = -SIGMAS.double().diff()[STEP]
    clip_range = 0.02 / math.sqrt(D)
    expected, ratio, batch_ratio = direct_guard(x_next, mu_old, mu, mu_ref, s, ADVANTAGES, weight, dt, clip_range, beta)
    (expected_grad,) = torch.autograd.grad(expected, v, retain_graph=True)
    step = rows(sampler, s, w)._replace(loss_weight=1 / dt)
    loss = guard(moments, step, ADVANTAGES, weight, clip_range=clip_range, beta=beta)
    (grad,) = torch.autograd.grad(loss.loss, v)
    torch.testing.assert_close(loss.loss.double(), expected.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-12)
    assert (grad[2] == 0).all()
    for name, reduced in (("ratio_mean", ratio.mean()), ("ratio_min", ratio.min()), ("ratio_max", ratio.max())):
        torch.testing.assert_close(getattr(loss, name), reduced.detach(), rtol=1e-11, atol=0)
    assert 0 < loss.clip_fraction == ((ratio - 1).abs() > clip_range).double().mean() < 1
    assert (loss.ratio_min - batch_ratio.min()).abs() > 1e-5 or (loss.ratio_max - batch_ratio.max()).abs() > 1e-5


@pytest.mark.parametrize("elements", [1024, 16_384])
def test_guard_centres_the_ratio_at_every_noise_level(elements):
    """clip's log-ratio has the mean -delta^2 / 2 at any size; guard's has none, and one spread for all s."""
    n, move = 400, 0.02
    generator = torch.Generator().manual_seed(5)
    for s in (0.1, 0.7):
        e, d = s * torch.randn(n, elements, generator=generator), move * torch.randn(elements, generator=generator)
        moments = Moments((e * d).mean(1), d.square().mean().expand(n), torch.zeros(n))
        step = StepRows(torch.full((n,), s), torch.full((n,), 0.5 / s**2), torch.zeros(n), torch.ones(n))
        settings = {"clip_range": move / math.sqrt(elements), "beta": 0.0}
        loss = guard(moments, step, torch.ones(n), torch.ones(n), **settings)
        error = move / math.sqrt(elements) / math.sqrt(n)
        assert (loss.ratio_mean - 1).item() == pytest.approx(0, abs=5 * error)
        assert loss.clip_fraction.item() == pytest.approx(0.3173, abs=0.12)
        left = clip(moments, step, torch.ones(n), torch.ones(n), **settings).ratio_mean - 1
        assert left.item() == pytest.approx(-((move / s) ** 2) / 2, rel=0.3) and left < -5 * error


def direct_dppo(x_next, mu_old, mu, mu_ref, s, advantages, weight, delta, beta):
    """Flow-DPPO eq. 18, sample by sample."""
    old, new, reference = (Normal(mean, s.expand_as(mean)) for mean in (mu_old, mu, mu_ref))
    ratio = (new.log_prob(x_next).mean(dim=1) - old.log_prob(x_next).mean(dim=1)).exp()
    divergence = kl_divergence(old, new).mean(dim=1)
    mask = []
    for a, r, d in zip(advantages.tolist(), ratio.tolist(), divergence.tolist(), strict=True):
        away = (a > 0 and r > 1) or (a < 0 and r < 1)
        mask.append(0.0 if d > delta and away else 1.0)
    kl = kl_divergence(new, reference).mean(dim=1)
    return (weight * (-advantages * ratio * torch.tensor(mask) + beta * kl)).mean(), mask, divergence


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("sampler", NOISE)
def test_dppo_is_the_published_formula(sampler, beta):
    outcomes = []
    for seed in range(3):
        moments, v, x_next, mu_old, mu, mu_ref, s, w = kernel_moments(sampler, 0.3, seed)
        weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
        delta = (moments.m2.detach() / (2 * s[:, 0] ** 2)).sort().values[2:4].mean().item()  # half are beyond it
        expected, mask, divergence = direct_dppo(x_next, mu_old, mu, mu_ref, s, ADVANTAGES, weight, delta, beta)
        (expected_grad,) = torch.autograd.grad(expected, v, retain_graph=True)
        step = rows(sampler, s, w)
        loss = dppo(moments, step, ADVANTAGES, weight, clip_range=1e-4, beta=beta, delta=delta)
        (grad,) = torch.autograd.grad(loss.loss, v)
        torch.testing.assert_close(loss.loss.double(), expected.detach(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(loss.drift, divergence.mean().detach(), rtol=1e-9, atol=0)
        assert loss.clip_fraction.item() == pytest.approx(1 - sum(mask) / B) and (grad[4] == 0).all()
        outcomes += mask
    assert 0 < sum(outcomes) < len(outcomes)


def test_dppo_masks_only_what_leads_away_and_only_when_far():
    """A positive advantage with r > 1 and a negative one with r < 1; never what leads back; nothing within delta."""
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    step = StepRows(*(column[:5] for column in ROWS))
    for m2, expected in ((1e-3, [False, True, True, False, False]), (1e-8, [True, True, True, True, False])):
        m1 = (torch.tensor([3e-6, -3e-6, 3e-6, -3e-6, 3e-6]) / 2 + m2) / 2  # log-ratio +-3e-6, with w = 2
        moments = Moments(m1.requires_grad_(), torch.full((5,), m2).requires_grad_(), torch.zeros(5))
        loss = dppo(moments, step, advantages, torch.ones(5), clip_range=1e-6, beta=0.0, delta=1e-7)
        loss.loss.backward()
        assert (moments.m1.grad != 0).tolist() == (moments.m2.grad != 0).tolist() == expected
        assert loss.clip_fraction.item() == pytest.approx(0.4 if m2 > 1e-7 else 0.0)


def test_dppo_bounds_the_move_whatever_the_size_of_the_latent():
    """The same rms of d over s is as far from delta in a large latent as in a small one."""
    n, s, delta = 200, 0.5, 1e-6
    generator = torch.Generator().manual_seed(6)
    step = StepRows(torch.full((n,), s), torch.full((n,), 0.5 / s**2), torch.zeros(n), torch.ones(n))
    for elements in (1024, 16_384):
        for far in (0.9, 1.1):
            d = far * s * math.sqrt(2 * delta) * torch.randn(n, elements, generator=generator).sign()
            e = s * torch.randn(n, elements, generator=generator)
            moments = Moments((e * d).mean(1), d.square().mean(1), torch.zeros(n))
            loss = dppo(moments, step, torch.ones(n), torch.ones(n), clip_range=1.0, beta=0.0, delta=delta)
            assert loss.drift.item() == pytest.approx(far**2 * delta, rel=1e-4)
            assert loss.clip_fraction.item() == pytest.approx(0.5 * (far > 1), abs=0.2)


def random_moments(on_final_images, seed=3):
    m1, m2, m3, m0, plus, minus = torch.rand(6, B, generator=torch.Generator().manual_seed(seed))
    moments = Moments(2e-3 * m1 - 1e-3, 1e-3 * m2, 1e-3 * m3)
    return TargetMoments(*moments, 1 + m0, 0.5 + plus, 0.5 + minus) if on_final_images else moments


def evaluate(name, moments, step=ROWS, advantages=ADVANTAGES, weight=ALL, clip_range=1.0, beta=0.04):
    """With every bound so wide that each sample has a gradient."""
    settings = {"delta": 1.0} if name == "dppo" else {"advantage": "exp"} if name == "sft" else {}
    return OBJECTIVES[name].loss(moments, step, advantages, weight, clip_range=clip_range, beta=beta, **settings)


EVERY = pytest.mark.parametrize("name", OBJECTIVES)


@EVERY
@pytest.mark.parametrize("bad", [0.0, 1e30, math.inf, math.nan])
def test_weight_zero_is_exactly_nothing(name, bad):
    """Also where the sample that is out has moments that would overflow."""
    objective = OBJECTIVES[name]
    out = [2, 3] if objective.pairs else [2]
    moments = random_moments(objective.on_final_images)
    for moment in moments:
        moment[2] = bad
        moment.requires_grad_()
    weight = ALL.index_fill(0, torch.tensor([2]), 0.0)
    loss = evaluate(name, moments, weight=weight)
    loss.loss.backward()
    assert loss.loss.isfinite() and loss.policy.isfinite() and loss.kl.isfinite()
    live = [i for i in range(B) if i not in out]
    for moment in moments[:3]:
        if moment.grad is not None:
            assert (moment.grad[out] == 0).all()
    assert (moments.m1.grad[live] != 0).all() and (moments.m3.grad[live] != 0).all()
    ordinary = evaluate(name, random_moments(objective.on_final_images), weight=weight)
    assert torch.equal(loss.loss, ordinary.loss)


@EVERY
def test_the_mean_does_not_depend_on_how_the_batch_is_split(name):
    moments = random_moments(OBJECTIVES[name].on_final_images)
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])

    def part(rows):
        cut = type(moments)(*(x[rows] for x in moments)), StepRows(*(x[rows] for x in ROWS))
        return evaluate(name, *cut, ADVANTAGES[rows], weight[rows], clip_range=1e-4)

    thirds = [part(slice(start, start + 2)) for start in (0, 2, 4)]
    for metric in ("loss", "policy", "kl", "ratio_mean", "clip_fraction", "drift"):
        mean = torch.stack([getattr(third, metric) for third in thirds]).mean()
        torch.testing.assert_close(mean, getattr(part(slice(None)), metric), rtol=1e-6, atol=0)


@EVERY
def test_the_step_weight_is_of_the_policy_and_the_kl_has_its_own(name):
    moments = random_moments(OBJECTIVES[name].on_final_images)
    loss = evaluate(name, moments, beta=0.5)
    heavy = evaluate(name, moments, ROWS._replace(loss_weight=torch.full((B,), 3.0)), beta=0.5)
    torch.testing.assert_close(heavy.policy, 3 * loss.policy)
    torch.testing.assert_close(heavy.kl, loss.kl)
    torch.testing.assert_close(loss.kl, (2 * moments.m3.double()).mean())
    torch.testing.assert_close(heavy.loss.double(), heavy.policy + 0.5 * loss.kl, rtol=1e-6, atol=1e-9)
    first = ROWS._replace(loss_weight=torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    pair = type(moments)(*(m[:2] for m in moments)), StepRows(*(r[:2] for r in ROWS)), ADVANTAGES[:2], ALL[:2]
    torch.testing.assert_close(3 * evaluate(name, moments, first).policy, evaluate(name, *pair).policy)


@EVERY
def test_on_policy_every_ratio_is_exactly_one(name):
    moments = random_moments(OBJECTIVES[name].on_final_images)
    still = moments._replace(m1=torch.zeros(B), m2=torch.zeros(B))
    loss = evaluate(name, still, clip_range=1e-12)
    assert loss.ratio_mean == loss.ratio_min == loss.ratio_max == 1
    assert loss.drift == 0 and loss.clip_fraction == (1 / 6 if name == "nft" else 0)  # one advantage is 5


@EVERY
def test_record(name):
    moments = random_moments(OBJECTIVES[name].on_final_images)
    loss = evaluate(name, type(moments)(*(m.requires_grad_() for m in moments)))
    assert isinstance(loss, Loss) and loss.loss.dtype == torch.float32
    assert all(value.ndim == 0 for value in loss)
    assert [field for field, value in loss._asdict().items() if value.requires_grad] == ["loss"]


def test_settings_are_completed_and_counted():
    assert settings_of("clip", {}) == settings_of("guard", {}) == {}
    assert settings_of("dppo", {}) == {"delta": 1e-7}
    assert settings_of("nft", {"mix": 1}) == {"mix": 1.0, "adv_clip_max": 5.0}
    assert settings_of("awm", {"ema_beta": 0, "time_power": 0.0})["ema_beta"] == 0.0
    assert settings_of("sft", {"advantage": "none"}) == {"advantage": "none", "temperature": 1.0}
    for name, objective in OBJECTIVES.items():
        moments = random_moments(objective.on_final_images)
        objective.loss(moments, ROWS, ADVANTAGES, ALL, clip_range=1.0, beta=0.1, **settings_of(name, {}))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("nft", {"mixx": 1.0}, r"objective\.settings\.mixx: unknown key; did you mean 'mix'\? choices: mix, adv_clip_max"),
        ("nft", {"mix": "one"}, r"objective\.settings\.mix = 'one': expected float, found str"),
        ("nft", {"mix": True}, r"objective\.settings\.mix = True: expected float, found bool"),
        ("nft", {"mix": 0}, r"objective\.settings\.mix = 0\.0: must be above 0"),
        ("dppo", {"delta": math.nan}, r"objective\.settings\.delta = nan: must be a finite number"),
        ("dpo", {"strength": math.inf}, r"objective\.settings\.strength = inf: must be a finite number"),
        ("awm", {"ema_beta": -1.0}, r"objective\.settings\.ema_beta = -1\.0: must be at least 0"),
        ("awm", {"clip_range": 1.0}, r"objective\.settings\.clip_range: unknown key"),
        ("sft", {"advantage": "expo"}, r"objective\.settings\.advantage = 'expo': did you mean 'exp'"),
        ("clip", {"delta": 1.0}, r"objective\.settings\.delta: objective 'clip' has no settings of its own"),
    ],
)
def test_settings_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(name, settings)
