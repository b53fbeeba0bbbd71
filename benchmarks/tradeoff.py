"""Step count against noise level: how fast an iteration is, how far its marginals are off, and what training makes of it.

    python benchmarks/tradeoff.py             about 40 minutes on two cores
    python benchmarks/tradeoff.py --quick     3 minutes: a few points, a third of the training

Every step count is timed first, one after the other, and then each point trains for as many iterations as the same budget
of seconds buys it: so nothing that happens beside the sweep makes one setting look slow. Two lines through the plane are
trained, steps {4 ... 40} at noise 0.7 and noise {0.1 ... 1.2} at 10 steps, for flow_sde and cps, and 40 steps once more with
four times the budget. At each point:

    images a second     through whole iterations, rollout to optimiser step
    excess noise        final standard deviation over the data's, minus 1, on Gaussian data of unit spread: by recursion,
                        on the whole grid
    accuracy            strict, on held-out prompts by the 40-step ODE, from the same base

The window is the same share of the trajectory at every step count. Writes results/tradeoff_DEVICE.{json,png}.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, finish, pyplot
from tqdm import tqdm

from fastgrpo.engine.ranks import Ranks, start
from fastgrpo.engine.ranks import finish as leave
from fastgrpo.measure import synchronize
from fastgrpo.sampling import tables as sde
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config

STEPS = (4, 5, 6, 8, 10, 15, 20, 40)
NOISE = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.2)
TRAINED = ("flow_sde", "cps")
SAMPLERS = (*TRAINED, "dance_sde")


class Point(NamedTuple):
    sampler: str
    steps: int
    noise_level: float
    budgets: float = 1.0  # of training, in those of the other points


def possible(sampler: str, noise_level: float) -> bool:
    """CPS turns by noise_level quarter circles: there is no more than one."""
    return sampler != "cps" or noise_level <= 1


def points(quick: bool) -> list[Point]:
    if quick:
        return [Point("flow_sde", 5, 0.7), Point("flow_sde", 10, 0.7), Point("flow_sde", 10, 0.1)]
    found = []
    for sampler in TRAINED:
        found += [Point(sampler, steps, 0.7) for steps in STEPS]
        found += [Point(sampler, 10, noise) for noise in NOISE if noise != 0.7 and possible(sampler, noise)]
    return [*found, Point("flow_sde", 40, 0.7, budgets=4.0)]


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
    table = sde.coefficient_table(sde.sampler_steps(sampler, sigmas, noise_level), mask)
    for sigma, (c_x, c_v, s, _) in zip(sigmas, table, strict=False):
        data = (1 - sigma) * spread
        k = (sigma - data * spread) / (data**2 + sigma**2)
        variance = (c_x + c_v * k) ** 2 * variance + s**2
    return (variance.sqrt() / spread - 1).item()


def trainer_of(arguments: argparse.Namespace, folder: str, ranks: Ranks, point: Point) -> Trainer:
    first, size = window(point.steps)
    settings = [
        f"output={folder}", f"rollout.sampler={point.sampler}", f"rollout.num_steps={point.steps}",
        f"rollout.noise_level={point.noise_level}", f"rollout.window={{kind: fixed, start: {first}, size: {size}}}",
        *arguments.set,
    ]  # fmt: skip
    return Trainer(load_config(arguments.config, settings), ranks=ranks)


def iteration_seconds(trainer: Trainer, timed: int = 3) -> float:
    """The fastest of a few iterations after one to warm up. They train, so the trainer is of no use afterwards."""
    seconds = []
    for iteration in range(1 + timed):
        began = time.perf_counter()
        trainer.iterate(iteration + 1)
        synchronize()
        seconds.append(time.perf_counter() - began)
    trainer.close()
    return min(seconds[1:])


def train(trainer: Trainer, iterations: int, images: int) -> tuple[list[float], float]:
    """The rewards of all iterations, and the accuracy after them."""
    rewards = []
    for iteration in tqdm(range(1, iterations + 1), desc="training", leave=False, dynamic_ncols=True):
        rewards.append(round(trainer.iterate(iteration)["reward"], 4))
    with trainer.engine.swapped(trainer.ema.weights), trainer.engine.rollout_policy() as policy:
        accuracy = trainer.evaluator.accuracy(policy, images)["accuracy"]["overall"]
    trainer.close()
    return rewards, accuracy


def excess_grid(sigmas: Callable[[int], torch.Tensor]) -> list[dict[str, Any]]:
    return [
        {"sampler": sampler, "steps": steps, "noise_level": noise,
         "excess_noise": round(excess_noise(sampler, sigmas(steps), noise), 5)}
        for sampler, steps, noise in product(SAMPLERS, STEPS, NOISE) if possible(sampler, noise)
    ]  # fmt: skip


def draw(rows: list[dict[str, Any]], grid: list[dict[str, Any]]) -> Any:
    plt = pyplot()
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subfigures(2, 1)
    draw_training(above.subplots(1, 3), rows)
    draw_excess(below, grid)
    return figure


def draw_training(panels: Any, rows: list[dict[str, Any]]) -> None:
    by_steps, by_noise, front = panels
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        mine = [row for row in rows if row["sampler"] == sampler and row["budgets"] == 1]
        for axes, key, fixed in ((by_steps, "steps", ("noise_level", 0.7)), (by_noise, "noise_level", ("steps", 10))):
            line = sorted((row[key], row["accuracy"]) for row in mine if row[fixed[0]] == fixed[1])
            axes.plot(*zip(*line, strict=True), marker="o", label=sampler)
        front.scatter([r["images_per_second"] for r in mine], [r["accuracy"] for r in mine], label=sampler, s=18)
    for row in rows:
        if row["budgets"] != 1:
            label = f"{row['sampler']}, {row['budgets']:g} times the budget"
            by_steps.plot(row["steps"], row["accuracy"], marker="*", markersize=11, linestyle="none", label=label)
    best, line = 0.0, []
    for row in sorted((row for row in rows if row["budgets"] == 1), key=lambda row: -row["images_per_second"]):
        if row["accuracy"] > best:
            best = row["accuracy"]
            line.append((row["images_per_second"], best))
    front.step(*zip(*line, strict=True), where="post", color="#888", linewidth=0.8)
    steps = sorted({row["steps"] for row in rows})
    by_steps.set(xscale="log", xlabel="steps (noise 0.7)", ylabel="accuracy after the same time")
    by_steps.set_xticks(steps, steps)
    by_steps.set_xticks([], minor=True)
    by_noise.set(xlabel="noise level (10 steps)")
    front.set(xscale="log", xlabel="images a second, whole iterations", title="Pareto front")
    speeds = sorted({round(row["images_per_second"]) for row in rows})
    front.set_xticks(speeds[::2], speeds[::2])
    front.set_xticks([], minor=True)
    by_steps.legend(frameon=False)


def draw_excess(figure: Any, grid: list[dict[str, Any]]) -> None:
    panels = figure.subplots(1, len(SAMPLERS), sharey=True)
    for axes, sampler in zip(panels, SAMPLERS, strict=True):
        known = {(row["steps"], row["noise_level"]): row["excess_noise"] for row in grid if row["sampler"] == sampler}
        values = [[known.get((steps, noise), math.nan) for steps in STEPS] for noise in NOISE]
        picture = axes.imshow(values, origin="lower", aspect="auto", cmap="coolwarm", vmin=-0.3, vmax=0.3)
        axes.set_xticks(range(len(STEPS)), STEPS)
        axes.set_yticks(range(len(NOISE)), NOISE)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axes.text(x, y, "" if math.isnan(value) else f"{value:+.2f}", ha="center", va="center", fontsize=7)
        axes.set(xlabel="steps", title=f"excess noise, {sampler}")
    panels[0].set(ylabel="noise level")
    figure.colorbar(picture, ax=panels, extend="both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "ten_steps.yaml")
    parser.add_argument("--seconds", type=float, default=60, help="of training at each point")
    parser.add_argument("--images", type=int, default=200, help="of each evaluation")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.images = 20, 100
    ranks, chosen, rows = start(), points(arguments.quick), []
    with tempfile.TemporaryDirectory() as folder:
        seconds = {
            steps: iteration_seconds(trainer_of(arguments, folder, ranks, Point("flow_sde", steps, 0.7)))
            for steps in tqdm(sorted({point.steps for point in chosen}), desc="timing", dynamic_ncols=True)
        }
        for point in tqdm(chosen, desc="points", dynamic_ncols=True):
            trainer = trainer_of(arguments, folder, ranks, point)
            rollout, sigmas = trainer.config.rollout, trainer.model.sigmas
            iterations = max(1, round(arguments.seconds * point.budgets / seconds[point.steps]))
            rewards, accuracy = train(trainer, iterations, arguments.images)
            rows.append({
                **point._asdict(), "accuracy": round(accuracy, 4), "iterations": iterations, "rewards": rewards,
                "images_per_second": round(rollout.groups * rollout.group_size / seconds[point.steps], 2),
                "excess_noise": round(excess_noise(point.sampler, sigmas(point.steps), point.noise_level), 5),
            })  # fmt: skip
            tqdm.write(str(rows[-1]))
    grid = excess_grid(sigmas)
    name = "tradeoff_quick" if arguments.quick else "tradeoff"
    result = {"seconds": arguments.seconds, "threads": torch.get_num_threads(), "rows": rows, "excess_noise": grid}
    finish(name, result, draw(rows, grid))
    leave()


if __name__ == "__main__":
    main()
