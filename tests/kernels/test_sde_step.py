"""One denoising transition: the kernel against the reference, the reference against float64, and what must
hold of any sampler's table."""

import sys

import pytest
import torch
from support.helpers import DEVICE, REAL_SHAPES, NoSync

from fastgrpo_kernels import (
    Guided,
    NoiseAddress,
    SdeStep,
    normal,
    normal_ref,
    sde_step,
    sde_step_ref,
    sde_step_triton,
)
from fastgrpo_kernels.common import BLOCK

pytestmark = pytest.mark.gpu

# (B, *D): one element, less than a quad, odd, one past a block, and a latent.
SHAPES = ((1, 1), (5, 3), (5, 257), (2, BLOCK + 1), (3, 4, 8, 8), *REAL_SHAPES)
# Of x_next_model; everything else is fp32 and takes the fp32 row whatever the dtype of v.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = tuple(TOLERANCES)
# Columns c_x, c_v, s, w; row 2 is an ODE step.
TABLE = ((0.75, -0.04, 0.70, 1.0), (0.90, -0.10, 0.39, 3.3), (1.0, -0.2, 0.0, 0.0), (0.91, -0.23, 0.28, 6.4))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, row: int = 0) -> dict:
    generator = torch.Generator().manual_seed(1)
    batch = shape[0]
    return {
        "x": torch.randn(shape, generator=generator).to(DEVICE),
        "velocity": torch.randn(shape, generator=generator).to(DEVICE, dtype),
        "table": torch.tensor(TABLE, device=DEVICE),
        "step": torch.tensor([row], device=DEVICE),
        "address": NoiseAddress(
            torch.tensor([2**40 + 5], device=DEVICE),
            torch.tensor([2], device=DEVICE),
            torch.arange(10, 10 + batch, device=DEVICE),
        ),
    }


def assert_steps_close(actual: SdeStep, expected: SdeStep) -> None:
    for name, a, e in zip(SdeStep._fields, actual, expected, strict=True):
        tolerance = TOLERANCES[e.dtype]
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", (False, True))
def test_triton_equals_reference(shape, dtype, guided):
    case = inputs(shape, dtype, row=3) | {"model_dtype": dtype}
    if guided:
        case |= {"velocity": Guided(case["velocity"], case["velocity"].flip(0) * 0.5, 4.5)}
    assert_steps_close(sde_step_triton(**case), sde_step_ref(**case))


@pytest.mark.parametrize("run", (sde_step_triton, sde_step_ref))
@pytest.mark.parametrize("shape", ((5, 257), *REAL_SHAPES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", (False, True))
def test_against_float64_distribution(run, shape, dtype, guided):
    case = inputs(shape, dtype, row=1) | {"model_dtype": torch.float16}
    c_x, c_v, s, _ = (float(value) for value in case["table"][1])
    v = case["velocity"].double()
    if guided:
        case |= {"velocity": Guided(case["velocity"], -case["velocity"], 3.0)}
        v = -v + 3.0 * (v + v)
    mean = c_x * case["x"].double() + c_v * v
    x_next = mean + s * normal_ref(case["address"], case["step"], mean[0].numel()).view(shape).double()
    log_prob = torch.distributions.Normal(mean, s).log_prob(x_next).flatten(1).mean(1)

    out = run(**case)
    torch.testing.assert_close(out.v.double(), v, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.x_next.double(), x_next, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(out.log_prob.double(), log_prob, rtol=1e-6, atol=1e-6)
    assert torch.equal(out.x_next_model, out.x_next.half())


@pytest.mark.parametrize("run", (sde_step_triton, sde_step_ref))
def test_ode_row_ignores_noise(run):
    case = inputs((5, 257), torch.float32, row=2)
    out = run(**case)
    other = run(**case | {"address": case["address"]._replace(seed=torch.tensor([1], device=DEVICE))})
    assert torch.equal(out.x_next, other.x_next)
    torch.testing.assert_close(out.x_next, case["x"] - 0.2 * case["velocity"])
    assert torch.equal(out.log_prob, torch.zeros(5, device=DEVICE))


@pytest.mark.parametrize("run", (sde_step_triton, sde_step_ref))
def test_noise_is_the_addressed_noise(run):
    case = inputs((5, 257), torch.float32) | {"table": torch.tensor([[0.0, 0.0, 1.0, 0.5]], device=DEVICE)}
    expected = normal(case["address"], 0, 257)
    torch.testing.assert_close(run(**case).x_next, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("run", (sde_step_triton, sde_step_ref))
def test_per_sample_and_shared_tables(run):
    case = inputs((3, 4, 8, 8), torch.float32, row=1)
    shared = case["table"]
    expanded = run(**case | {"table": shared.expand(3, -1, -1)})
    copied = run(**case | {"table": shared.expand(3, -1, -1).contiguous()})
    for name, value in run(**case)._asdict().items():
        assert torch.equal(value, getattr(expanded, name)) and torch.equal(value, getattr(copied, name)), name

    # An SDE window that differs between samples: each row of the batch follows its own table.
    tables = torch.stack((shared, shared.flip(0), shared))
    mixed = run(**case | {"table": tables})
    flipped = run(**case | {"table": shared.flip(0)})
    for i, source in enumerate((expanded, flipped, expanded)):
        assert torch.equal(mixed.x_next[i], source.x_next[i])
        torch.testing.assert_close(mixed.log_prob[i], source.log_prob[i], rtol=1e-6, atol=0)
    assert mixed.log_prob[1] == 0


@pytest.mark.parametrize("run", (sde_step_triton, sde_step_ref))
def test_batch_split_and_repeat_are_bitwise(run):
    case = inputs((5, BLOCK + 1), torch.bfloat16, row=3)
    whole, again = run(**case), run(**case)
    address = case["address"]._replace(sample_id=case["address"].sample_id[3:])
    last = run(**case | {"x": case["x"][3:], "velocity": case["velocity"][3:], "address": address})
    for name, value in whole._asdict().items():
        assert torch.equal(value, getattr(again, name)), name
        if run is sde_step_ref and name == "log_prob":  # torch's mean on a GPU takes a row apart by how many rows there are
            torch.testing.assert_close(value[3:], last.log_prob, rtol=1e-6, atol=0)
        else:
            assert torch.equal(value[3:], getattr(last, name)), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("guided", (False, True))
def test_large_batch_has_the_bits_of_a_small_one(dtype, guided, monkeypatch):
    """Its programs take several blocks each, of a row that they divide evenly; nothing else may differ."""
    module = sys.modules["fastgrpo_kernels.sde_step"]
    shape = (3, module.UNROLLED * BLOCK)
    case = inputs(shape, dtype, row=3) | {"model_dtype": dtype}
    if guided:
        case |= {"velocity": Guided(case["velocity"], case["velocity"].flip(0) * 0.5, 4.5)}
    small = sde_step_triton(**case)
    assert module.blocks_a_program(*shape) == 1
    monkeypatch.setattr(module, "LARGE_BATCH", shape[0] * shape[1])
    assert module.blocks_a_program(*shape) == module.UNROLLED
    large = sde_step_triton(**case)
    for name, value in small._asdict().items():
        assert torch.equal(value, getattr(large, name)), name


@pytest.mark.parametrize(("size", "blocks"), ((4 * BLOCK, 4), (8 * BLOCK, 4), (5 * BLOCK, 1), (4 * BLOCK + 16, 1)))
def test_blocks_a_program_of_a_large_batch_divide_a_row(size, blocks):
    assert sys.modules["fastgrpo_kernels.sde_step"].blocks_a_program(4096, size) == blocks


@pytest.mark.parametrize("run", (sde_step_triton, sde_step_ref))
def test_nothing_is_copied_without_need(run):
    case = inputs((2, 8), torch.float32)
    out = run(**case)
    assert out.x_next_model is out.x_next
    assert out.v is case["velocity"]
    assert run(**case, model_dtype=torch.float32).x_next_model.dtype == torch.float32


def test_step_index_is_read_on_the_device():
    case = inputs((3, 4, 8, 8), torch.bfloat16) | {"model_dtype": torch.bfloat16}
    case |= {"velocity": Guided(case["velocity"], torch.zeros(3, 4, 8, 8, device=DEVICE), 2.0)}
    with NoSync():
        sde_step_ref(**case)
        out = sde_step(**case)
    assert_steps_close(out, sde_step_triton(**case))


def test_no_sync_notices():
    """The guard itself: each of these would stop a host."""
    x = torch.arange(3.0, device=DEVICE)
    for sync in (lambda: x[0].item(), lambda: bool(x[0] > 1), lambda: x[x > 1], lambda: torch.tensor([1.0])):
        with NoSync(), pytest.raises(AssertionError, match="host sync"):
            sync()


BAD_INPUTS = (
    ({"x": torch.zeros(5)}, r"x has shape \(5,\), expected \(B, \*D\)"),
    ({"x": torch.zeros(2, 8).half()}, r"x has dtype torch.float16, expected torch.float32: cast it"),
    ({"x": torch.zeros(8, 2).T}, r"x is not contiguous .*call .contiguous\(\)"),
    ({"x": torch.zeros(2, 0)}, r"x has shape \(2, 0\)"),
    ({"velocity": torch.zeros(2, 9)}, r"v has shape \(2, 9\), expected \(2, 8\)"),
    ({"velocity": torch.zeros(2, 8).double()}, r"v has dtype torch.float64, expected .* or torch.float16"),
    ({"velocity": torch.zeros(2, 8, device="meta")}, r"v is on meta, expected \w+"),
    (
        {"velocity": Guided(torch.zeros(2, 8, device=DEVICE), torch.zeros(8, 2, device=DEVICE).T)},
        r"v_uncond is not contiguous",
    ),
    (
        {"table": torch.zeros(4, 3)},
        r"table has shape \(4, 3\), expected \(T, 4\) or \(2, T, 4\) with columns",
    ),
    ({"table": torch.zeros(3, 4, 4)}, r"table has shape \(3, 4, 4\)"),
    ({"table": torch.zeros(4, 4).T}, r"table is not contiguous"),
    ({"table": torch.zeros(4, 4).double()}, r"table has dtype torch.float64"),
    ({"step": torch.zeros(1)}, r"step has dtype torch.float32, expected torch.int64"),
    ({"step": torch.zeros(2, dtype=torch.int64)}, r"step has shape \(2,\), expected \(1,\)"),
    ({"address": NoiseAddress(*torch.zeros(3, 1, dtype=torch.int64))}, r"address.sample_id has shape \(1,\)"),
    ({"model_dtype": torch.float64}, r"model_dtype is torch.float64, expected None or one of"),
)


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_inputs(change, message):
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in change.items()}
    if "address" in change:
        change["address"] = NoiseAddress(*(tensor.to(DEVICE) for tensor in change["address"]))
    with pytest.raises(ValueError, match=message):
        sde_step(**inputs((2, 8), torch.float32) | change)
