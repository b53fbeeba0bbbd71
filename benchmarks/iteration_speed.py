"""A whole iteration: images a second, rollout to optimiser step, against a straightforward Flow-GRPO loop.

    python benchmarks/iteration_speed.py          the tiny model; writes results/iteration_speed_DEVICE.{json,png}

Recipes are changed one at a time, so that each step of the ladder shows its own factor:

    straightforward, released recipe     guidance 4.5, 9 of 10 steps trained, KL (benchmarks/released.py)
    straightforward, dead samples left out    which the released script also does: groups of equal rewards teach nothing
    fastgrpo, released recipe            the same work on this code
    ... compiled                         torch.compile of the transformer block: with this, what engineering alone gives
    ... no guidance                      one forward a step instead of two
    ... window of 3                      3 of 10 steps trained
    ... no KL                            beta 0: no forward of the reference

All run in this process, in turn, iteration after iteration, with the same threads.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, finish, pyplot
from models import add_stock_lora
from released import Released
from tqdm import tqdm

from fastgrpo.data.prompts import load_prompts
from fastgrpo.engine.ranks import finish as leave
from fastgrpo.engine.ranks import start
from fastgrpo.measure import DEVICE, synchronize
from fastgrpo.models import load_model
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config

RECIPE = [
    "rollout.guidance_scale=4.5", "rollout.window={kind: all_but_last}", "objective.beta=0.04", "rollout.noise_level=0.7",
    "rollout.batch_size=32",  # small enough that dead samples fill whole batches
    "engine.zero_stage=0",  # one process has nothing to shard, and the rival's optimiser is plain
]  # fmt: skip
WINDOW = "rollout.window={kind: fixed, start: 1, size: 3}"
COMPILED = [*RECIPE, "model.compile=true"]
LADDER = {
    "fastgrpo, released recipe": RECIPE,
    "... compiled": COMPILED,
    "... no guidance": [*COMPILED, "rollout.guidance_scale=1"],
    "... window of 3": [*COMPILED, "rollout.guidance_scale=1", WINDOW],
    "... no KL": [*COMPILED, "rollout.guidance_scale=1", WINDOW, "objective.beta=0"],
}


def released(config: Any, drop_dead: bool) -> Released:
    model = load_model(
        "sd3", path=config.model.path, dtype=getattr(torch, config.model.dtype), device=DEVICE, max_text_tokens=1
    )
    lora = config.model.lora
    add_stock_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    return Released(config, model, load_prompts(config.prompts.train), drop_dead=drop_dead)


def draw(rows: list[dict[str, Any]]) -> Any:
    plt = pyplot()

    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    names = [row["form"] for row in rows]
    colors = ["#2f6fdb" if name in LADDER else "#9aa5b1" for name in names]
    bars = axes.barh(names, [row["images_per_second"] for row in rows], color=colors)
    labels = [f"{row['images_per_second']:.1f}  ({row['times_straightforward']:.2f}x)" for row in rows]
    axes.bar_label(bars, labels, padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set(xlabel="images a second through a whole iteration", title="From prompts to the optimiser's step")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "ten_steps.yaml")
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each form")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all forms")
    arguments = parser.parse_args()
    ranks = start()
    with tempfile.TemporaryDirectory() as folder:

        def config(settings: list[str]) -> Any:
            return load_config(arguments.config, [*settings, f"output={folder}", *arguments.set])

        first = config(RECIPE)
        forms: dict[str, Any] = {
            "straightforward, released recipe": released(first, drop_dead=False),
            "straightforward, dead samples left out": released(first, drop_dead=True),
        }
        forms |= {name: Trainer(config(settings), ranks=ranks) for name, settings in LADDER.items()}
        times: dict[str, list[float]] = {name: [] for name in forms}
        phases: dict[str, dict[str, float]] = {}
        for n in tqdm(range(arguments.rounds + 1), desc="rounds"):
            for name, form in tqdm(forms.items(), desc="forms", leave=False):
                began = time.perf_counter()
                metrics = form.iterate(n + 1)
                synchronize()
                if n:  # the first warms up
                    times[name].append(time.perf_counter() - began)
                if metrics:
                    phases[name] = {phase: round(s, 4) for phase, s in metrics["seconds"].items()}
        for name in LADDER:
            forms[name].engine.close()
    images = first.rollout.groups * first.rollout.group_size
    medians = {name: statistics.median(values) for name, values in times.items()}
    slowest = medians["straightforward, released recipe"]
    rows, before = [], slowest
    for name, median in medians.items():
        rows.append({
            "form": name, "seconds": round(median, 4), "images_per_second": round(images / median, 3),
            "times_straightforward": round(slowest / median, 3),
            "times_straightforward_without_dead": round(medians["straightforward, dead samples left out"] / median, 3),
            "times_the_row_above": round(before / median, 3),
            "phases": phases.get(name, {}),
        })  # fmt: skip
        before = median
    finish("iteration_speed", {"images": images, "rounds": arguments.rounds, "rows": rows}, draw(rows))
    forms.clear()
    leave()


if __name__ == "__main__":
    main()
