"""A child of test_models: trains one family's tiny pipeline in one process and prints the rewards as one line of JSON.

`main` takes the family's name, the folder of its pipeline, and one for what the runs write.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastgrpo.callbacks import Callback
from fastgrpo.engine.ranks import Ranks, finish, start
from fastgrpo.reporting.run_folder import read_lines
from fastgrpo.testing import load_family
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config

ITERATIONS = 8


def redness(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """Red above the mean of green and blue, 0 to 1."""
    red, green, blue = images.float().div(255).mean(dim=(2, 3)).T
    return (red - (green + blue) / 2 + 1) / 2


def frames_seen(videos: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """The number of frames T of whole clips (B, T, 3, H, W), plus the first number of the last frame."""
    return torch.full((len(videos),), float(videos.shape[1])) + videos[:, -1, 0, 0, 0]


def write_prompts(path: Path, prompts: list[Any]) -> str:
    records = [
        {"prompt": p} if isinstance(p, str) else {"prompt": p.text, "image": [str(file) for file in p.images]}
        for p in prompts
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def configuration(name: str, folder: Path, output: Path, *overrides: str) -> Any:
    family = load_family(name)
    prompts = list(family.prompts)
    held_out = [p + " at night" if isinstance(p, str) else p._replace(text=p.text + " at night") for p in prompts]
    output.mkdir(parents=True, exist_ok=True)
    config = {
        "output": str(output), "iterations": ITERATIONS,
        "model": {"name": family.model, "path": str(folder), "lora": {"rank": 8, "alpha": 16}, **family.settings},
        "prompts": {"train": write_prompts(output / "train.jsonl", prompts),
                    "eval": write_prompts(output / "eval.jsonl", held_out), "images_outside": True},
        "reward": {"train": "support.model_worker:redness", "eval": "support.model_worker:redness"},
        "rollout": {"num_steps": 4, "noise_level": 0.8, "sampler": "cps", "groups": 2, "group_size": 16, "batch_size": 16,
                    "window": {"kind": "fixed", "start": 0, "size": 2}},
        "objective": {"beta": 0.0, "clip_range": 1e-2}, "update": {"learning_rate": 3e-3},
        "evaluation": {"every": 0, "images": 2, "batch_size": 2, "samples": 2, "num_steps": 2},
        "checkpoint": {"every": 4},
    }  # fmt: skip
    path = output / "config_in.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_config(path, overrides)


def rewards(config: Any, iterations: int, ranks: Ranks) -> tuple[list[float], float, float]:
    """The mean of each iteration, their spread within a group at first, and the largest |first ratio - 1|."""
    trainer = Trainer(config, ranks=ranks)
    rows = [trainer.iterate(i) for i in range(1, iterations + 1)]
    trainer.close()
    return [row["reward"] for row in rows], rows[0]["reward_std"], max(row["first_ratio_deviation"] for row in rows)


class Killed(Exception):
    pass


class KilledAtCheckpoint(Callback):
    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        raise Killed


def whole_run(config: Any, ranks: Ranks, killed: bool = False) -> list[float]:
    """The rewards of `Trainer.run`, which may be killed right after its first checkpoint."""
    trainer = Trainer(config, ranks=ranks, callbacks=[KilledAtCheckpoint()] if killed else [])
    with pytest.raises(Killed) if killed else nullcontext():
        trainer.run()
    trainer.close()
    return [row["reward"] for row in read_lines(config.output / "metrics.jsonl")]


def main(arguments: Sequence[str]) -> None:
    name, folder, output = arguments[0], Path(arguments[1]), Path(arguments[2])
    ranks, result = start(), {}
    for form in ("lora", "full"):
        settings = [f"model.train={form}", f"update.learning_rate={'3e-2' if form == 'lora' else '3e-3'}"]
        config = configuration(name, folder, output / form, *settings)
        found, spread, deviation = rewards(config, ITERATIONS, ranks)
        checkpointed = configuration(name, folder, output / f"{form}_ckpt", *settings, "update.gradient_checkpointing=true")
        again, *_ = rewards(checkpointed, 2, ranks)
        result[form] = {
            "rewards": found, "spread": spread, "first_ratio_deviation": deviation, "checkpointed": again
        }  # fmt: skip
        if form == "lora":
            stopped = configuration(name, folder, output / "stopped", *settings)
            whole_run(stopped, ranks, killed=True)
            result[form]["resumed"] = whole_run(stopped, ranks)
    _, _, result["bfloat16"] = rewards(configuration(name, folder, output / "bf16", "model.dtype=bfloat16"), 1, ranks)
    print(json.dumps(result))
    finish()
