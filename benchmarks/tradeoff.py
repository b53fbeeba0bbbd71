"""Step count against noise level: how fast a rollout is, how far its marginals are off, and what training makes of it.

    python benchmarks/tradeoff.py             about 40 minutes on two cores
    python benchmarks/tradeoff.py --quick     3 minutes: a few points, a tenth of the training

Two lines through the plane of settings, steps {4 ... 40} at noise 0.7 and noise {0.1 ... 1.2} at 10 steps, for each
stochastic sampler. At each point:

    images a second     of the rollout alone
    excess noise        final standard deviation over the data's, minus 1, on Gaussian data of unit spread: by recursion
    accuracy            strict, on held-out prompts by the 40-step ODE, after training as long from the same base

The window is the same share of the trajectory at every step count. Writes results/tradeoff_DEVICE.{json,png}.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, finish, synchronize
from tqdm import tqdm

from fastgrpo import sde
from fastgrpo.config import load_config
from fastgrpo.engine import finish as leave
from fastgrpo.engine import start
from fastgrpo.trainer import Trainer

STEPS = (4, 5, 6, 8, 10, 15, 20, 40)
NOISE = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.2)
SAMPLERS = ("flow_sde", "cps")


def points(quick: bool) -> list[tuple[str, int, float]]:
    """(sampler, steps, noise level)"""
    if quick:
        return [("flow_sde", 5, 0.7), ("flow_sde", 10, 0.7), ("flow_sde", 10, 0.1)]
    found = []
    for sampler in SAMPLERS:
        found += [(sampler, steps, 0.7) for steps in STEPS]
        found += [(sampler, 10, noise) for noise in NOISE if noise != 0.7 and (sampler != "cps" or noise <= 1)]
    return found


def window(num_steps: int) -> tuple[int, int]:
    """First trained step and their number: from a tenth to four tenths of the way."""
    return round(0.1 * num_steps), max(1, round(0.3 * num_steps))


def excess_noise(sampler: str, sigmas: torch.Tensor, noise_level: float, spread: float = 1.0) -> float:
    """For data N(0, spread^2) the velocity is k x, so the variance follows from step to step by one number."""
    first, size = window(len(sigmas) - 1)
    mask = torch.zeros(len(sigmas) - 1, dtype=torch.bool)
    mask[first : first + size] = True
    variance = torch.tensor(1.0, dtype=torch.float64)
    sigmas = sigmas.double()
    for sigma, (c_x, c_v, s, _) in zip(sigmas, sde.coefficient_table(sampler, sigmas, noise_level, mask), strict=False):
        data = (1 - sigma) * spread
        k = (sigma - data * spread) / (data**2 + sigma**2)
        variance = (c_x + c_v * k) ** 2 * variance + s**2
    return (variance.sqrt() / spread - 1).item()


def measure(
    arguments: argparse.Namespace, folder: str, device: torch.device, point: tuple[str, int, float]
) -> dict[str, Any]:
    sampler, num_steps, noise = point
    first, size = window(num_steps)
    settings = [
        f"output={folder}", f"rollout.sampler={sampler}", f"rollout.num_steps={num_steps}", f"rollout.noise_level={noise}",
        f"rollout.window={{kind: fixed, start: {first}, size: {size}}}", *arguments.set,
    ]  # fmt: skip
    config = load_config(arguments.config, settings)
    trainer = Trainer(config, 1, device)
    rollouts, iteration, began = [], 0, time.perf_counter()
    while time.perf_counter() - began < arguments.seconds:
        iteration += 1
        metrics = trainer.iterate(iteration)
        rollouts.append(metrics["seconds"]["rollout"])
        synchronize()
    with trainer.engine.swapped(trainer.ema.weights), trainer.engine.rollout_policy() as policy:
        accuracy = trainer.evaluator.accuracy(policy, arguments.images)["accuracy"]["overall"]
    images = config.rollout.groups * config.rollout.group_size
    sigmas = trainer.model.sigmas(num_steps)
    trainer.engine.close()
    return {
        "sampler": sampler, "steps": num_steps, "noise_level": noise, "accuracy": round(accuracy, 4),
        "iterations": iteration, "rollout_images_per_second": round(images / min(rollouts), 2),
        "excess_noise": round(excess_noise(sampler, sigmas, noise), 5),
    }  # fmt: skip


def draw(rows: list[dict[str, Any]]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_steps, by_noise, front) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        mine = [row for row in rows if row["sampler"] == sampler]
        for axes, key, fixed in ((by_steps, "steps", ("noise_level", 0.7)), (by_noise, "noise_level", ("steps", 10))):
            line = sorted((row[key], row["accuracy"]) for row in mine if row[fixed[0]] == fixed[1])
            axes.plot(*zip(*line, strict=True), marker="o", label=sampler)
        front.scatter([r["rollout_images_per_second"] for r in mine], [r["accuracy"] for r in mine], label=sampler, s=18)
    best, line = 0.0, []
    for row in sorted(rows, key=lambda row: -row["rollout_images_per_second"]):
        if row["accuracy"] > best:
            best = row["accuracy"]
            line.append((row["rollout_images_per_second"], best))
    front.step(*zip(*line, strict=True), where="post", color="#888", linewidth=0.8)
    by_steps.set(xscale="log", xlabel="steps (noise 0.7)", ylabel="accuracy after the same time")
    by_steps.set_xticks(sorted({row["steps"] for row in rows}), sorted({row["steps"] for row in rows}))
    by_noise.set(xlabel="noise level (10 steps)")
    front.set(xscale="log", xlabel="images a second, rollout", title="Pareto front")
    by_steps.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_shapes.yaml")
    parser.add_argument("--seconds", type=float, default=60, help="of training at each point")
    parser.add_argument("--images", type=int, default=200, help="of each evaluation")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.images = 20, 100
    device, rows = start(), []
    with tempfile.TemporaryDirectory() as folder:
        for point in tqdm(points(arguments.quick), desc="points", dynamic_ncols=True):
            rows.append(measure(arguments, folder, device, point))
            tqdm.write(str(rows[-1]))
    name = "tradeoff_quick" if arguments.quick else "tradeoff"
    finish(name, {"seconds": arguments.seconds, "threads": torch.get_num_threads(), "rows": rows}, draw(rows))
    leave()


if __name__ == "__main__":
    main()
