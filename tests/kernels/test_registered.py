"""The operations in a graph that somebody else compiles: registered rightly, and in the bits of an eager call."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from support.helpers import DEVICE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels import (
    Guided,
    NoiseAddress,
    guided_velocity,
    normal,
    sde_step,
    transition,
    transition_ref,
)
from fastgrpo_kernels.common import runs_kernels
from fastgrpo_kernels.transition import Inputs, transition_bwd_ref

pytestmark = [pytest.mark.gpu, pytest.mark.slow]  # each compiles

OPS = torch.ops.fastgrpo
SHAPE = (3, 4, 5)
GUIDANCE = 4.5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns c_x, c_v, s, w; the last row is an ODE step.
TABLE = ((0.75, -0.04, 0.70, 1.0), (0.90, -0.10, 0.39, 3.3), (1.0, -0.2, 0.0, 0.0))


def random(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def address() -> NoiseAddress:
    return NoiseAddress(*(torch.tensor(values, device=DEVICE) for values in ([7], [3], range(SHAPE[0]))))


def table() -> Tensor:
    return torch.tensor(TABLE, device=DEVICE)


def inputs(dtype: torch.dtype = torch.float32, guided: bool = True, with_ref: bool = True) -> Inputs:
    """v and v_uncond are leaves that ask for a gradient."""
    v, v_uncond = (random(seed, dtype).requires_grad_() for seed in (1, 2))
    coefficients = table() * torch.linspace(1, 2, 3, device=DEVICE)[:, None]
    v_old, v_ref = (random(1) + 0.03 * random(seed) for seed in (3, 4))
    return Inputs(
        x_next=random(5), x=random(6), v=v, v_old=v_old, coefficients=coefficients,
        v_uncond=v_uncond if guided else None, v_ref=v_ref if with_ref else None, scale=GUIDANCE,
    )  # fmt: skip


def eager_moments(i: Inputs, run: Callable = transition) -> Tensor:
    return torch.stack(run(i.x_next, i.x, Guided(i.v, i.v_uncond, i.scale), i.v_old, i.coefficients, v_ref=i.v_ref))


@pytest.mark.parametrize("guided", (False, True))
@pytest.mark.parametrize("model_dtype", (torch.float32, torch.bfloat16))
def test_opcheck_of_a_step(guided: bool, model_dtype: torch.dtype) -> None:
    v, v_uncond = random(1, model_dtype), random(2, model_dtype) if guided else None
    step = torch.tensor([1], device=DEVICE)
    torch.library.opcheck(OPS.sde_step, (random(0), v, v_uncond, GUIDANCE, table(), step, *address(), model_dtype))


def test_opcheck_of_noise_and_guidance() -> None:
    torch.library.opcheck(OPS.normal, (*address(), torch.tensor([2], device=DEVICE), 33))
    torch.library.opcheck(OPS.guided_velocity, (random(1, torch.bfloat16), random(2), GUIDANCE))


@pytest.mark.parametrize("guided", (False, True))
@pytest.mark.parametrize("with_ref", (False, True))
def test_opcheck_of_moments(guided: bool, with_ref: bool) -> None:
    case = inputs(torch.bfloat16, guided, with_ref)
    torch.library.opcheck(OPS.transition, case)
    detached = (t.detach() if isinstance(t, Tensor) else t for t in case)
    torch.library.opcheck(OPS.transition_backward, (torch.rand(3, 3, device=DEVICE), *detached, True, guided))


@pytest.mark.parametrize("wanted", (("v",), ("v_uncond",), ("v", "v_uncond")))
def test_gradcheck(wanted: tuple[str, ...]) -> None:
    """Of the reference, the only form in float64."""
    case = Inputs(*(t.detach().cpu().double() if isinstance(t, Tensor) else t for t in inputs()))

    def moments(*leaves: Tensor) -> Tensor:
        return OPS.transition(*case._replace(**dict(zip(wanted, leaves, strict=True))))

    assert torch.autograd.gradcheck(moments, [getattr(case, name).requires_grad_() for name in wanted])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", (False, True))
@pytest.mark.parametrize("with_ref", (False, True))
def test_the_written_gradient_has_the_bits_of_autograd(dtype: torch.dtype, guided: bool, with_ref: bool) -> None:
    case, grad = inputs(dtype, guided, with_ref), torch.linspace(-1, 2, 9, device=DEVICE).view(3, 3)
    leaves = [case.v, case.v_uncond] if guided else [case.v]
    expected = torch.autograd.grad((eager_moments(case, transition_ref) * grad).sum(), leaves)
    with torch.no_grad():
        found = transition_bwd_ref(grad, case)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))


class Loop(nn.Module):
    """A rollout and the gradient of its moments, as somebody else may write them."""

    def __init__(self, dtype: torch.dtype, guided: bool) -> None:
        super().__init__()
        self.network = nn.Linear(SHAPE[-1], SHAPE[-1]).to(DEVICE, dtype)
        self.dtype, self.guided = dtype, guided

    def velocity(self, x: Tensor) -> Guided | Tensor:
        v = self.network(x)
        return Guided(v, v * 0.5, GUIDANCE) if self.guided else v

    def forward(self, table: Tensor, address: NoiseAddress) -> tuple[Tensor, ...]:
        x = normal(address, 9, SHAPE[1] * SHAPE[2]).view(SHAPE)
        x_model, losses = x.to(self.dtype), []
        # No index and no .contiguous(): without CUDA torch refuses them to a tensor that only says it is on a GPU.
        for step, row in zip(torch.arange(len(table), device=table.device).split(1), table.unbind(), strict=True):
            with torch.no_grad():
                velocity = self.velocity(x_model)
                out = sde_step(x, velocity, table, step, address, model_dtype=self.dtype)
                v_old = guided_velocity(velocity)
            moments = transition(out.x_next, x, self.velocity(x_model), 0.9 * v_old, row.repeat(len(x), 1), v_ref=out.v)
            losses += [moments.m1, moments.m2, moments.m3]
            x, x_model = out.x_next, out.x_next_model
        return x, x_model, out.v, out.log_prob, torch.stack(losses)


def run(loop: Callable, network: nn.Module) -> list[Tensor]:
    found = list(loop(table(), address()))
    network.zero_grad()
    found[-1].sum().backward()
    return [*found, *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", (False, True))
def test_a_compiled_loop_has_the_bits_of_the_eager_one(dtype: torch.dtype, guided: bool) -> None:
    torch.manual_seed(0)
    loop = Loop(dtype, guided)
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, loop.network), run(loop, loop.network), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the test above compiles the kernels themselves")
@pytest.mark.parametrize("guided", (False, True))
def test_a_compiled_loop_runs_the_kernels(guided: bool, monkeypatch) -> None:
    """Interpreted: as on a GPU, but for where the tensors lie."""
    torch.manual_seed(0)
    loop = Loop(torch.bfloat16, guided)
    by_reference = run(loop, loop.network)
    for name in ("guidance", "philox", "registered", "sde_step", "transition"):
        monkeypatch.setattr(sys.modules[f"fastgrpo_kernels.{name}"], "runs_kernels", lambda x: True)
    expected = run(loop, loop.network)
    found = run(torch.compile(loop, fullgraph=True, backend="aot_eager"), loop.network)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found, by_reference, strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.processes
def test_inductor_compiles_the_loop() -> None:
    """Its own code may round the network in another way, so this compares what it computes and not bits."""
    torch.manual_seed(0)
    loop = Loop(torch.float32, guided=True)
    for a, b in zip(run(torch.compile(loop, fullgraph=True), loop.network), run(loop, loop.network), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("guided", (False, True))
def test_it_is_traced_for_a_gpu_that_is_not_here(dtype: torch.dtype, guided: bool) -> None:
    """On tensors that only say that they are on a GPU: each operation is one node, of the right shapes and devices."""
    loop = Loop(dtype, guided)
    with FakeTensorMode(), torch.device("cuda"):
        for name, parameter in loop.network.named_parameters():
            # Without a gradient: of these devices autograd wants a stream, which only a build with CUDA has.
            setattr(loop.network, name, nn.Parameter(torch.zeros(parameter.shape, dtype=dtype), requires_grad=False))
        where = NoiseAddress(*(torch.zeros(n, dtype=torch.int64) for n in (1, 1, SHAPE[0])))
        assert runs_kernels(where.seed)
        program = torch.export.export(loop, (torch.zeros(len(TABLE), 4), where), strict=True)
    # What runs without gradient is a graph within the graph.
    nodes = [node for module in program.graph_module.modules() for node in module.graph.nodes]
    found = Counter(node.target for node in nodes if str(node.target).startswith("fastgrpo"))
    steps = len(TABLE)
    expected = {OPS.normal: 1, OPS.sde_step: steps, OPS.transition: steps, OPS.guided_velocity: steps if guided else 0}
    assert found == Counter({operation.default: count for operation, count in expected.items()})
    x, x_model, v, log_prob, moments = (node.meta["val"] for node in program.graph.output_node().args[0])
    assert {t.device.type for t in (x, x_model, v, log_prob, moments)} == {"cuda"}
    assert (x.dtype, x_model.dtype, v.dtype) == (torch.float32, dtype, torch.float32 if guided else dtype)
    assert (x.shape, v.shape, log_prob.shape, moments.shape) == (SHAPE, SHAPE, SHAPE[:1], (9, SHAPE[0]))
