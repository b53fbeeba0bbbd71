"""A child of test_sizes: a run over several sizes, and for each iteration one at its size alone; prints a line of JSON.

`main` takes the family's name, the folder of its pipeline, one for what the runs write, and the sizes as JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.engine.ranks import Ranks, finish, start
from fastgrpo.trainer import Trainer
from support.model_worker import configuration

KEYS = ("height", "width", "num_frames")
SMALL = [
    "rollout.group_size=4", "rollout.batch_size=4", "rollout.num_steps=3", "evaluation.samples=0", "objective.beta=0.1",
    "update.learning_rate=1e-30", "update.steps_per_rollout=2",
]  # fmt: skip


def iterations(config: Any, numbers: Sequence[int], ranks: Ranks) -> dict[int, dict]:
    """The rows of these iterations, without what the clock says and the weights' own change, which has no bits left."""
    trainer = Trainer(config, ranks=ranks)
    rows = {number: trainer.iterate(number) for number in numbers}
    trainer.close()
    return {
        n: {key: value for key, value in row.items() if key not in ("seconds", "weight_change")} for n, row in rows.items()
    }


def main(arguments: Sequence[str]) -> None:
    name, folder, output = arguments[0], Path(arguments[1]), Path(arguments[2])
    sizes = [{key: side for key, side in zip(KEYS, size, strict=True) if side} for size in json.loads(arguments[3])]
    ranks = start()
    mixed = configuration(name, folder, output / "mixed", *SMALL, f"rollout.sizes={json.dumps(sizes)}")
    rows = list(iterations(mixed, range(1, 5), ranks).values())
    alone: dict[int, dict] = {}
    for number, size in enumerate(sizes):
        own = [f"model.{key}={side}" for key, side in size.items()]
        numbers = [row["iteration"] for row in rows if {key: row[key] for key in size} == size]
        single = configuration(name, folder, output / str(number), *SMALL, *own)
        alone |= {n: row | {"size": size} for n, row in iterations(single, numbers, ranks).items()}
    distinct = len({tuple(row["size"].values()) for row in alone.values()})
    print(json.dumps({"rows": rows, "alone": [alone[n] for n in range(1, 5)], "sizes": distinct}))
    finish()
