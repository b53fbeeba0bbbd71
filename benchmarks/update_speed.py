"""The update alone: images a second by micro-batch, ZeRO stage and checkpointing, on one rollout's samples.

    python benchmarks/update_speed.py             the tiny model; writes results/update_speed_DEVICE.{json,png}

A micro-batch as large as the rollout's batch is one step of all its samples; smaller ones are parts of a step, larger ones
fold several steps into one forward.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, finish, pyplot
from tqdm import tqdm

from fastgrpo.engine.ranks import finish as leave
from fastgrpo.engine.ranks import start
from fastgrpo.measure import synchronize
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config


def forms(batch: int, trained: int) -> dict[str, list[str]]:
    """Settings by name: the fold, then the stage, then checkpointing, one at a time."""
    sizes = [size for size in (batch // 4, batch, batch * trained) if batch * trained % size == 0]
    found = {f"micro-batch {size}": [f"update.micro_batch_size={size}"] for size in sizes}
    for stage in (0, 1, 2, 3):
        found[f"ZeRO {stage}"] = [f"engine.zero_stage={stage}", "rollout.cuda_graph=false"]
    found["checkpointing"] = ["update.gradient_checkpointing=true"]
    found = {name: [*settings, "update.old_velocity=rollout"] for name, settings in found.items()}  # one cause at a time
    found["v_old recomputed"] = ["update.old_velocity=recompute"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "ten_steps.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all forms")
    arguments = parser.parse_args()
    ranks, rows = start(), []
    with tempfile.TemporaryDirectory() as folder:
        common = [f"output={folder}", *arguments.set]
        config = load_config(arguments.config, common)
        table = forms(config.rollout.batch_size, config.rollout.window.size or config.rollout.num_steps - 1)
        for name, settings in tqdm(table.items(), desc="forms"):
            trainer = Trainer(load_config(arguments.config, [*common, *settings]), ranks=ranks)
            times = []
            for n in range(arguments.rounds + 1):
                metrics = trainer.iterate(n + 1)
                synchronize()
                if n:
                    times.append(metrics["seconds"]["update"])
            trainer.close()
            rows.append({"form": name, "seconds": round(statistics.median(times), 4), "settings": settings})
            del trainer
    images = config.rollout.groups * config.rollout.group_size
    for row in rows:
        row["images_per_second"] = round(images / row["seconds"], 3)
    finish("update_speed", {"images": images, "rounds": arguments.rounds, "rows": rows}, draw(rows))
    leave()


def draw(rows: list[dict[str, Any]]) -> Any:
    plt = pyplot()

    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    bars = axes.barh([row["form"] for row in rows], [row["images_per_second"] for row in rows], color="#2f6fdb")
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="images a second through the update", title="The update by fold, stage and checkpointing")
    return figure


if __name__ == "__main__":
    main()
