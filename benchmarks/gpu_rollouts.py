"""Phases of the GPU suite about SD3.5 Medium alone.

rollouts    milliseconds a step of each form, from the stock diffusers loop to one compiled graph, by batch
profile     where the time of a rollout, of a forward and backward pass and of the decoder goes, kernel by kernel
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE
from gpu_model import (
    CUDA,
    HALF,
    capture,
    gradients,
    sd3,
    transition_inputs,
)
from gpu_phase import REHEARSE, Phase, main
from models import add_stock_lora, load
from rollout_speed import cudnn_allowed, drawing, flops_of, rollout_arguments, stock
from torch.profiler import ProfilerActivity

from fastgrpo.commands.bench import rollout_row
from fastgrpo.measure import memory, peak_flops, synchronize, timed
from fastgrpo.models.adapter import Adapter
from fastgrpo.policy import Policy
from fastgrpo.sampling.graph import CapturedRollout
from fastgrpo.sampling.rollout import rollout

NUM_STEPS = 3 if REHEARSE else 10
FIRST_BATCH, SECOND_BATCH, *MORE_BATCHES = (2, 1, 3) if REHEARSE else (8, 1, 2, 24)
# Seconds of a batch's three forms that need no compiler, estimated, and of one that does: what would not end is not begun.
PLAIN_SECONDS, COMPILED_SECONDS = {8: 15, 1: 5, 2: 6, 24: 40}, 30
KINDS = {  # of kernels by their names, in this order
    "fastgrpo": "sde_step|log_prob_fwd|transition|moments_fwd|normal_fwd",
    "attention": "flash|fmha|sdpa|attention",
    "matrix product": "gemm|nvjet|cutlass|wgmma|xmma|cublas|s16816|splitK",
    "norm": "layer_norm|rms_norm|LayerNorm",
    "reduction": "reduce_kernel",
    "copy and cast": "copy|Memcpy|CatArray|memset",
    "elementwise": "elementwise|vectorized|unrolled|triton",
}


def rollouts(phase: Phase) -> None:
    eager = sd3(phase, "bfloat16")
    rival = load("tiny" if REHEARSE else "sd3.5-medium", 512)
    rival.pipeline.set_progress_bar_config(disable=True)
    add_stock_lora(rival, rank=32, alpha=64)
    speed = Speed(phase, eager)
    graph, plain = CapturedRollout(capture()), {"eager": (rollout, eager)}

    def batch_of(batch: int) -> None:
        seconds = PLAIN_SECONDS.get(batch, 0)
        speed.measure(batch, "diffusers", stock(rival, eager, batch, NUM_STEPS), seconds)
        for name, (form, model) in (plain | {"captured": (graph, eager)}).items():
            speed.measure(batch, name, speed.drawn(batch, form, model), seconds)

    batch_of(FIRST_BATCH)
    with cudnn_allowed():  # what an exact first ratio costs, if anything
        speed.measure(FIRST_BATCH, "eager, attention as torch chooses", speed.drawn(FIRST_BATCH, rollout, eager))
    batch_of(SECOND_BATCH)
    for suffix, drafts in (("", False), ("fp8, ", True)):
        with phase.step(f"{suffix or 'exact, '}compiled"):
            model = copy.deepcopy(eager)
            if drafts:
                if not multiplies_8_bits(phase, model):
                    continue
                speed.measure(FIRST_BATCH, "captured, fp8", speed.drawn(FIRST_BATCH, CapturedRollout(capture()), model))
            model.compile()
            draw = speed.drawn(FIRST_BATCH, rollout, model)
            speed.measure(FIRST_BATCH, f"{suffix}compiled", draw, COMPILED_SECONDS)
            draw = speed.drawn(FIRST_BATCH, CapturedRollout(capture()), model)
            speed.measure(FIRST_BATCH, f"captured, {suffix}compiled", draw, PLAIN_SECONDS.get(FIRST_BATCH, 0))
    for batch in MORE_BATCHES:
        batch_of(batch)


class Speed:
    """Times forms of a rollout, each row written as soon as it is known."""

    def __init__(self, phase: Phase, model: Adapter) -> None:
        self.phase, self.model, self.flops = phase, model, flops_of(model)
        self.peak, source = peak_flops(model.dtype)
        phase.record("FLOPs", of_a_forward_pass=self.flops, peak=self.peak, peak_from=source)

    def drawn(self, batch: int, form: Callable[..., Any], model: Adapter) -> Callable[[], Any]:
        return drawing(form, model, rollout_arguments(self.model, batch, NUM_STEPS))

    def measure(self, batch: int, name: str, draw: Callable[[], Any], seconds: float = 0) -> None:
        name = f"batch {batch}, {name}"
        if self.phase.left() < seconds:
            self.phase.record(name, not_begun=f"{self.phase.left():.0f} s were left")
            return
        with self.phase.step(name):
            memory(reset=True)
            work = self.flops * NUM_STEPS * batch / self.peak
            self.phase.record(name, **rollout_row(draw, batch, NUM_STEPS, work, rounds=3))


def multiplies_8_bits(phase: Phase, model: Adapter) -> bool:
    """Makes it ready to. A CPU of a rehearsal need not be able to: torch has it there from some release on."""
    try:
        model.prepare_drafts()
    except ValueError as error:
        if not REHEARSE:
            raise
        phase.record("fp8", not_here=str(error))
        return False
    return True


def profile(phase: Phase) -> None:
    model = sd3(phase, HALF)
    policy, batch = Policy(model), FIRST_BATCH
    inputs = rollout_arguments(model, batch, 3)
    x, sigma, rows = transition_inputs(model, batch)
    jobs = {
        "rollout of 3 steps": lambda: rollout(policy, *inputs),
        "forward and backward": lambda: gradients(policy, x, sigma, rows),
        "decoder": lambda: model.decode(x.float()),
    }
    for name, job in jobs.items():
        with phase.step(name):
            job()
            whole = timed(job, rounds=2, warm_ups=0)
            seen = profiled(job)
            phase.record(name, **whole, **by_kind(seen), **memory(reset=True))
            if name.startswith("rollout"):
                seen.export_chrome_trace(str(phase.out / "trace.json.gz"))


def profiled(job: Callable[[], Any]) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with torch.profiler.profile(activities=activities) as seen:
        job()
        synchronize()
    return seen


def by_kind(seen: torch.profiler.profile) -> dict[str, Any]:
    """Milliseconds on the device and launches: of all kernels, of each kind, and of the thirty longest by name."""
    kinds, names = defaultdict(lambda: [0.0, 0]), defaultdict(lambda: [0.0, 0])
    for event in seen.events():
        if event.device_type.name == DEVICE.type.upper():
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.name, re.I)), "other")
            for spent in (kinds[kind], names[event.name[:110]]):
                spent[0] += event.time_range.elapsed_us() / 1e3
                spent[1] += 1
    total = sum(ms for ms, _ in kinds.values())
    return {
        "kernels_ms": round(total, 2), "launches": sum(n for _, n in kinds.values()),
        "kinds": {kind: f"{ms:.2f} ms, {n} launches, {ms / max(total, 1e-9):.0%}" for kind, (ms, n) in longest(kinds)},
        "kernels": [[name, round(ms, 3), n] for name, (ms, n) in longest(names)[:30]],
    }  # fmt: skip


def longest(spent: dict[str, list]) -> list[tuple[str, list]]:
    return sorted(spent.items(), key=lambda item: -item[1][0])


if __name__ == "__main__":
    main({"rollouts": rollouts, "profile": profile})
