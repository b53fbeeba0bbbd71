"""The guided velocity by itself: in the bits that the rollout's kernel stores, and without a gradient."""

import pytest
import torch
from support.helpers import DEVICE, NoSync

from fastgrpo_kernels import (
    NoiseAddress,
    guided_velocity,
    guided_velocity_ref,
    guided_velocity_triton,
    sde_step,
    sde_step_triton,
)
from fastgrpo_kernels.philox import BLOCK

# (B, *D): one element, less than a quad, odd, one past a block, and a latent.
SHAPES = ((1, 1), (5, 3), (5, 257), (2, BLOCK + 1), (3, 4, 8, 8))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUIDANCE = 4.5


def velocities(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    v, v_uncond = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return v, v_uncond


def rolled(run, v: torch.Tensor, v_uncond: torch.Tensor) -> torch.Tensor:
    """What a step of a rollout stores as its velocity."""
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    address = NoiseAddress(one, one, torch.arange(len(v), device=DEVICE))
    table = torch.tensor([[0.9, -0.1, 0.4, 3.0]], device=DEVICE)
    x = torch.ones_like(v, dtype=torch.float32)
    return run(x, v, table, one - 1, address, v_uncond=v_uncond, guidance_scale=GUIDANCE).v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_rollout(shape, dtype):
    v, v_uncond = velocities(shape, dtype)
    for own, run in ((guided_velocity_triton, sde_step_triton), (guided_velocity, sde_step)):
        found = own(v, v_uncond, GUIDANCE)
        assert found.dtype == torch.float32 and found.shape == shape
        assert torch.equal(found, rolled(run, v, v_uncond))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(shape, dtype):
    v, v_uncond = velocities(shape, dtype)
    expected = guided_velocity_ref(v, v_uncond, GUIDANCE, torch.float64)
    assert torch.equal(expected, v_uncond.double() + GUIDANCE * (v.double() - v_uncond.double()))
    for run in (guided_velocity, guided_velocity_triton):
        torch.testing.assert_close(run(v, v_uncond, GUIDANCE).double(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_v_uncond_it_is_v(dtype):
    v, _ = velocities((5, 257), dtype)
    for run in (guided_velocity, guided_velocity_triton):
        found = run(v, None, GUIDANCE)
        assert found.dtype == torch.float32 and torch.equal(found, v.float())


@pytest.mark.parametrize("guided", (False, True))
def test_no_gradient_and_no_wait(guided):
    v, v_uncond = (t.requires_grad_() for t in velocities((3, 4, 8, 8), torch.float32))
    with NoSync():
        found = guided_velocity(v, v_uncond if guided else None, GUIDANCE)
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
        guided_velocity(**case, guidance_scale=GUIDANCE)
