"""Recipes on the tiny world: their configurations, what an iteration of each costs, and runs with an evaluation now and
then.

`measure` and `train` are what the worker processes of `time_to_score.py` do. They put (units of work done, text or
None) into a queue, for the progress bar of the process that started them.
"""

import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from common import ROOT
from torch import Tensor, nn

from fastgrpo.config.schema import apply_override, build, plain
from fastgrpo.engine.ranks import start
from fastgrpo.files import write_atomically
from fastgrpo.measure import DEVICE, synchronize
from fastgrpo.reporting.run_folder import read_lines
from fastgrpo.trainer import Trainer
from fastgrpo.validation import Config, check, dump_config, load_config

BASELINE, DEFAULT = "flow_grpo", "default"
GRPO = "tiny_shapes_grpo.yaml"  # the last rung; from there to the default it is the objective
RUNGS = {  # what each takes from it, beside what those before it took
    "+guidance": ["rollout.guidance_scale"],
    "+window": ["rollout"],
    "+kl": ["objective"],
}
GROWTH = 0.08  # of all seconds of training so far: the distance between evaluations, once that is more than `every`


class Run(NamedTuple):
    """What `train` has to know."""

    recipe: str
    seed: int
    folder: Path  # for evaluations.jsonl and checkpoints; its configuration lies beside it
    seconds: float  # an iteration
    budget: float  # seconds of training, at most
    score: float  # to be reached
    every: float  # seconds between evaluations
    first: "Run | None" = None  # the default's with this seed: what that takes, times `multiple`, is a budget too
    multiple: float = 1.0


def configuration(name: str) -> Config:
    """Of a recipe, or of a rung between the baseline and the default."""
    if name not in RUNGS:
        return load_config(ROOT / "configs" / ("tiny_shapes.yaml" if name == DEFAULT else f"recipes/tiny/{name}.yaml"))
    data, last = plain(configuration(BASELINE)), plain(load_config(ROOT / "configs" / GRPO))
    names = list(RUNGS)
    for key in (key for rung in names[: names.index(name) + 1] for key in RUNGS[rung]):
        section, _, field = key.partition(".")
        data[section] = {**data[section], field: last[section][field]} if field else last[section]
    config = build(Config, data)
    check(config)
    return config


def write_configuration(work: Path, name: str, settings: Sequence[str]) -> None:
    """Beside the recipe's runs, which go on with no other."""
    path, data = work / name / "config.yaml", plain(configuration(name))
    for setting in settings:
        apply_override(data, setting)
    text = dump_config(build(Config, data))
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{path.parent}: holds runs of another configuration; remove it, or choose another --work")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def join(progress: Any) -> None:
    """A worker begins."""
    global ranks, queue
    torch.set_num_threads(1)
    ranks, queue = start(), progress


def now() -> float:
    """The processor's seconds, in one thread; on a GPU those on the wall."""
    synchronize()
    return time.process_time() if DEVICE.type == "cpu" else time.perf_counter()


@contextmanager
def counted(policy: nn.Module) -> Iterator[SimpleNamespace]:
    """The images that a network is evaluated for: each once, and twice more where a gradient comes back."""
    seen = SimpleNamespace(forwards=0)

    def count(images: int) -> None:
        seen.forwards += images

    def through(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        images = len(inputs[0])
        count(images)
        if output.requires_grad:
            output.register_hook(lambda gradient: count(2 * images))

    handle = policy.register_forward_hook(through)
    try:
        yield seen
    finally:
        handle.remove()


def measure(work: Path, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Of each recipe the seconds and the image forwards of an iteration: in turn, the first to warm up, then the fastest."""
    trainers = {name: Trainer(load_config(work / name / "config.yaml"), ranks=ranks) for name in names}
    measured: dict[str, dict[str, float]] = {}
    for n in range(1 + rounds):
        for name, trainer in trainers.items():
            with trainer.engine.rollout_policy() as policy, counted(policy) as seen:
                began = now()
                trainer.iterate(n + 1)
                seconds = round(now() - began, 4)
            before = measured.get(name, {"seconds": math.inf})["seconds"] if n > 1 else math.inf
            measured[name] = {"seconds": min(seconds, before), "image_forwards": seen.forwards}
            queue.put((1, None))
    for trainer in trainers.values():
        trainer.close()
    return measured


def due(run: Run) -> list[int]:
    """The iterations after which to evaluate: at the same times for all recipes, whatever their iterations take."""
    times, at = [], 0.0
    while at < run.budget:
        times.append(at)
        at += max(run.every, GROWTH * at)
    return sorted({round(at / run.seconds) for at in (*times, run.budget)})


def kept(run: Run) -> list[dict]:
    """Its evaluations so far."""
    return read_lines(run.folder / "evaluations.jsonl")


def reached(rows: Sequence[dict], score: float) -> int | None:
    """The iteration of the first of two evaluations in a row that are at or above the score; the base's is none of them."""
    for row, following in zip(rows[1:], rows[2:], strict=False):
        if row["accuracy"] >= score and following["accuracy"] >= score:
            return row["iteration"]
    return None


def finished(run: Run, rows: Sequence[dict]) -> bool:
    """It has reached the score, or spent its budget."""
    if not rows or reached(rows, run.score) is not None:
        return bool(rows)
    taken = reached(kept(run.first), run.score) if run.first else None
    enough = math.inf if taken is None else run.multiple * taken * run.first.seconds
    return rows[-1]["iteration"] >= due(run)[-1] or rows[-1]["iteration"] * run.seconds >= enough


def train(run: Run) -> None:
    """Start a run or go on with it, until it is finished."""
    rows = kept(run)
    if finished(run, rows):
        queue.put((run.budget, None))
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"seed={run.seed}", f"output={run.folder}"]
    trainer = Trainer(load_config(run.folder.parent / "config.yaml", overrides), ranks=ranks)
    last = trainer.resume()
    rows = [row for row in rows if row["iteration"] <= last]  # what came after the last checkpoint comes again
    queue.put((last * run.seconds, None))
    parent, evaluations = multiprocessing.parent_process(), due(run)
    for iteration in range(last, evaluations[-1] + 1):
        if iteration > last:
            trainer.iterate(iteration)
            queue.put((run.seconds, None))
        if iteration in evaluations and iteration not in [row["iteration"] for row in rows]:
            rows.append({**evaluate(run, trainer, iteration), "wall_seconds": round(trainer.seconds, 2)})
            write_atomically(run.folder / "evaluations.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            if iteration:
                trainer.save()
        if finished(run, rows) or not (parent is None or parent.is_alive()):
            break
    queue.put((run.budget - iteration * run.seconds, None))
    trainer.close()


def evaluate(run: Run, trainer: Trainer, iteration: int) -> dict:
    """The averaged weights on held-out prompts."""
    with trainer.engine.swapped(trainer.ema.weights), trainer.engine.rollout_policy() as policy:
        accuracy = trainer.evaluator.accuracy(policy, trainer.config.evaluation.images_between)["accuracy"]["overall"]
    spent = f"{iteration * run.seconds:.0f} of {run.budget:.0f} s, {iteration} iterations"
    queue.put((0, f"{run.recipe}, seed {run.seed}: {accuracy:.1%} after {spent}"))
    return {"iteration": iteration, "accuracy": round(accuracy, 4)}
