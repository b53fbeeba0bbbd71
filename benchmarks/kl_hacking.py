"""What the KL is for: a reward that can be hacked, maximised with it and without, compared at equal reward.

    python benchmarks/kl_hacking.py             about 25 minutes on two cores
    python benchmarks/kl_hacking.py --quick     3 minutes: fewer iterations and images, one beta beside 0

What is maximised is accuracy + w * kilobytes of the image as a JPEG. The first part is earned by drawing what was asked. The
second is had by whatever compresses badly, so that what is no image of the world at all can score more than a right one.
Each beta trains from the same base with the same seeds, and every few iterations the averaged weights draw groups of images
of held-out prompts, always from the same noise:

    reward       the mean of what is maximised
    accuracy     its honest part: the share of images that show exactly what was asked
    distance     from an image to the nearest image of the world, of any content: root mean square over its pixels, in
                 levels of 255, mean over images. Prompts play no part in it: it is the images' quality alone.
    diversity    root mean square difference between two images of one prompt, likewise, mean over pairs and prompts

The nearest image is found exactly, up to its grid: a scene is four cells that each hold one shape or none, so each cell
has its own nearest drawing, of all shapes, colours, centres and radii. Two runs are compared at the last evaluation of the
run with a KL, and at the evaluation of the run without whose reward is nearest to that.

Writes results/kl_hacking_DEVICE.{json,png}.
"""

import argparse
import functools
import math
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import ROOT, finish, pyplot
from torch import Tensor
from tqdm import tqdm

from fastgrpo.config import load_config
from fastgrpo.engine import finish as leave
from fastgrpo.engine import start
from fastgrpo.generation import generate
from fastgrpo.tiny.render import BACKGROUND, coverage
from fastgrpo.tiny.world import CELL, COLORS, JITTER, RADIUS, SHAPES
from fastgrpo.trainer import Trainer
from fastgrpo.trajectory import SAMPLE

WEIGHT = 3.0  # w: both parts then differ about as much between the base's images of one prompt
SIZE = int(CELL)
AT_ONCE = 100  # images
COLORS_OF_RUNS = ("#d1495b", "#2f6fdb", "#2a9d5c", "#8a5cc2")


class Evaluation(NamedTuple):
    iteration: int
    images: Tensor  # (P, N, 3, H, W) uint8, N of each of P prompts
    values: dict[str, Tensor]  # each (P,)

    def row(self) -> dict[str, float]:
        means = {name: round(value.mean().item(), 4) for name, value in self.values.items()}
        return {"iteration": self.iteration, **means}


@functools.cache
def outlines() -> Tensor:
    """How much of a cell's pixels a shape covers, (K, SIZE^2): all shapes on a grid of centres and radii."""
    centers, radii = CELL / 2 + np.linspace(-JITTER, JITTER, 17), np.linspace(*RADIUS, 9)
    x, y, radius = (grid.reshape(-1, 1, 1) for grid in np.meshgrid(centers, centers, radii))
    covered = [coverage(name, x, y, radius)[:, :SIZE, :SIZE] for name in SHAPES]
    return torch.from_numpy(np.concatenate(covered)).float().flatten(1)


def distance(images: Tensor) -> Tensor:
    """images (B, 3, H, W) uint8 -> (B,) root mean square over pixels, to the nearest image of the world.

    A shape of coverage a and colour c leaves of a cell p, both measured from the background,
    |p - a c|^2 = |p|^2 - (2 a.(p c) - |a|^2 |c|^2): so the best one has the largest bracket, and an empty cell has 0.
    """
    background = torch.tensor(BACKGROUND, dtype=torch.float32)
    cells = (images.cpu().float() - background[:, None, None]).unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE)
    cells = cells.permute(0, 2, 3, 4, 5, 1).reshape(-1, SIZE**2, 3)  # (cells, pixels, RGB)
    squares, best = outlines().square().sum(dim=1), torch.zeros(len(cells))
    for color in COLORS.values():
        axis = torch.tensor(color, dtype=torch.float32) - background
        explained = 2 * (cells @ axis) @ outlines().T - squares * axis.square().sum()  # (cells, K)
        best = torch.maximum(best, explained.amax(dim=1))
    left = (cells.square().sum(dim=(1, 2)) - best).clamp(min=0).view(len(images), -1).sum(dim=1)
    return (left / images[0].numel()).sqrt()


def diversity(groups: Tensor) -> Tensor:
    """groups (P, N, 3, H, W) uint8 -> (P,) root mean square difference between two of a group, mean over its pairs."""
    flat = groups.cpu().float().flatten(2)
    pairs = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(flat.shape[2])
    return pairs.sum(dim=(1, 2)) / (flat.shape[1] * (flat.shape[1] - 1))


@torch.no_grad()
def draw_images(trainer: Trainer, records: Sequence[dict]) -> Tensor:
    """One image of each record, by the averaged weights and as trained, but by the ODE."""
    rollout, images = trainer.config.rollout, []
    with trainer.engine.swapped(trainer.ema.weights), trainer.engine.rollout_policy() as policy:
        for first in range(0, len(records), AT_ONCE):
            prompts = [record["prompt"] for record in records[first : first + AT_ONCE]]
            sample_id = torch.arange(first, first + len(prompts))
            images.append(generate(
                trainer.model, policy, trainer.embeddings, prompts, sample_id, stream=SAMPLE, seed=trainer.config.seed,
                num_steps=rollout.num_steps, guidance_scale=rollout.guidance_scale,
            ).cpu())  # fmt: skip
    return torch.cat(images)


def prompts_of_each_tag(records: Sequence[dict], count: int) -> list[dict]:
    """As many of each category, evenly spaced in the file."""
    tags = dict.fromkeys(record["tag"] for record in records)
    share, chosen = max(1, count // len(tags)), []
    for tag in tags:
        mine = [record for record in records if record["tag"] == tag]
        chosen += [mine[i * len(mine) // share] for i in range(share)]
    return chosen


def evaluate(trainer: Trainer, iteration: int, records: Sequence[dict], size: int) -> Evaluation:
    repeated = [record for record in records for _ in range(size)]
    images = draw_images(trainer, repeated)
    scores = trainer.reward(images, [record["prompt"] for record in repeated], repeated)
    each = {
        "reward": trainer.reward.total(scores), "accuracy": scores[:, 0], "kilobytes": scores[:, 1],
        "distance": torch.cat([distance(part) for part in images.split(AT_ONCE)]),
    }  # fmt: skip
    groups = images.unflatten(0, (len(records), size))
    values = {name: value.view(len(records), size).mean(dim=1) for name, value in each.items()}
    return Evaluation(iteration, groups, {**values, "diversity": diversity(groups)})


def train(
    arguments: argparse.Namespace, beta: float, folder: str, device: torch.device
) -> tuple[list[Evaluation], list[dict]]:
    """A run's evaluations, the base's first, and the records of their prompts."""
    settings = [
        f"output={folder}", f"objective.beta={beta}", "rollout.groups=8", "rollout.batch_size=64",
        f"reward.train={{tiny_shapes: 1, jpeg_incompressibility: {arguments.weight}}}", *arguments.set,
    ]  # fmt: skip
    trainer = Trainer(load_config(arguments.config, settings), 1, device)
    records = prompts_of_each_tag(trainer.evaluator.prompts.metadata, arguments.prompts)
    evaluations = [evaluate(trainer, 0, records, arguments.group)]
    for iteration in tqdm(range(1, arguments.iterations + 1), desc=f"beta {beta:g}", leave=False, dynamic_ncols=True):
        trainer.iterate(iteration)
        if iteration % arguments.every == 0:
            evaluations.append(evaluate(trainer, iteration, records, arguments.group))
            tqdm.write(f"beta {beta:g}: {evaluations[-1].row()}")
    trainer.engine.close()
    return evaluations, records


def change(evaluation: Evaluation, base: Evaluation, name: str) -> dict[str, float]:
    """A value against the base's, relative, and its standard error over prompts, paired."""
    ours, theirs = evaluation.values[name], base.values[name]
    scale = theirs.mean().item()
    error = (ours - theirs).std().item() / math.sqrt(len(ours))
    return {"relative": round(ours.mean().item() / scale - 1, 4), "error": round(error / scale, 4)}


def compared(evaluation: Evaluation, base: Evaluation) -> dict[str, Any]:
    changes = {name: change(evaluation, base, name) for name in ("distance", "diversity")}
    return {**evaluation.row(), "against_base": changes}


def at_reward(run: Sequence[Evaluation], reward: float) -> Evaluation:
    """The evaluation of a run, its base aside, whose reward is nearest."""
    return min(run[1:], key=lambda evaluation: abs(evaluation.values["reward"].mean().item() - reward))


def draw(runs: dict[float, list[Evaluation]], equal: dict[str, Evaluation], records: Sequence[dict]) -> Any:
    figure = pyplot().figure(figsize=(13, 11), layout="constrained")
    curves, pictures = figure.subfigures(2, 1, height_ratios=(6, 5))
    draw_curves(curves, runs, equal)
    draw_pictures(pictures, equal, records)
    return figure


def draw_curves(figure: Any, runs: dict[float, list[Evaluation]], equal: dict[str, Evaluation]) -> None:
    """Above against iterations, below against the reward, where height is what a reward has cost."""
    panels = figure.subplots(2, 4)
    names = {"reward": "reward", "accuracy": "accuracy", "distance": "distance to the world (levels)",
             "diversity": "diversity in a group (levels)"}  # fmt: skip
    for color, (beta, run) in zip(COLORS_OF_RUNS, sorted(runs.items()), strict=False):
        rows = [evaluation.row() for evaluation in run]
        label = f"beta {beta:g}" if beta else "no KL"
        style = {"marker": ".", "color": color, "label": label}
        for (above, below), (name, title) in zip(panels.T, names.items(), strict=True):
            above.plot([row["iteration"] for row in rows], [row[name] for row in rows], **style)
            shown = "kilobytes" if name == "reward" else name
            below.plot([row["reward"] for row in rows], [row[shown] for row in rows], **style)
            above.set(title=title, xlabel="iteration")
            below.set(title="kilobytes of JPEG" if name == "reward" else title, xlabel="reward")
    reward = equal["with KL"].values["reward"].mean().item()
    for axes in panels[1]:
        axes.axvline(reward, color="#888", linewidth=0.8, linestyle="--")
    panels[0, 0].legend(frameon=False)


def draw_pictures(figure: Any, equal: dict[str, Evaluation], records: Sequence[dict]) -> None:
    """Left the first image of several prompts, right several of one prompt: each column one prompt and one noise."""
    count, each, many = len(records), 8, 6
    first = [i * count // each for i in range(each)]
    shown = [(p, 0) for p in first] + [(first[1], n) for n in range(1, many + 1)]
    grid = figure.subplots(len(equal), len(shown), squeeze=False)
    for line, (name, evaluation) in zip(grid, equal.items(), strict=True):
        row = evaluation.row()
        for axes, (prompt, n) in zip(line, shown, strict=True):
            axes.imshow(evaluation.images[prompt, n].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(f"{name}\nreward {row['reward']:.2f}\naccuracy {row['accuracy']:.0%}", fontsize=8)
    for axes, (prompt, n) in zip(grid[0], shown, strict=True):
        title = textwrap.fill(records[prompt]["prompt"], 12) if n == 0 else f"column 2's\nprompt,\nnoise {n + 1}"
        axes.set_title(title, fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_shapes.yaml")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 3.0], help="0 and one or more above it")
    parser.add_argument("--weight", type=float, default=WEIGHT, help="w, of the kilobytes in the reward")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="iterations between evaluations")
    parser.add_argument("--prompts", type=int, default=25)
    parser.add_argument("--group", type=int, default=16, help="images of a prompt in an evaluation")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.iterations, arguments.prompts, arguments.group = 20, 10, 8
    device, runs = start(), {}
    with tempfile.TemporaryDirectory() as folder:
        for beta in tqdm(arguments.betas, desc="runs", dynamic_ncols=True):
            runs[beta], records = train(arguments, beta, folder, device)
    strongest, without = runs[max(runs)], runs[0.0]
    last = strongest[-1]
    equal = {"base": without[0], "with KL": last, "without KL": at_reward(without, last.values["reward"].mean().item())}
    result = {
        "weight": arguments.weight, "prompts": len(records), "group": arguments.group,
        "equal_reward": {name: compared(evaluation, without[0]) for name, evaluation in equal.items()},
        "runs": {f"beta {beta:g}": [evaluation.row() for evaluation in run] for beta, run in runs.items()},
    }  # fmt: skip
    finish("kl_hacking_quick" if arguments.quick else "kl_hacking", result, draw(runs, equal, records))
    leave()


if __name__ == "__main__":
    main()
