"""A child of test_models: trains one family's tiny pipeline in one process and prints the rewards as one line of JSON.

`main` takes the family's name, the folder of its pipeline, and one for what the runs write.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fastgrpo.engine.zero import finish, start
from fastgrpo.testing import load_family
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config

ITERATIONS = 8


def redness(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """Red above the mean of green and blue, 0 to 1."""
    red, green, blue = images.float().div(255).mean(dim=(2, 3)).T
    return (red - (green + blue) / 2 + 1) / 2


def frames_seen(videos: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """The number of frames and a pixel of the last one: whether a reward sees whole clips."""
    return torch.full((len(videos),), float(videos.shape[1])) + videos[:, -1, 0, 0, 0]


def write_prompts(path: Path, prompts: list[Any]) -> str:
    records = [{"prompt": p} if isinstance(p, str) else {"prompt": p.text, "image": str(p.image)} for p in prompts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def configuration(name: str, folder: Path, output: Path, *overrides: str) -> Any:
    family = load_family(name)
    prompts = list(family.prompts)
    held_out = [p + " at night" if isinstance(p, str) else p._replace(text=p.text + " at night") for p in prompts]
    output.mkdir(parents=True, exist_ok=True)
    config = {
        "output": str(output), "iterations": ITERATIONS,
        "model": {"name": name, "path": str(folder), "lora": {"rank": 8, "alpha": 16}, **family.settings},
        "prompts": {"train": write_prompts(output / "train.jsonl", prompts),
                    "eval": write_prompts(output / "eval.jsonl", held_out)},
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


def rewards(config: Any, iterations: int, device: torch.device) -> tuple[list[float], float, float]:
    """The mean of each iteration, their spread within a group at first, and the largest |first ratio - 1|."""
    trainer = Trainer(config, 1, device)
    rows = [trainer.iterate(i) for i in range(1, iterations + 1)]
    trainer.engine.close()
    return [row["reward"] for row in rows], rows[0]["reward_std"], max(row["first_ratio_deviation"] for row in rows)


def whole_run(config: Any, device: torch.device, stop_after: int | None = None) -> list[float]:
    """`Trainer.run`, or its first iterations and the checkpoint there, as a killed run leaves them."""
    from fastgrpo.reporting.runlog import RunLog, read_lines

    trainer = Trainer(config, 1, device)
    if stop_after is None:
        trainer.run()
    else:
        trainer.log = RunLog(config.output, 0)
        trainer.evaluate(0, config.evaluation.images, base=True)
        for i in range(1, stop_after + 1):
            trainer.log.metrics(trainer.iterate(i))
        trainer._save(stop_after, 0.0)
        trainer.log.close()
    trainer.engine.close()
    return [row["reward"] for row in read_lines(config.output / "metrics.jsonl")]


def main(arguments: Sequence[str]) -> None:
    name, folder, output = arguments[0], Path(arguments[1]), Path(arguments[2])
    device, result = start(), {}
    for form in ("lora", "full"):
        settings = [f"model.train={form}", f"update.learning_rate={'3e-2' if form == 'lora' else '3e-3'}"]
        config = configuration(name, folder, output / form, *settings)
        found, spread, deviation = rewards(config, ITERATIONS, device)
        checkpointed = configuration(name, folder, output / f"{form}_ckpt", *settings, "update.gradient_checkpointing=true")
        again, *_ = rewards(checkpointed, 2, device)
        result[form] = {
            "rewards": found, "spread": spread, "first_ratio_deviation": deviation, "checkpointed": again
        }  # fmt: skip
        if form == "lora":
            stopped = configuration(name, folder, output / "stopped", *settings)
            whole_run(stopped, device, stop_after=4)
            result[form]["resumed"] = whole_run(stopped, device)
    _, _, result["bfloat16"] = rewards(configuration(name, folder, output / "bf16", "model.dtype=bfloat16"), 1, device)
    print(json.dumps(result))
    finish()
