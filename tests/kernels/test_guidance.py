"""The guided velocity by itself: in the bits that the rollout's kernel stores, and without a gradient."""

import pytest
import torch
from support.helpers import DEVICE, NoSync

from fastgrpo_kernels import (
    Guided,
    NoiseAddress,
    guided_velocity,
    guided_velocity_ref,
    guided_velocity_triton,
    sde_step,
    sde_step_triton,
    transition,
    transition_triton,
)
from fastgrpo_kernels.common import BLOCK

# (B, *D): one element, less than a quad, odd, one past a block, and a latent.
SHAPES = ((1, 1), (5, 3), (5, 257), (2, BLOCK + 1), (3, 4, 8, 8))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUIDANCE = 4.5


def guided(shape: tuple[int, ...], dtype: torch.dtype) -> Guided:
    generator = torch.Generator().manual_seed(3)
    v, v_uncond = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return Guided(v, v_uncond, GUIDANCE)


def rolled(run, velocity: Guided) -> torch.Tensor:
    """What a step of a rollout stores as its velocity."""
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    address = NoiseAddress(one, one, torch.arange(len(velocity.v), device=DEVICE))
    table = torch.tensor([[0.9, -0.1, 0.4, 3.0]], device=DEVICE)
    x = torch.ones_like(velocity.v, dtype=torch.float32)
    return run(x, velocity, table, one - 1, address).v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_rollout(shape, dtype):
    velocity = guided(shape, dtype)
    for own, run in ((guided_velocity_triton, sde_step_triton), (guided_velocity, sde_step)):
        found = own(velocity)
        assert found.dtype == torch.float32 and found.shape == shape
        assert torch.equal(found, rolled(run, velocity))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_v_old_it_is_on_policy(dtype):
    """v_old that is made anew, with the prompt and without, of a transition that was stored before."""
    velocity = guided((5, 257), dtype)
    x, x_next = (torch.full((5, 257), value, device=DEVICE) for value in (0.5, 2.0))
    rows = torch.tensor([[0.9, -0.1, 0.4, 3.0]], device=DEVICE).repeat(5, 1)
    for own, run in ((guided_velocity_triton, transition_triton), (guided_velocity, transition)):
        m1, m2, _ = run(x_next, x, velocity, own(velocity), rows)
        assert not m1.any() and not m2.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(shape, dtype):
    velocity = guided(shape, dtype)
    v, v_uncond = velocity.v.double(), velocity.v_uncond.double()
    expected = guided_velocity_ref(velocity, torch.float64)
    assert torch.equal(expected, v_uncond + GUIDANCE * (v - v_uncond))
    for run in (guided_velocity, guided_velocity_triton):
        torch.testing.assert_close(run(velocity).double(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_v_uncond_it_is_v(dtype):
    v = guided((5, 257), dtype).v
    for run in (guided_velocity, guided_velocity_triton):
        for velocity in (v, Guided(v), Guided(v, None, GUIDANCE)):
            found = run(velocity)
            assert found.dtype == torch.float32 and torch.equal(found, v.float())


@pytest.mark.parametrize("with_uncond", (False, True))
def test_no_gradient_and_no_wait(with_uncond):
    v, v_uncond, scale = guided((3, 4, 8, 8), torch.float32)
    velocity = Guided(v.requires_grad_(), v_uncond.requires_grad_() if with_uncond else None, scale)
    with NoSync():
        found = guided_velocity(velocity)
    assert not found.requires_grad


BAD_INPUTS = (
    ({"v": torch.zeros(16)}, r"v has shape \(16,\), expected \(B, \*D\)"),
    ({"v": torch.zeros(2, 0)}, r"v has shape \(2, 0\)"),
    ({"v": torch.zeros(2, 8).double()}, r"v has dtype torch.float64, expected .* or torch.float16"),
    ({"v": torch.zeros(8, 2).T}, r"v is not contiguous .*call .contiguous\(\)"),
    ({"v_uncond": torch.zeros(1, 8)}, r"v_uncond has shape \(1, 8\), expected \(2, 8\)"),
    ({"v_uncond": torch.zeros(2, 8, dtype=torch.int64)}, r"v_uncond has dtype torch.int64"),
    ({"v_uncond": torch.zeros(2, 8, device="meta")}, r"v_uncond is on meta, expected \w+"),
    ({"v_uncond": torch.zeros(8, 2).T}, r"v_uncond is not contiguous"),
)


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_inputs(change, message):
    case = {"v": torch.zeros(2, 8), "v_uncond": torch.zeros(2, 8)} | change
    case = {name: t if t.is_meta else t.to(DEVICE) for name, t in case.items()}
    with pytest.raises(ValueError, match=message):
        guided_velocity(Guided(**case, scale=GUIDANCE))


def test_a_pair_is_no_velocity():
    """Which of two were the one with the prompt, and the scale, would be a guess."""
    with pytest.raises(TypeError, match=r"velocity is a tuple, expected a Tensor or Guided\(v, v_uncond, scale\)"):
        guided_velocity((torch.zeros(2, 8), torch.zeros(2, 8)))
