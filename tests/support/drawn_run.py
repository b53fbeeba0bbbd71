"""The folder of a run of two ranks with everything in it that `fastgrpo verify` looks at, without a training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.config.reading import dump_config
from fastgrpo.data.prompts import given_prompts, write_prompts
from fastgrpo.engine.checkpoint import Snapshot, complete, write_part
from fastgrpo.engine.ranks import OneRank
from fastgrpo.engine.shards import Shard
from fastgrpo.files import json_text
from fastgrpo.inputs import prompts_hash, write_inputs
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.trained_files import write_trained
from fastgrpo.validation import load_config
from support.helpers import ROOT

PAIR = [OneRank(rank=rank, world_size=2) for rank in range(2)]
PROMPTS = {"train": ["a red circle", {"prompt": "two blue squares", "tag": "counting"}], "eval": ["a green triangle"]}


def save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "weights.safetensors")


MODEL: Any = SimpleNamespace(save_trained=save_weights)


def draw_run(folder: Path) -> Path:
    """After four iterations, of which the second was evaluated best."""
    run = RunFolder(folder)
    run.samples.mkdir(parents=True)
    overrides = [f"output={folder}", f"prompts.train={folder}/prompts_train.jsonl", "iterations=4"]
    config = load_config(ROOT / "configs" / "tiny_shapes.yaml", overrides)
    run.config.write_text(dump_config(config, folder))
    inputs = {}
    for section, prompts in PROMPTS.items():
        read = given_prompts(prompts)
        write_prompts(run.given_prompts(section), read.metadata)
        inputs[f"prompts.{section}"] = prompts_hash(read)
    write_inputs(folder, inputs)
    for iteration in (2, 4):
        save_checkpoint(run.checkpoints, iteration)
    write_trained(MODEL, folder, 4, {"w": torch.full((2,), 4.0)})
    run.best.mkdir()
    write_trained(MODEL, run.best, 2, {"w": torch.full((2,), 2.0)})
    scores = {0: 0.1, 2: 0.9, 4: 0.5}
    run.metrics.write_text("".join(json_text({"iteration": i}) + "\n" for i in (1, 2, 3, 4)))
    rows = ({"iteration": i, "accuracy": {"overall": score}} for i, score in scores.items())
    run.evaluations.write_text("".join(json_text(row) + "\n" for row in rows))
    run.faults.write_text('{"iteration": 1}\n')
    run.summary.write_text("{}")
    run.prompts.write_text("[]")
    return folder


def save_checkpoint(root: Path, iteration: int) -> Path:
    """By two ranks, one after the other."""
    for rank in PAIR:
        half = torch.full((2,), float(iteration))
        shard = Shard({"master/w": half}, {"master/w": 2 * rank.rank}, {"steps": iteration})
        averages = {"ema/w": half} if rank.rank == 0 else {}
        write_part(Snapshot(iteration, shard, averages, {"seconds": 1.5}), root, rank)
    return complete(root, iteration, PAIR[0], lambda: True)
