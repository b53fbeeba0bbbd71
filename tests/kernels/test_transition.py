"""The moments of a stored transition: values against float64, gradients against autograd, and exactness on-
policy."""

import math

import pytest
import torch
from support.helpers import DEVICE, REAL_SHAPES, NoSync

from fastgrpo_kernels import (
    Guided,
    Moments,
    NoiseAddress,
    sde_step_ref,
    sde_step_triton,
    transition,
    transition_ref,
    transition_triton,
)
from fastgrpo_kernels.common import BLOCK

pytestmark = pytest.mark.gpu

SHAPES = ((1, 1), (5, 3), (5, 257), (2, BLOCK + 1), (3, 4, 8, 8), *REAL_SHAPES)
# Of the gradients, relative to the largest of them; the moments are fp32 whatever the dtype of v.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MOMENT_TOLERANCE = 1e-5
DTYPES = tuple(TOLERANCES)
# c_x, c_v, s, w = 1 / (2 s^2)
COEFFICIENTS = (0.90, -0.10, 0.39, 1 / (2 * 0.39**2))
GUIDANCE = 4.5


def inputs(shape: tuple[int, ...], dtype: torch.dtype, guided: bool = False, with_ref: bool = False) -> dict:
    """A transition whose velocities differ by a few percent, in the dtype of a network's output."""
    generator = torch.Generator().manual_seed(2)

    def randn(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator).to(DEVICE)

    v, x = randn().to(dtype), randn()
    v_old = v.float() + randn(0.03)
    # Rows differ, so that reading another sample's row cannot pass.
    coefficients = torch.tensor([COEFFICIENTS], device=DEVICE).repeat(shape[0], 1)
    coefficients[:, :2] *= torch.linspace(1, 2, shape[0], device=DEVICE)[:, None]
    c_x, c_v, s, _ = coefficients.view(-1, 4, *[1] * (x.dim() - 1)).unbind(1)
    case = {
        "x_next": c_x * x + c_v * v_old + s * randn(),
        "x": x,
        "v": v,
        "v_old": v_old,
        "coefficients": coefficients,
    }
    if guided:
        case |= {"v_uncond": v.flip(0) + randn(0.1).to(dtype), "scale": GUIDANCE}
    if with_ref:
        case |= {"v_ref": v_old + randn(0.05)}
    return case


def velocity_of(case: dict) -> Guided | torch.Tensor:
    return Guided(case["v"], case["v_uncond"], case["scale"]) if "v_uncond" in case else case["v"]


def moments_by(run, case: dict) -> Moments:
    """`run` on the arguments of `inputs`, where each tensor has a name of its own."""
    rest = {name: value for name, value in case.items() if name not in Guided._fields}
    return run(**rest, velocity=velocity_of(case))


def as_double(case: dict) -> dict:
    return {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in case.items()}


def assert_moments_close(actual: Moments, expected: Moments) -> None:
    for name, a, e in zip(Moments._fields, actual, expected, strict=True):
        # m1 sums terms of both signs: its error is relative to their size, |e| |d| with |e| about 0.4.
        scale = 0.1 * expected.m2.sqrt() if name == "m1" else e
        assert ((a.double() - e).abs() <= MOMENT_TOLERANCE * scale).all(), (name, a, e)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", (False, True))
@pytest.mark.parametrize("with_ref", (False, True))
def test_forward_equals_float64(shape, dtype, guided, with_ref):
    case = inputs(shape, dtype, guided, with_ref)
    expected = moments_by(transition_ref, as_double(case))
    assert expected.m1.dtype == torch.float64 and expected.m1.shape == shape[:1]
    for run in (transition, transition_triton):
        assert_moments_close(moments_by(run, case), expected)
    assert with_ref or torch.equal(moments_by(transition_triton, case).m3, torch.zeros(shape[0], device=DEVICE))


def gradients(run, case: dict, wanted: tuple[str, ...]) -> list[torch.Tensor]:
    """Of a loss whose upstream gradients differ by moment and by sample."""
    leaves = {name: case[name].detach().requires_grad_() for name in wanted}
    moments = torch.stack(moments_by(run, case | leaves))
    upstream = torch.linspace(-1, 2, moments.numel(), device=DEVICE, dtype=moments.dtype).view_as(moments)
    return list(torch.autograd.grad((moments * upstream).sum(), list(leaves.values())))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", (False, True))
@pytest.mark.parametrize("with_ref", (False, True))
def test_backward_equals_autograd(shape, dtype, guided, with_ref):
    case = inputs(shape, dtype, guided, with_ref)
    wanted = ("v", "v_uncond") if guided else ("v",)
    expected = gradients(transition_ref, as_double(case), wanted)
    for run in (transition, transition_triton):
        for actual, truth in zip(gradients(run, case, wanted), expected, strict=True):
            assert actual.dtype == dtype
            error = (actual.double() - truth).abs().max() / truth.abs().max()
            assert error < TOLERANCES[dtype], (run.__name__, error)


@pytest.mark.parametrize("wanted", (("v",), ("v_uncond",)))
def test_backward_of_one_branch(wanted):
    case = inputs((5, 257), torch.float32, guided=True, with_ref=True)
    expected = gradients(transition_ref, as_double(case), wanted)
    torch.testing.assert_close(gradients(transition_triton, case, wanted)[0].double(), expected[0])


@pytest.mark.parametrize("run", (transition_ref, transition_triton))
def test_gradients_reach_the_new_velocity_only(run):
    case = inputs((2, 9), torch.float32, guided=True, with_ref=True)
    leaves = {k: t.requires_grad_() if isinstance(t, torch.Tensor) else t for k, t in case.items()}
    torch.stack(moments_by(run, leaves)).sum().backward()
    reached = {k for k, t in leaves.items() if isinstance(t, torch.Tensor) and t.grad is not None}
    assert reached == {"v", "v_uncond"}


def test_gradcheck():
    case = as_double(inputs((2, 5), torch.float32, guided=True, with_ref=True))

    def moments(v: torch.Tensor, v_uncond: torch.Tensor) -> torch.Tensor:
        return torch.stack(moments_by(transition_ref, case | {"v": v, "v_uncond": v_uncond}))

    assert torch.autograd.gradcheck(moments, (case["v"].requires_grad_(), case["v_uncond"].requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("step", "run"),
    ((sde_step_ref, transition_ref), (sde_step_triton, transition_triton)),
    ids=("ref", "triton"),
)
def test_on_policy_is_exactly_zero(dtype, step, run):
    """From the velocity that a guided rollout stored to the training forward, in the dtype of the network."""
    case = inputs((3, BLOCK + 1), dtype, guided=True)
    one, velocity = torch.ones(1, dtype=torch.int64, device=DEVICE), velocity_of(case)
    address = NoiseAddress(one, one, torch.arange(3, device=DEVICE))
    out = step(case["x"], velocity, case["coefficients"][:, None], one - 1, address)
    moments = run(out.x_next, case["x"], velocity, out.v, case["coefficients"], v_ref=out.v)
    assert all(torch.equal(moment, torch.zeros(3, device=DEVICE)) for moment in moments)


def test_difference_form_is_accurate():
    """Near the policy, where clip ranges are 1e-5: the moments keep the log-ratio, subtracting log-probs
    loses it."""
    case = inputs((4, 8192), torch.float32)
    generator = torch.Generator().manual_seed(3)
    drift = 1e-4 * torch.randn(case["v"].shape, generator=generator).to(DEVICE)
    case["v"] = case["v_old"] + drift
    w = case["coefficients"][:, 3]
    exact = moments_by(transition_ref, as_double(case))
    truth = w.double() * (2 * exact.m1 - exact.m2)

    def log_prob(v: torch.Tensor) -> torch.Tensor:
        c_x, c_v, s, _ = (column[:, None] for column in case["coefficients"].unbind(1))
        residual = case["x_next"] - (c_x * case["x"] + c_v * v)
        return (-residual.square() / (2 * s * s) - torch.log(s) - 0.5 * math.log(2 * math.pi)).mean(1)

    subtracted = (log_prob(case["v"]) - log_prob(case["v_old"]) - truth).abs().max()
    assert subtracted > 1e-9
    for run in (transition, transition_triton):
        m1, m2, _ = moments_by(run, case)
        assert (w.double() * (2 * m1.double() - m2.double()) - truth).abs().max() < 1e-10


def test_repeats_bit_for_bit():
    case = inputs((5, BLOCK + 1), torch.bfloat16, guided=True, with_ref=True)
    first, second = (
        (*moments_by(transition_triton, case), *gradients(transition_triton, case, ("v", "v_uncond"))) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    last = moments_by(transition_triton, {k: t[3:] if isinstance(t, torch.Tensor) else t for k, t in case.items()})
    assert all(torch.equal(a[3:], b) for a, b in zip(first, last, strict=False))


def test_no_sync():
    case = inputs((2, 9), torch.bfloat16, guided=True, with_ref=True)
    v = case["v"].requires_grad_()
    with NoSync():
        moments_by(transition_ref, case).m2.sum().backward()
        moments_by(transition, case).m2.sum().backward()
    assert v.grad is not None


BAD_INPUTS = (
    ({"x": torch.zeros(2, 8).bfloat16()}, r"x has dtype torch.bfloat16, expected torch.float32"),
    ({"x_next": torch.zeros(2, 7)}, r"x_next has shape \(2, 7\), expected \(2, 8\)"),
    ({"v": torch.zeros(8, 2).T}, r"v is not contiguous .*call .contiguous\(\)"),
    ({"v_old": torch.zeros(2, 8).double()}, r"v_old has dtype torch.float64"),
    ({"v_uncond": torch.zeros(2, 8, device="meta"), "scale": 2.0}, r"v_uncond is on meta, expected"),
    ({"v_ref": torch.zeros(1, 8)}, r"v_ref has shape \(1, 8\)"),
    ({"coefficients": torch.zeros(2, 3)}, r"coefficients has shape \(2, 3\), expected \(2, 4\)"),
)


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_inputs(change, message):
    change = {k: t.to(DEVICE) if isinstance(t, torch.Tensor) and not t.is_meta else t for k, t in change.items()}
    with pytest.raises(ValueError, match=message):
        moments_by(transition, inputs((2, 8), torch.float32) | change)
