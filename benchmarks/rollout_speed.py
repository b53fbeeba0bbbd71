"""Rollouts: images a second and milliseconds a step, from the stock diffusers loop to one captured graph.

    python benchmarks/rollout_speed.py                          the tiny model on a CPU, SD3.5-M (random weights) on a GPU
    python benchmarks/rollout_speed.py --batches 1 9 --resolutions 512 --steps 10 --guidance 1 4.5

    diffusers            the stock StableDiffusion3Pipeline with its ODE and PEFT's LoRA layers; the same number of steps
    eager                fastgrpo.sampling.rollout: SDE in a window, log-probs, trajectory kept
    compiled             the same, torch.compile of the transformer's block, for each shape by itself
    fp8                  --fp8: frozen layers multiply in 8 bits
    fp8, compiled        both: by themselves 8 bits cost eight small launches a layer, which the compiler joins
    captured[, ...]      any of the four as one CUDA graph (GPU)

All forms of a row draw in turn, round after round, so that a machine that slows down slows them all. A form that fails has
its error in the row. Each row is printed and written as soon as it is there, those of the first of --batches first, to
results/rollout_speed_DEVICE.json; the picture follows at the end.
"""

import argparse
import copy
import json
import math
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from common import finish, keep, pyplot
from models import add_stock_lora, conditioning, load
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fastgrpo.measure import DEVICE, peak_flops, seconds, synchronize
from fastgrpo.models.adapter import Adapter
from fastgrpo.policy import Policy
from fastgrpo.records import TRAIN, Prompted, Schedule, noise_address
from fastgrpo.sampling.graph import CapturedRollout, CudaCapture
from fastgrpo.sampling.rollout import rollout
from fastgrpo.sampling.schedule import window_schedule
from fastgrpo.sampling.tables import sampler_steps
from fastgrpo_kernels import NoiseAddress, sde_step

WINDOW = 3
WARM_UPS = 2  # compile, capture, and once as it will be


def tried(function: Callable[[], Any]) -> Any:
    """What the function returns, or as a text what went wrong: a form that cannot run takes no other with it."""
    try:
        return function()
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()  # what it held is free now that its frames are gone
    return message


def variants(eager: Adapter, *, compiled: bool, fp8: bool) -> dict[str, Any]:
    """The model and copies of it that compile, that multiply in 8 bits, and both; in place of a copy its error."""

    def made(*preparations: Callable[[Adapter], None]) -> Adapter:
        model = copy.deepcopy(eager)
        for prepare in preparations:
            prepare(model)
        return model

    prepare_drafts, compiles = type(eager).prepare_drafts, type(eager).compile
    found = {"eager": eager}
    if compiled:
        found["compiled"] = tried(lambda: made(compiles))
    if fp8:
        found["fp8"] = tried(lambda: made(prepare_drafts))
    if fp8 and compiled:
        found["fp8, compiled"] = tried(lambda: made(prepare_drafts, compiles))
    return found


def schedule_of(model: Adapter, num_steps: int, batch: int) -> Schedule:
    steps = sampler_steps("flow_sde", model.sigmas(num_steps), 0.7)
    return window_schedule(steps, torch.ones(batch, dtype=torch.int64), min(WINDOW, num_steps - 2)).to(DEVICE)


@contextmanager
def cudnn_allowed() -> Iterator[None]:
    """Attention as torch chooses it for who does not ask, cuDNN's too; a model of fastgrpo goes without."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def rollout_arguments(
    model: Adapter, batch: int, num_steps: int, guidance: float = 1.0
) -> tuple[Schedule, NoiseAddress, Prompted, float]:
    """What `fastgrpo.sampling.rollout.rollout` is given after the policy."""
    cond = conditioning(model, batch)
    empty = type(cond)(*(tensor.expand_as(like) for tensor, like in zip(empty_prompt(cond), cond, strict=True)))
    address = noise_address(TRAIN, 0, 0, torch.arange(batch, device=DEVICE))
    return schedule_of(model, num_steps, batch), address, Prompted.of(cond, empty if guidance != 1 else None), guidance


def empty_prompt(plain: tuple) -> tuple:
    return type(plain)(*(torch.zeros_like(tensor[:1]) for tensor in plain))


def stock(rival: Adapter, model: Adapter, batch: int, num_steps: int, guidance: float = 1.0) -> Callable[[], None]:
    """The stock pipeline's loop on the prompts that `model` is given."""
    plain, (height, width) = conditioning(model, batch), rival.size
    empty = empty_prompt(plain)

    def draw() -> None:
        with cudnn_allowed():
            rival.pipeline(
                prompt_embeds=plain.embeds, pooled_prompt_embeds=plain.pooled,
                negative_prompt_embeds=empty.embeds.expand_as(plain.embeds),
                negative_pooled_prompt_embeds=empty.pooled.expand_as(plain.pooled), height=height, width=width,
                num_inference_steps=num_steps, guidance_scale=guidance, output_type="latent",
            )  # fmt: skip

    return draw


def forms(
    rival: Adapter, models: dict[str, Any], batch: int, num_steps: int, guidance: float
) -> dict[str, Callable[[], Any] | str]:
    """What is timed, by name: each a function that draws `batch` images' latents, or the error of making its model."""
    eager = models["eager"]
    inputs = rollout_arguments(eager, batch, num_steps, guidance)
    found: dict[str, Any] = {"diffusers": stock(rival, eager, batch, num_steps, guidance)}
    for name, model in models.items():
        if isinstance(model, str):  # an error instead
            found[name] = model
            continue
        found[name] = drawing(rollout, model, inputs)
        if DEVICE.type == "cuda":
            label = "captured" if name == "eager" else f"captured, {name}"
            found[label] = drawing(CapturedRollout(CudaCapture()), model, inputs)
    return found


def drawing(form: Callable[..., Any], model: Any, inputs: tuple) -> Callable[[], Any]:
    """The rollout of a model, in 8 bits where it was prepared for that. inputs: of `rollout_arguments`."""
    policy = Policy(model)

    def draw() -> Any:
        with model.drafting():
            return form(policy, *inputs)

    return draw


def measure(functions: dict[str, Callable[[], Any] | str], rounds: int) -> dict[str, float | str]:
    """Median seconds of each function, all in turn; of one that fails, or is an error already, the error."""
    found: dict[str, Any] = {name: function if isinstance(function, str) else [] for name, function in functions.items()}
    for turn in range(WARM_UPS + rounds):
        for name, function in functions.items():
            if isinstance(found[name], str):
                continue
            spent = tried(lambda function=function: seconds(function, repeats=1, warm_ups=0))
            if isinstance(spent, str):
                found[name] = spent
            elif turn >= WARM_UPS:
                found[name].append(spent)
    return {name: times if isinstance(times, str) else statistics.median(times) for name, times in found.items()}


def row_of(measured: dict[str, float | str], batch: int, num_steps: int, guidance: float, work: float) -> dict[str, Any]:
    """A row of the results. work: the FLOPs of a step of one image, over the device's a second."""
    row: dict[str, Any] = {"batch": batch, "steps": num_steps, "guidance": guidance}
    for name, median in measured.items():
        if isinstance(median, str):
            row[name] = {"error": median}
            continue
        row[name] = {
            "images_per_second": round(batch / median, 3), "ms_per_step": round(1000 * median / num_steps, 3),
            "mfu": round(batch * num_steps * work / median, 4),
        }  # fmt: skip
        if not isinstance(measured["diffusers"], str):
            row[name]["speedup_over_diffusers"] = round(measured["diffusers"] / median, 3)
    return row


def phases(model: Adapter, batch: int) -> dict[str, float]:
    """Seconds of each part of a step as eager code runs it, and of the decoder once an image batch."""
    rows, x = conditioning(model, batch), torch.randn(batch, *model.latent_shape, device=DEVICE)
    sigma, table = torch.full((batch,), 0.7, device=DEVICE), schedule_of(model, 10, batch).table
    address, index = noise_address(TRAIN, 0, 0, torch.arange(batch, device=DEVICE)), torch.tensor([3], device=DEVICE)
    x_model = x.to(model.dtype)
    parts = {
        "network": lambda: model.velocity(x_model, sigma, rows),
        "transition": lambda: sde_step(x, x_model, table, index, address, model_dtype=model.dtype),
        "decoder": lambda: model.decode(x),
    }
    with torch.no_grad():
        return {name: round(seconds(part, repeats=10, warm_ups=5), 6) for name, part in parts.items()}


def flops_of(model: Adapter) -> float:
    """Of one forward pass of one image, by counting."""
    rows, x = conditioning(model, 1), torch.randn(1, *model.latent_shape, device=DEVICE, dtype=model.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.velocity(x, torch.full((1,), 0.7, device=DEVICE), rows)
    return counter.get_total_flops()


def draw(results: list[dict[str, Any]]) -> Any:
    import numpy as np

    plt = pyplot()

    rows = [(result["resolution"], row) for result in results for row in result["rows"]]
    names = [name for name, value in rows[0][1].items() if isinstance(value, dict)]
    figure, axes = plt.subplots(figsize=(max(6, 1.6 * len(rows)), 3.8), layout="constrained")
    places, width = np.arange(len(rows)), 0.8 / len(names)
    for n, name in enumerate(names):
        values = [row[name].get("speedup_over_diffusers", math.nan) for _, row in rows]
        axes.bar(places + (n - (len(names) - 1) / 2) * width, values, width, label=name)
    labels = [f"{r} px, batch {row['batch']}\n{row['steps']} steps, guidance {row['guidance']:g}" for r, row in rows]
    axes.set_xticks(places, labels, fontsize=7)
    axes.axhline(1, color="#888", linewidth=0.8)
    axes.set(ylabel="images a second, diffusers = 1", title="Rollout speed")
    axes.margins(y=0.15)  # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=len(names))
    return figure


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = DEVICE.type == "cuda"
    parser.add_argument("--model", choices=("tiny", "sd3.5-medium"), default="sd3.5-medium" if gpu else "tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1, 2, 24] if gpu else [128, 16])
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512], help="of sd3.5-medium, pixels")
    parser.add_argument("--steps", type=int, nargs="+", default=[10])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.5])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled forms")
    parser.add_argument("--fp8", action="store_true", help="8-bit rollouts too")
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    results: list[dict[str, Any]] = []
    for resolution in arguments.resolutions if arguments.model != "tiny" else [32]:
        rival, eager = load(arguments.model, resolution), load(arguments.model, resolution)
        rival.pipeline.set_progress_bar_config(disable=True)
        add_stock_lora(rival, rank=32, alpha=64)
        eager.add_lora(rank=32, alpha=64)
        peak, source = peak_flops(eager.dtype)
        flops, batch = flops_of(eager), arguments.batches[0]
        results.append({
            "resolution": resolution, "rows": [], "flops_per_forward": flops, "peak_flops": peak, "peak_from": source,
            "phase_batch": batch, "phase_seconds": tried(lambda model=eager, batch=batch: phases(model, batch)),
        })  # fmt: skip
        models = variants(eager, compiled=not arguments.no_compile, fp8=arguments.fp8)
        grid = list(product(arguments.batches, arguments.steps, arguments.guidance))
        for batch, num_steps, guidance in tqdm(grid, desc=f"{resolution} px"):
            measured = measure(forms(rival, models, batch, num_steps, guidance), arguments.rounds)
            work = flops * (1 if guidance == 1 else 2) / peak
            row = row_of(measured, batch, num_steps, guidance, work)
            results[-1]["rows"].append(row)
            print(json.dumps(row), flush=True)
            keep("rollout_speed", {"model": arguments.model, "results": results})
        del rival, eager, models
        synchronize()
    finish("rollout_speed", {"model": arguments.model, "results": results}, draw(results))


if __name__ == "__main__":
    main()
