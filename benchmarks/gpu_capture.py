"""Phase of the GPU suite: a rollout is one graph, the first ratio is 1, a replay follows training. Is it so on a GPU?

Piece by piece first, so that what cannot be captured is named; then whole; then under DeepSpeed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.accelerator  # here, as it takes seconds
import torch
from gpu_model import (
    CUDA,
    HALF,
    capture,
    differences,
    gradients,
    sd3,
    trained,
    transition_inputs,
)
from gpu_phase import Phase, main
from rollout_speed import rollout_arguments
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.ranks import finish, start
from fastgrpo.engine.zero import Engine
from fastgrpo.measure import memory
from fastgrpo.models.adapter import Adapter
from fastgrpo.policy import Policy
from fastgrpo.sampling.graph import CapturedRollout, CudaCapture
from fastgrpo.sampling.rollout import rollout
from fastgrpo_kernels import INITIAL_STEP, normal, sde_step

BATCH, NUM_STEPS = 2, 4
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}  # beside the one that a run has


def captured(phase: Phase) -> None:
    model = sd3(phase, HALF)
    policy = Policy(model)
    pieces(phase, model, policy)
    with phase.step("rollout"):
        whole(phase, model, policy)
    for name, backend in {"as chosen": None, **(BACKENDS if CUDA else {})}.items():
        with phase.step(f"first ratio, attention {name}"), backend_of(backend):
            # Only the one in use has to hold; the others say what a choice would cost.
            first_ratio(phase, f"attention {name}", model, policy, must_hold=backend is None)
    with phase.step("DeepSpeed"):
        under_deepspeed(phase, model)
    del model, policy
    compiled_ratio(phase)


def pieces(phase: Phase, model: Adapter, policy: Policy) -> None:
    """Each part of a step alone, captured and replayed."""
    schedule, address, *_ = rollout_arguments(model, BATCH, NUM_STEPS)
    x, sigma, rows = transition_inputs(model, BATCH)
    latents, index, place = x.float(), torch.tensor([1], device=x.device), torch.arange(BATCH, device=x.device)
    kept, who = latents.new_zeros(3, *x.shape), torch.arange(BATCH, device=x.device)
    twice = type(rows)(*(torch.cat([tensor, tensor]) for tensor in rows))

    def keep() -> Tensor:
        kept[torch.where(place > 0, place, 2), who] = latents
        return kept

    parts = {
        "noise": lambda: normal(address, INITIAL_STEP, latents[0].numel()),
        "sde_step": lambda: sde_step(latents, x, schedule.table, index, address, model_dtype=model.dtype).x_next,
        "keeping a step": keep,
        "network": lambda: policy(x, sigma, rows),
        "network, guided": lambda: policy(torch.cat([x, x]), torch.cat([sigma, sigma]), twice),
    }
    for name, part in parts.items():
        with phase.step(f"graph of {name}"), torch.no_grad():
            wanted = part().clone()
            found = replayed(part) if CUDA else part()
            finite = bool(found.float().isfinite().all())
            phase.check(f"graph of {name}", finite and torch.equal(found, wanted), finite=finite)


def replayed(part: Callable[[], Tensor]) -> Tensor:
    """Its result from a graph, which is captured as a rollout is."""
    found, replay = CudaCapture()(part)
    replay()
    return found.clone()  # beyond the graph's life


def whole(phase: Phase, model: Adapter, policy: Policy) -> None:
    form = CapturedRollout(capture())
    same_bits(phase, "graph of a rollout", form, policy, rollout_arguments(model, BATCH, NUM_STEPS))
    phase.record("memory with a graph", **memory())
    with torch.no_grad():
        for parameter in trained(policy):
            parameter.mul_(1.5)
    same_bits(phase, "after the LoRA moved", form, policy, rollout_arguments(model, BATCH, NUM_STEPS))
    same_bits(phase, "a second shape in the pool", form, policy, rollout_arguments(model, BATCH, NUM_STEPS, 4.5))
    same_bits(phase, "the first shape again", form, policy, rollout_arguments(model, BATCH, NUM_STEPS))


def same_bits(phase: Phase, name: str, form: Callable[..., Any], policy: Any, arguments: tuple) -> Any:
    """A replay against an eager rollout; returns the former."""
    found, wanted = form(policy, *arguments), rollout(policy, *arguments)
    unequal = differences(found, wanted)
    phase.check(name, not unequal, equal=not unequal, **unequal)
    return found


def backend_of(backend: SDPBackend | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


def first_ratio(phase: Phase, name: str, model: Adapter, policy: Policy, must_hold: bool) -> None:
    """Is the velocity of an update, with gradients, to the last bit that of a rollout, without? Do gradients repeat?"""
    x, sigma, rows = transition_inputs(model, BATCH)
    with torch.no_grad():
        of_rollout, again = policy(x, sigma, rows), policy(x, sigma, rows)
    of_update = policy(x, sigma, rows)
    first, second = (gradients(policy, x, sigma, rows) for _ in range(2))
    off = of_rollout.float() - of_update.detach().float()
    exact = torch.equal(of_rollout, of_update)
    phase.check(
        f"first ratio, {name}", exact or not must_hold, exact=exact, repeats=torch.equal(of_rollout, again),
        gradients_repeat=all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
        differ=f"{(off != 0).float().mean().item():.1%}", root_mean_square=off.square().mean().sqrt().item(),
        of=of_rollout.float().square().mean().sqrt().item(), finite=bool(of_update.isfinite().all()),
    )  # fmt: skip


def under_deepspeed(phase: Phase, model: Adapter) -> None:
    """The policy that the engine hands out: captured before updates and after, replays that follow them, and no waiting."""
    options = EngineOptions(zero_stage=1, dtype=model.dtype, learning_rate=1e-3)
    engine = Engine(Policy(model), start(), options)
    arguments = rollout_arguments(model, BATCH, NUM_STEPS)
    form = CapturedRollout(capture())
    with engine.rollout_policy() as policy:
        before = same_bits(phase, "engine: graph before an update", form, policy, arguments)
    x, sigma, rows = transition_inputs(model, BATCH)
    for n in range(1, 4):
        engine.backward(engine(x, sigma, rows).float().square().mean(), last=True)
        norm = engine.step().item()
        phase.record(f"engine: update {n}", grad_norm=norm, loss_scale=engine.loss_scale, skipped=engine.skipped_steps)
    with engine.rollout_policy() as policy:
        after = same_bits(phase, "engine: replay after updates", form, policy, arguments)
        phase.check("engine: updates show in a replay", not torch.equal(before.final, after.final))
        with waits() as calls:
            rollout(policy, *arguments)
        phase.check("engine: a rollout waits for nothing", not calls, waits=len(calls), steps=NUM_STEPS)
        with phase.step("engine: a new shape after updates"):
            other = rollout_arguments(model, BATCH, NUM_STEPS + 1)
            same_bits(phase, "engine: a new shape after updates", form, policy, other)
    engine.close()
    finish()


@contextlib.contextmanager
def waits() -> Iterator[list[None]]:
    """DeepSpeed's waits for the device inside, one item each."""
    accelerator, calls = deepspeed.accelerator.get_accelerator(), []
    synchronize = accelerator.synchronize

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return synchronize(*arguments, **options)

    accelerator.synchronize = counted
    try:
        yield calls
    finally:
        del accelerator.synchronize


def compiled_ratio(phase: Phase) -> None:
    """The first ratio of compiled blocks in bfloat16, whose programs with gradients and without would round differently."""
    with phase.step("compiled"):
        model = sd3(phase, "bfloat16")
        model.compile()
        first_ratio(phase, "compiled", model, Policy(model), must_hold=True)


if __name__ == "__main__":
    main({"capture": captured})
