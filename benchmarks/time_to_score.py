"""Time to score: seconds and image forwards of training until 90% and 95% held-out accuracy, each recipe from the same
base.

    python benchmarks/time_to_score.py                      the default and the baseline, three seeds
    python benchmarks/time_to_score.py --recipes all        every recipe and the ladder too, one seed each
    python benchmarks/time_to_score.py --quick              3 minutes: two recipes, lower scores

    seconds to a score = iterations to the score x seconds an iteration

A recipe is configs/recipes/tiny/NAME.yaml, `default` is configs/tiny_shapes.yaml, and all are compared with
`flow_grpo`. From there to the default leads a ladder, on which each rung takes over one cause more of the difference: no
guidance, a rollout of fewer steps with a window, another clip and KL (which is configs/tiny_shapes_grpo.yaml), and last
another objective.

Seconds an iteration are measured first, all recipes in turn in one process, as the fastest of a few iterations after
one to warm up. On a CPU they are the processor's own, in one thread: what the wall would show on a machine with nothing
else to do. So what happens beside the benchmark makes no recipe look slow; the seconds that passed on the wall are kept
with each evaluation. All iterations are taken to cost what those first ones do; where a sliding window changes the steps
after it, they do not quite.

Image forwards are evaluations of the network for one image: guidance takes two, and a backward pass counts as two more.
They are counted at the network.

Iterations to a score: a deterministic ODE draws held-out images with the averaged weights, from the same prompts and
noise at every evaluation and for every recipe of a seed. Evaluations are due at the same seconds of training in all
recipes, and their own time does not count. A score is reached at the first of two evaluations in a row that are at or
above it: one alone may be luck. What is not reached within the budget gives a bound, "> 8.2x" where that is the
baseline. The ODE takes 20 steps: of 200 images 40 steps judge 2% otherwise for the base and 1% for a trained model.

A run ends when it has reached the highest score, or at its budget: `--budget` seconds of training, or a multiple of what
the default took with the same seed. The baseline gets `--multiple`; recipes beside these two take less time, as they run
with the first seeds only (`--other-seeds`) and up to `--other-multiple`. Runs are kept in `--work`, evaluation by
evaluation, and the same command goes on where it was interrupted. Every worker has one thread. Writes
results/time_to_score_DEVICE.{json,png}.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

from common import ROOT, finish, pyplot
from scored_runs import BASELINE, DEFAULT, RUNGS, Run, join, kept, measure, reached, train, write_configuration
from tqdm import tqdm

from fastgrpo.files import write_atomically


class Spent(NamedTuple):
    """Seconds, or whatever else, until a score; all that there were, where it was not reached."""

    amount: float
    reached: bool


def mean(spent: Iterable[Spent]) -> Spent:
    """Over seeds: where one has not reached the score, of them all no more than a lower bound."""
    amounts, all_reached = zip(*spent, strict=True)
    return Spent(statistics.mean(amounts), all(all_reached))


def speed_up(baseline: Spent, other: Spent) -> dict[str, Any]:
    """How many times sooner the other is there; a bound where only one of them has arrived, nothing where neither has."""
    if not (baseline.reached or other.reached):
        return {"times": None, "text": "neither reached it"}
    times = baseline.amount / other.amount
    bound = "" if baseline.reached and other.reached else "< " if baseline.reached else "> "
    return {"times": round(times, 3), "text": f"{bound}{times:.2f}x"}


def until(rows: Sequence[dict], score: float) -> Spent:
    """Iterations."""
    found = reached(rows, score)
    return Spent(rows[-1]["iteration"], False) if found is None else Spent(found, True)


class Pool:
    """Single-threaded workers, and a progress bar for what they report."""

    def __init__(self, workers: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # read when a worker starts
        context = multiprocessing.get_context("spawn")
        self.news = context.Queue()
        self.workers = ProcessPoolExecutor(workers, context, join, (self.news,))

    def run(self, name: str, total: float, function: Callable, tasks: Sequence[tuple]) -> list[Any]:
        """`function` of each task, the results in order; an error in one of them ends all."""
        futures = [self.workers.submit(function, *task) for task in tasks]
        with tqdm(total=round(total), desc=name, dynamic_ncols=True, bar_format="{l_bar}{bar}| {elapsed}") as bar:
            try:
                waiting: set[Future] = set(futures)
                while waiting:
                    done, waiting = wait(waiting, timeout=0.5)
                    self._show(bar)
                    for future in done:
                        future.result()
            except BaseException:
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
        return [future.result() for future in futures]

    def _show(self, bar: tqdm) -> None:
        while True:
            try:
                units, text = self.news.get_nowait()
            except Empty:
                return
            bar.update(min(units, bar.total - bar.n))
            if text:
                bar.write(text)


def measured(arguments: argparse.Namespace, pool: Pool) -> dict[str, dict[str, float]]:
    """Seconds and image forwards of an iteration; all anew if one is unknown, as only what was taken in turn compares."""
    path, names = arguments.work / "iterations.json", arguments.recipes
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not set(names) <= set(known):
        names = list(dict.fromkeys([*known, *names]))
        rounds = arguments.rounds
        (known,) = pool.run("timing", len(names) * (1 + rounds), measure, [(arguments.work, names, rounds)])
        write_atomically(path, json.dumps(known, indent=1) + "\n")
    return known


def train_all(arguments: argparse.Namespace, pool: Pool, iterations: dict[str, dict[str, float]]) -> dict[str, list[Run]]:
    """The runs of each recipe, by seed."""

    def run(recipe: str, seed: int, first: Run | None) -> Run:
        folder, seconds = arguments.work / recipe / f"seed{seed}", iterations[recipe]["seconds"]
        multiple = arguments.multiple if recipe == BASELINE else arguments.other_multiple
        return Run(recipe, seed, folder, seconds, arguments.budget, max(arguments.scores), arguments.every, first, multiple)

    firsts = {seed: run(DEFAULT, seed, None) if DEFAULT in arguments.recipes else None for seed in arguments.seeds}
    runs = {}
    for recipe in arguments.recipes:
        seeds = arguments.seeds if recipe in (BASELINE, DEFAULT) else arguments.seeds[: arguments.other_seeds]
        runs[recipe] = [firsts[seed] if recipe == DEFAULT else run(recipe, seed, firsts[seed]) for seed in seeds]
    # The default first, as it says how long the others may be; then the slowest, so that no worker ends alone.
    order = sorted((run for some in runs.values() for run in some), key=lambda run: (run.recipe != DEFAULT, -run.seconds))
    pool.run("training", sum(run.budget for run in order), train, [(run,) for run in order])
    return runs


def spent(row: dict[str, Any], score: float, seeds: Iterable[int]) -> dict[str, Spent]:
    """By what is counted: a recipe's mean over seeds."""
    iterations = mean(until(row["curves"][seed], score) for seed in seeds)
    costs = {"seconds": row["seconds_per_iteration"], "image_forwards": row["image_forwards_per_iteration"]}
    return {what: Spent(iterations.amount * cost, iterations.reached) for what, cost in {**costs, "iterations": 1}.items()}


def result_of(recipe: str, runs: list[Run], cost: dict[str, float], scores: Sequence[float]) -> dict[str, Any]:
    """A recipe's numbers, by score its means over seeds."""
    curves = {run.seed: kept(run) for run in runs}
    row: dict[str, Any] = {"recipe": recipe, "seconds_per_iteration": cost["seconds"], "scores": {}, "curves": curves}
    row["image_forwards_per_iteration"] = cost["image_forwards"]
    for score in scores:
        total, by_seed = spent(row, score, curves), {seed: until(rows, score) for seed, rows in curves.items()}
        seconds = {seed: round(each.amount * cost["seconds"]) for seed, each in by_seed.items()}
        row["scores"][f"{score:g}"] = {
            "reached": total["iterations"].reached,
            "iterations": round(total["iterations"].amount, 2),
            "seconds": round(total["seconds"].amount, 1),
            "image_forwards": round(total["image_forwards"].amount),
            "wall_seconds": round(statistics.mean(wall(curves[seed], each) for seed, each in by_seed.items()), 1),
            "by_seed": {
                seed: f"{seconds[seed]} seconds" if each.reached else f"not reached in {seconds[seed]} seconds"
                for seed, each in by_seed.items()
            },
        }
    return row


def wall(rows: Sequence[dict], iterations: Spent) -> float:
    return next(row["wall_seconds"] for row in rows if row["iteration"] == iterations.amount)


def compare(results: list[dict[str, Any]], scores: Sequence[float]) -> None:
    """Into each result its speed-up over the baseline, over the seeds that it was run with: in seconds, and what they are
    made of."""
    baseline = next((row for row in results if row["recipe"] == BASELINE), None)
    for row in results if baseline else []:
        for score in scores:
            own, theirs = (spent(each, score, row["curves"]) for each in (row, baseline))
            row["scores"][f"{score:g}"]["speed_up"] = {what: speed_up(theirs[what], own[what]) for what in own}
        row["faster_iteration"] = round(baseline["seconds_per_iteration"] / row["seconds_per_iteration"], 3)


def draw(results: list[dict[str, Any]], scores: Sequence[float]) -> Any:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(3, 2))
    for n, row in enumerate(results):
        color, label, style = f"C{n % 10}", row["recipe"], "-" if n < 10 else "--"  # there are ten colours
        for rows in row["curves"].values():
            seconds = [point["iteration"] * row["seconds_per_iteration"] for point in rows[1:]]
            left.plot(seconds, [point["accuracy"] for point in rows[1:]], style, color=color, linewidth=1, label=label)
            label = None
            for score in scores:
                spent = until(rows, score)
                if spent.reached:
                    left.plot(spent.amount * row["seconds_per_iteration"], score, "o", color=color, markersize=4)
    for score in scores:
        left.axhline(score, color="#888", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel="seconds of training in one thread", ylabel="accuracy on held-out prompts")
    left.xaxis.set_major_formatter("{x:g}")
    left.set_title("A line a seed; a dot where a score is reached")
    left.legend(frameon=False, loc="upper left", fontsize=8)
    draw_speed_ups(right, [row for row in results if "faster_iteration" in row], scores)
    return figure


def draw_speed_ups(axes: Any, results: list[dict[str, Any]], scores: Sequence[float]) -> None:
    """A bar a score; beside it what it is the product of."""
    height = 0.8 / len(scores)
    for m, score in enumerate(scores):
        found = [row["scores"][f"{score:g}"] for row in results]
        times = [each["speed_up"]["seconds"]["times"] or 0 for each in found]
        places = [n + m * height for n in range(len(results))]
        bars = axes.barh(places, times, height, color=("#9dbcf0", "#2f6fdb")[m % 2])
        texts = [f"{score:.0%}: {said(row, each)}" for row, each in zip(results, found, strict=True)]
        axes.bar_label(bars, texts, padding=4, fontsize=8)
    axes.set_yticks([n + (len(scores) - 1) * height / 2 for n in range(len(results))], [row["recipe"] for row in results])
    axes.invert_yaxis()
    axes.margins(x=0.6)
    axes.set(xlabel=f"times faster than {BASELINE} (faster iterations x fewer of them)", title="Speed-up to a score")


def said(row: dict[str, Any], of: dict[str, Any]) -> str:
    seconds, iterations = of["speed_up"]["seconds"], of["speed_up"]["iterations"]
    if seconds["times"] is None:
        return f"not reached in {of['seconds']:.0f} s"
    return f"{seconds['text']} ({row['faster_iteration']:.2f} x {iterations['times']:.2f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ready = {path.stem for path in (ROOT / "configs" / "recipes" / "tiny").glob("*.yaml")}
    known = [BASELINE, *RUNGS, DEFAULT, *sorted(ready - {BASELINE})]
    parser.add_argument(
        "--recipes", nargs="+", choices=[*known, "all"], default=[BASELINE, DEFAULT], metavar="NAME",
        help=f"of {', '.join(known)}, or all; given none, the baseline and the default",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--other-seeds", type=int, default=1, help="of these the first few, for all but these two")
    parser.add_argument("--scores", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--budget", type=float, default=1500, help="seconds of training of a run, at most")
    parser.add_argument("--multiple", type=float, default=8.2, help="of the default's seconds, at most: the baseline")
    parser.add_argument("--other-multiple", type=float, default=3, help="of the same seconds, at most: all other recipes")
    parser.add_argument("--every", type=float, default=10, help="seconds of training between evaluations, at first")
    parser.add_argument("--images", type=int, default=200, help="of an evaluation")
    parser.add_argument("--steps", type=int, default=20, help="of an evaluation's ODE")
    parser.add_argument("--rounds", type=int, default=3, help="timed iterations of each recipe")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None, help="where runs are kept; otherwise runs/time_to_score")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all recipes")
    arguments = parser.parse_args()
    if "all" in arguments.recipes:
        arguments.recipes = known
    name = "time_to_score"
    if arguments.quick:
        name = "time_to_score_quick"
        arguments.recipes, arguments.seeds, arguments.scores = [BASELINE, DEFAULT], [0], [0.7, 0.75]
        arguments.budget, arguments.every, arguments.images, arguments.rounds = 60, 10, 100, 1
    arguments.name, arguments.work = name, (arguments.work or ROOT / "runs" / name).resolve()
    return arguments


def main() -> None:
    arguments = parse()
    evaluation = {"num_steps": arguments.steps, "images_between": arguments.images, "batch_size": min(100, arguments.images)}
    settings = [f"evaluation.{key}={value}" for key, value in {**evaluation, "samples": 1}.items()]
    for name in arguments.recipes:
        write_configuration(arguments.work, name, [*settings, *arguments.set])
    pool = Pool(arguments.workers)
    iterations = measured(arguments, pool)
    runs = train_all(arguments, pool, iterations)
    pool.workers.shutdown()
    results = [result_of(name, runs[name], iterations[name], arguments.scores) for name in arguments.recipes]
    compare(results, arguments.scores)
    options = ("seeds", "scores", "images", "steps", "every", "budget", "multiple", "other_multiple", "set")
    asked = {key: getattr(arguments, key) for key in options}
    finish(arguments.name, {"threads": 1, **asked, "results": results}, draw(results, arguments.scores))


if __name__ == "__main__":
    main()
