"""What the KL is for: a reward that can be hacked, maximised with it and without, compared at equal reward.

    python benchmarks/kl_hacking.py             twenty minutes of one core
    python benchmarks/kl_hacking.py --quick     3 minutes: fewer iterations and images, one beta beside 0

What is maximised is accuracy + w * kilobytes of the image as a JPEG. The first part is earned by drawing what was asked. The
second is had by whatever compresses badly, so that what is no image of the world at all can score more than a right one.
Each beta trains from the same base with the same seeds, and every few iterations the averaged weights draw groups of images
of held-out prompts, always from the same noise:

    reward       the mean of what is maximised
    accuracy     its honest part: the share of images that show exactly what was asked
    distance     from an image to the nearest image of the world, of any content: root mean square over its pixels, in
                 levels of 255, mean over images. Prompts play no part in it: it is the images' quality alone.
    diversity    root mean square difference between two images of one prompt, in levels of 255, mean over pairs

The nearest image is found exactly, up to its grid: a scene is four cells that each hold one shape or none, so each cell
has its own nearest drawing, of all shapes, colours, centres and radii. What both can at best be is shown by true images:
drawings of the same prompts, through the autoencoder. (A base that draws other things than were asked is more diverse than
they are; once it draws what was asked, their diversity is what is left.) A run with a KL is taken at its last evaluation,
and the run without at the one whose reward is nearest to that.

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

from fastgrpo.engine.ranks import Ranks, start
from fastgrpo.engine.ranks import finish as leave
from fastgrpo.records import SAMPLE, noise_address
from fastgrpo.sampling.generate import generate
from fastgrpo.tiny.pretrain import to_unit
from fastgrpo.tiny.render import BACKGROUND, coverage, render
from fastgrpo.tiny.world import CELL, COLORS, JITTER, RADIUS, SHAPES, sample_scene
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config

SIZE = int(CELL)
AT_ONCE = 100  # images
NAMES = {
    "reward": "reward", "accuracy": "accuracy", "kilobytes": "kilobytes as a JPEG",
    "distance": "distance to the world, levels", "diversity": "diversity in a group, levels",
}  # fmt: skip
SHOWN, BELOW = ("reward", "accuracy", "distance", "diversity"), ("kilobytes", "accuracy", "distance", "diversity")
LEVELS = (3, 4, 5, 6, 8, 10, 15, 20, 30)
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


def trainer_of(arguments: argparse.Namespace, beta: float, folder: str, ranks: Ranks) -> Trainer:
    settings = [
        f"output={folder}", f"objective.beta={beta}", "rollout.groups=8", "rollout.batch_size=64",
        f"reward.train={{tiny_shapes: 1, jpeg_incompressibility: {arguments.weight}}}", *arguments.set,
    ]  # fmt: skip
    return Trainer(load_config(arguments.config, settings), ranks=ranks)


@torch.no_grad()
def draw_images(trainer: Trainer, records: Sequence[dict]) -> Tensor:
    """One image of each record, by the averaged weights and as trained, but by the ODE."""
    rollout, images = trainer.config.rollout, []
    with trainer.engine.swapped(trainer.ema.weights), trainer.engine.rollout_policy() as policy:
        for first in range(0, len(records), AT_ONCE):
            prompts = [record["prompt"] for record in records[first : first + AT_ONCE]]
            prompted = trainer.embeddings.prompted(prompts, rollout.guidance_scale)
            sample_id = torch.arange(first, first + len(prompts), device=trainer.model.device)
            images.append(generate(
                trainer.model, policy, prompted, noise_address(SAMPLE, trainer.config.seed, 0, sample_id),
                num_steps=rollout.num_steps, guidance_scale=rollout.guidance_scale,
            ).cpu())  # fmt: skip
    return torch.cat(images)


def prompts_of_each_tag(records: Sequence[dict], count: int) -> list[dict]:
    """As many of each category, evenly spaced in the file; a category that has fewer repeats some, with other noise."""
    tags = dict.fromkeys(record["tag"] for record in records)
    share, chosen = max(1, count // len(tags)), []
    for tag in tags:
        mine = [record for record in records if record["tag"] == tag]
        chosen += [mine[i * len(mine) // share] for i in range(share)]
    return chosen


def true_images(trainer: Trainer, records: Sequence[dict]) -> Tensor:
    """A drawing of each record, through the autoencoder: no weights of the network could give better images."""
    rng = np.random.default_rng(trainer.config.seed)
    drawings = torch.from_numpy(np.stack([render(sample_scene(record, rng)) for record in records])).permute(0, 3, 1, 2)
    vae, images = trainer.model.pipeline.vae, []
    with torch.no_grad():
        for part in drawings.to(vae.device).split(AT_ONCE):
            latents = vae.encode(to_unit(part)).latent_dist.mean
            images.append(trainer.model.decode((latents - vae.config.shift_factor) * vae.config.scaling_factor).cpu())
    return torch.cat(images)


def measure(trainer: Trainer, iteration: int, images: Tensor, records: Sequence[dict], size: int) -> Evaluation:
    """images (P N, 3, H, W) of the records (P N), N = size of them of a prompt."""
    scores = trainer.reward(images, [record["prompt"] for record in records], list(records))
    each = {
        "reward": trainer.reward.total(scores), "accuracy": scores[:, 0], "kilobytes": scores[:, 1],
        "distance": torch.cat([distance(part) for part in images.split(AT_ONCE)]),
    }  # fmt: skip
    values = {name: value.unflatten(0, (-1, size)).mean(dim=1) for name, value in each.items()}
    groups = images.unflatten(0, (-1, size))
    return Evaluation(iteration, groups, {**values, "diversity": diversity(groups)})


def train(arguments: argparse.Namespace, beta: float, trainer: Trainer, records: Sequence[dict]) -> list[Evaluation]:
    """A run's evaluations, the base's first. Where nothing is right any more there is nothing left to lose: it stops."""
    evaluations = [measure(trainer, 0, draw_images(trainer, records), records, arguments.group)]
    for iteration in tqdm(range(1, arguments.iterations + 1), desc=f"beta {beta:g}", leave=False, dynamic_ncols=True):
        trainer.iterate(iteration)
        if iteration % arguments.every == 0:
            images = draw_images(trainer, records)
            evaluations.append(measure(trainer, iteration, images, records, arguments.group))
            tqdm.write(f"beta {beta:g}: {evaluations[-1].row()}")
            if evaluations[-1].row()["accuracy"] == 0:
                break
    return evaluations


def change(evaluation: Evaluation, other: Evaluation, name: str) -> dict[str, float]:
    """A value against another's, relative, and its standard error over prompts, paired."""
    ours, theirs = evaluation.values[name], other.values[name]
    scale = theirs.mean().item()
    error = (ours - theirs).std().item() / math.sqrt(len(ours))
    return {"relative": round(ours.mean().item() / scale - 1, 4), "error": round(error / scale, 4)}


def compared(evaluation: Evaluation, base: Evaluation, truth: Evaluation, tags: Sequence[str]) -> dict[str, Any]:
    against = {
        f"against_{key}": {name: change(evaluation, other, name) for name in ("distance", "diversity")}
        for key, other in (("base", base), ("truth", truth))
    }
    return {**evaluation.row(), **against, "categories": by_category(evaluation, tags)}


def by_category(evaluation: Evaluation, tags: Sequence[str]) -> dict[str, dict[str, float]]:
    """The means of a category's prompts; tags are the prompts', (P,)."""
    means = {}
    for tag in dict.fromkeys(tags):
        mine = torch.tensor([other == tag for other in tags])
        means[tag] = {name: round(evaluation.values[name][mine].mean().item(), 4) for name in SHOWN[1:]}
    return means


def at_reward(run: Sequence[Evaluation], reward: float) -> Evaluation:
    """The evaluation of a run, its base aside, whose reward is nearest."""
    return min(run[1:], key=lambda evaluation: abs(evaluation.values["reward"].mean().item() - reward))


def draw(runs: dict[float, list[Evaluation]], truth: Evaluation, pictured: dict[str, Evaluation], prompts: list[str]) -> Any:
    figure = pyplot().figure(figsize=(14, 11), layout="constrained")
    curves, pictures = figure.subfigures(2, 1, height_ratios=(6, 4))
    draw_curves(curves, runs, truth, pictured["with KL"].row()["reward"])
    draw_pictures(pictures, pictured, prompts)
    return figure


def draw_curves(figure: Any, runs: dict[float, list[Evaluation]], truth: Evaluation, reward: float) -> None:
    """Above against iterations; below against the reward, where height is what a reward has cost."""
    panels = figure.subplots(2, len(SHOWN))
    for color, (beta, run) in zip(COLORS_OF_RUNS, sorted(runs.items()), strict=False):
        rows = [evaluation.row() for evaluation in run]
        style = {"marker": ".", "color": color, "label": f"beta {beta:g}" if beta else "no KL"}
        for axes, name in zip(panels[0], SHOWN, strict=True):
            axes.plot([row["iteration"] for row in rows], [row[name] for row in rows], **style)
        for axes, name in zip(panels[1], BELOW, strict=True):
            axes.plot([row["reward"] for row in rows], [row[name] for row in rows], **style)
    for line, names, below in ((panels[0], SHOWN, "iteration"), (panels[1], BELOW, "reward")):
        for axes, name in zip(line, names, strict=True):
            axes.axhline(truth.row()[name], color="#888", linewidth=0.8, linestyle=":", label="true images")
            axes.set(title=NAMES[name], xlabel=below, yscale="log" if name == "distance" else "linear")
            if name == "distance":
                axes.set_yticks(LEVELS, LEVELS)
                axes.set_yticks([], minor=True)
    for axes in panels[1]:
        axes.axvline(reward, color="#888", linewidth=0.8, linestyle="--", label="compared here")
    panels[1, 0].legend(frameon=False, fontsize=8)


def draw_pictures(figure: Any, pictured: dict[str, Evaluation], prompts: list[str]) -> None:
    """Left the first image of several prompts, right several of one prompt: each column one prompt and one noise."""
    first = [i * len(prompts) // 10 for i in range(10)]
    shown = [(p, 0) for p in first] + [(first[2], n) for n in range(1, 5)]
    grid = figure.subplots(len(pictured), len(shown))
    for line, (name, evaluation) in zip(grid, pictured.items(), strict=True):
        row = evaluation.row()
        for axes, (prompt, n) in zip(line, shown, strict=True):
            axes.imshow(evaluation.images[prompt, n].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        label = f"{name}\niteration {row['iteration']}\nreward {row['reward']:.2f}\naccuracy {row['accuracy']:.0%}"
        line[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    for axes, (prompt, n) in zip(grid[0], shown, strict=True):
        title = textwrap.fill(prompts[prompt], 14)
        axes.set_title(title if n == 0 else f"{title}\n(noise {n + 1})", fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "ten_steps.yaml")
    parser.add_argument("--betas", type=float, nargs="+", default=[5.0, 3.0], help="beside 0; pictures are of the first")
    parser.add_argument("--weight", type=float, default=3.0, help="w, of the kilobytes in the reward")
    parser.add_argument("--iterations", type=int, default=72)
    parser.add_argument("--every", type=int, default=2, help="iterations between evaluations")
    parser.add_argument("--prompts", type=int, default=25)
    parser.add_argument("--group", type=int, default=16, help="images of a prompt in an evaluation")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.iterations, arguments.prompts, arguments.group = 20, 10, 8
        arguments.betas = arguments.betas[:1]
    ranks, runs = start(), {}
    with tempfile.TemporaryDirectory() as folder:
        for beta in tqdm([0.0, *arguments.betas], desc="runs", dynamic_ncols=True):
            trainer = trainer_of(arguments, beta, folder, ranks)
            chosen = prompts_of_each_tag(trainer.evaluator.prompts.metadata, arguments.prompts)
            records = [record for record in chosen for _ in range(arguments.group)]
            truth = measure(trainer, 0, true_images(trainer, records), records, arguments.group)
            runs[beta] = train(arguments, beta, trainer, records)
            trainer.close()
    base, prompts, tags = runs[0.0][0], [record["prompt"] for record in chosen], [record["tag"] for record in chosen]
    pairs = {beta: (runs[beta][-1], at_reward(runs[0.0], runs[beta][-1].row()["reward"])) for beta in arguments.betas}
    result = {
        "weight": arguments.weight, "prompts": len(prompts), "group": arguments.group,
        "true_images": compared(truth, base, truth, tags), "base": compared(base, base, truth, tags),
        "equal_reward": [
            {
                "beta": beta,
                "with_kl": compared(ours, base, truth, tags),
                "without_kl": compared(other, base, truth, tags),
            }
            for beta, (ours, other) in pairs.items()
        ],
        "runs": {f"beta {beta:g}": [evaluation.row() for evaluation in run] for beta, run in runs.items()},
    }  # fmt: skip
    ours, other = pairs[arguments.betas[0]]
    rows = {"base": base, "with KL": ours, "without KL,\nequal reward": other, "without KL,\nat its end": runs[0.0][-1]}
    figure = draw(runs, truth, rows, prompts)
    finish("kl_hacking_quick" if arguments.quick else "kl_hacking", result, figure)
    leave()


if __name__ == "__main__":
    main()
