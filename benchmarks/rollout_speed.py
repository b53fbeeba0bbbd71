"""Rollouts: images a second and milliseconds a step, from the stock diffusers loop to one captured graph.

    python benchmarks/rollout_speed.py                          the tiny model on a CPU, SD3.5-M (random weights) on a GPU
    python benchmarks/rollout_speed.py --batches 1 9 --resolutions 512 --steps 10 --guidance 1 4.5

    diffusers            the stock StableDiffusion3Pipeline with its ODE and PEFT's LoRA layers; the same number of steps
    eager                fastgrpo.rollout: SDE in a window, log-probs, trajectory kept
    compiled             the same, torch.compile of the transformer's block
    captured             the same as eager, one CUDA graph (GPU)
    captured, compiled   both (GPU)
    fp8                  --fp8: frozen layers multiply in 8 bits; on a GPU captured too

All forms of a row draw in turn, round after round, so that a machine that slows down slows them all. Writes
results/rollout_speed_DEVICE.{json,png}.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from common import finish, pyplot
from models import add_stock_lora, conditioning, load
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fastgrpo import sde
from fastgrpo.graph import CapturedRollout, CudaCapture
from fastgrpo.measure import DEVICE, peak_flops, seconds, synchronize
from fastgrpo.models.adapter import Adapter
from fastgrpo.rollout import Policy, rollout, with_unconditional
from fastgrpo.trajectory import TRAIN, Steps, noise_address
from fastgrpo_kernels import sde_step

WINDOW = 3


def steps_of(model: Adapter, num_steps: int, batch: int) -> Steps:
    sigmas = model.sigmas(num_steps)
    start = torch.ones(batch, dtype=torch.int64)
    size = min(WINDOW, num_steps - 2)
    table = sde.window_tables("flow_sde", sigmas, 0.7, start, size).to(DEVICE)
    return Steps(sigmas.to(DEVICE), table, start.to(DEVICE), size, torch.zeros(num_steps, device=DEVICE))


def forms(models: dict[str, Adapter], batch: int, num_steps: int, guidance: float) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: each a function that draws `batch` images' latents."""
    eager, rival = models["eager"], models["diffusers"]
    plain, steps = conditioning(eager, batch), steps_of(eager, num_steps, batch)
    empty = type(plain)(*(torch.zeros_like(tensor[:1]) for tensor in plain))
    rows = with_unconditional(plain, empty if guidance != 1 else None)
    address = noise_address(TRAIN, 0, 0, torch.arange(batch, device=DEVICE))
    options = dict(guidance_scale=guidance, latent_shape=eager.latent_shape, model_dtype=eager.dtype)

    def stock() -> None:
        height, width = rival.size
        rival.pipeline(
            prompt_embeds=plain.embeds, pooled_prompt_embeds=plain.pooled,
            negative_prompt_embeds=empty.embeds.expand_as(plain.embeds),
            negative_pooled_prompt_embeds=empty.pooled.expand_as(plain.pooled), height=height, width=width,
            num_inference_steps=num_steps, guidance_scale=guidance, output_type="latent",
        )  # fmt: skip

    found = {"diffusers": stock}
    for name in (name for name in models if name != "diffusers"):
        found[name] = drawing(rollout, models[name], steps, address, rows, options)
        if DEVICE.type == "cuda":
            label = "captured" if name == "eager" else f"captured, {name}"
            found[label] = drawing(CapturedRollout(CudaCapture()), models[name], steps, address, rows, options)
    return found


def drawing(form: Callable[..., Any], model: Any, *arguments: Any) -> Callable[[], Any]:
    """The rollout of a model, in 8 bits where it was prepared for that."""
    policy, (*inputs, options) = Policy(model), arguments

    def draw() -> Any:
        with model.drafting():
            return form(policy, *inputs, **options)

    return draw


def measure(models: dict[str, Adapter], batch: int, num_steps: int, guidance: float, rounds: int) -> dict[str, Any]:
    functions = forms(models, batch, num_steps, guidance)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():  # compile, capture, warm up
        for _ in range(2):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, repeats=1, warm_ups=0))
    medians = {name: statistics.median(values) for name, values in times.items()}
    row: dict[str, Any] = {"batch": batch, "steps": num_steps, "guidance": guidance}
    for name, median in medians.items():
        row[name] = {
            "images_per_second": round(batch / median, 3), "ms_per_step": round(1000 * median / num_steps, 3),
            "speedup_over_diffusers": round(medians["diffusers"] / median, 3),
        }  # fmt: skip
    return row


def phases(model: Adapter, batch: int) -> dict[str, float]:
    """Seconds of each part of a step, and of the decoder once an image batch."""
    rows, x = conditioning(model, batch), torch.randn(batch, *model.latent_shape, device=DEVICE)
    sigma, steps = torch.full((batch,), 0.7, device=DEVICE), steps_of(model, 10, batch)
    address, index = noise_address(TRAIN, 0, 0, torch.arange(batch, device=DEVICE)), torch.tensor([3], device=DEVICE)
    with torch.no_grad():
        x_model = x.to(model.dtype)
        return {
            "network": seconds(lambda: model.velocity(x_model, sigma, rows), repeats=10),
            "transition": seconds(
                lambda: sde_step(x, x_model, steps.table, index, address, model_dtype=model.dtype), repeats=10
            ),
            "decoder": seconds(lambda: model.decode(x), repeats=5),
        }


def flops_of(model: Adapter) -> float:
    """Of one forward pass of one image, by counting."""
    rows, x = conditioning(model, 1), torch.randn(1, *model.latent_shape, device=DEVICE, dtype=model.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.velocity(x, torch.full((1,), 0.7, device=DEVICE), rows)
    return counter.get_total_flops()


def draw(results: list[dict[str, Any]]) -> Any:
    import numpy as np

    plt = pyplot()

    names = [name for name in results[0]["rows"][0] if isinstance(results[0]["rows"][0][name], dict)]
    rows = [(result["resolution"], row) for result in results for row in result["rows"]]
    figure, axes = plt.subplots(figsize=(max(6, 1.6 * len(rows)), 3.8), layout="constrained")
    places, width = np.arange(len(rows)), 0.8 / len(names)
    for n, name in enumerate(names):
        values = [row[name]["speedup_over_diffusers"] for _, row in rows]
        axes.bar(places + (n - (len(names) - 1) / 2) * width, values, width, label=name)
    labels = [f"{r} px, batch {row['batch']}\n{row['steps']} steps, guidance {row['guidance']:g}" for r, row in rows]
    axes.set_xticks(places, labels, fontsize=7)
    axes.axhline(1, color="#888", linewidth=0.8)
    axes.set(ylabel="images a second, diffusers = 1", title="Rollout speed")
    axes.margins(y=0.15)  # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=len(names))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = DEVICE.type == "cuda"
    parser.add_argument("--model", choices=("tiny", "sd3.5-medium"), default="sd3.5-medium" if gpu else "tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 9, 24] if gpu else [16, 128])
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512], help="of sd3.5-medium, pixels")
    parser.add_argument("--steps", type=int, nargs="+", default=[10])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.5])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled forms")
    parser.add_argument("--fp8", action="store_true", help="8-bit rollouts too")
    arguments = parser.parse_args()
    results = []
    for resolution in arguments.resolutions if arguments.model != "tiny" else [32]:
        models = {"diffusers": load(arguments.model, resolution), "eager": load(arguments.model, resolution)}
        models["diffusers"].pipeline.set_progress_bar_config(disable=True)
        add_stock_lora(models["diffusers"], rank=32, alpha=64)
        models["eager"].add_lora(rank=32, alpha=64)
        if not arguments.no_compile:
            models["compiled"] = copy.deepcopy(models["eager"])
            models["compiled"].compile_blocks()
        if arguments.fp8:
            models["fp8"] = copy.deepcopy(models["eager"])
            models["fp8"].prepare_drafts()
        peak, source = peak_flops(models["eager"].dtype)
        flops, rows = flops_of(models["eager"]), []
        grid = list(product(arguments.batches, arguments.steps, arguments.guidance))
        for batch, num_steps, guidance in tqdm(grid, desc=f"{resolution} px"):
            row = measure(models, batch, num_steps, guidance, arguments.rounds)
            for name in [name for name in row if isinstance(row[name], dict)]:
                work = flops * num_steps * (1 if guidance == 1 else 2)
                row[name]["mfu"] = round(row[name]["images_per_second"] * work / peak, 4)
            rows.append(row)
        parts = phases(models["eager"], max(arguments.batches))
        results.append({
            "resolution": resolution, "rows": rows, "flops_per_forward": flops, "peak_flops": peak, "peak_from": source,
            "phase_batch": max(arguments.batches), "phase_seconds": {name: round(s, 6) for name, s in parts.items()},
        })  # fmt: skip
        del models
        synchronize()
    finish("rollout_speed", {"model": arguments.model, "results": results}, draw(results))


if __name__ == "__main__":
    main()
