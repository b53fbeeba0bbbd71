"""A child of test_objective_runs: trains a tiny pipeline with several objectives in one process; prints lines of JSON.

python tests/support/objective_worker.py FOLDER OUTPUT NAME...
"""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from fastgrpo.engine.ranks import Ranks, finish, start
from fastgrpo.trainer import Trainer
from support.model_worker import configuration

ODE = ["rollout.sampler=ode", "forward.num_timesteps=2", "forward.range=[0, 3]"]
OFFLINE = [*ODE, "objective.offline=true"]
RUNS = {
    "clip": [],
    "guard": ["objective.name=guard", "objective.clip_range=1e-4"],
    "dppo": ["objective.name=dppo", "update.inner_epochs=2", "objective.settings={delta: 1e-3}"],
    "nft": [*ODE, "objective.name=nft", "forward.old_policy={limit: 0.5, rate: 0.1}"],
    "awm": [*ODE, "objective.name=awm", "objective.clip_range=1"],
    "dpo": [*ODE, "objective.name=dpo", "advantage.keep=8"],
    "keep": ["advantage={keep: 4, std: group}", "rollout.batch_size=8"],
    "sft": [*ODE, "objective.name=sft"],
    "sft offline": [*OFFLINE, "objective.name=sft", "objective.settings={advantage: none}"],
    "dpo offline": [*OFFLINE, "objective.name=dpo"],
}
ITERATIONS = 8


def train(config: Any, ranks: Ranks, iterations: int) -> dict[str, Any]:
    trainer = Trainer(config, ranks=ranks)
    before = trainer.engine.trained_state()
    rows = [trainer.iterate(i) for i in range(1, iterations + 1)]
    after = trainer.engine.trained_state()
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    lag = None
    if trainer.updater.old is not None:
        lag = max((after[name] - old).abs().max().item() for name, old in trainer.updater.old.weights.items())
    trainer.close()
    return {"rows": rows, "moved": moved, "lag": lag}


def data(folder: Path, size: int, pairs: bool) -> Path:
    """Red images to learn; with pairs, each beside the blue one that is worse."""
    folder.mkdir(parents=True)
    colours = {"chosen" if pairs else "target": (230, 20, 20), **({"rejected": (20, 20, 230)} if pairs else {})}
    for name, colour in colours.items():
        Image.new("RGB", (size + 8, size), colour).save(folder / f"{name}.png")
    lines = [json.dumps({"prompt": f"thing {i}", **{name: f"{name}.png" for name in colours}}) for i in range(5)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = start()
    for name in sys.argv[3:]:
        settings = ["update.learning_rate=3e-2", *RUNS[name]]
        if "offline" in name:
            settings.append(f"prompts.train={data(output / name / 'data', 32, pairs='dpo' in name)}")
        config = configuration("sd3", folder, output / name, *settings)
        print(json.dumps({"name": name, **train(config, ranks, ITERATIONS)}), flush=True)
    finish()


if __name__ == "__main__":
    main()
