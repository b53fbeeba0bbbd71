"""A trainer of the embedded model in this process, with an engine of plain torch; every rank of several is `OneRank`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.ranks import OneRank, Ranks
from fastgrpo.engine.shards import Shard
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config
from support.helpers import ROOT

CONFIG = ROOT / "configs" / "tiny_shapes_grpo.yaml"
GROUPS, SIZE, BATCH, STEPS = 3, 4, 3, 5  # batches of one and a half prompts: groups are split
SMALL = [
    f"rollout.groups={GROUPS}", f"rollout.group_size={SIZE}", f"rollout.batch_size={BATCH}", f"rollout.num_steps={STEPS}",
    "rollout.window={kind: random, size: 2}", "update.steps_per_rollout=1", "model.lora={rank: 4, alpha: 8}",
    "evaluation.batch_size=2", "evaluation.samples=2", "objective.beta=0", "reward.train=support.plain_trainer:brightness",
]  # fmt: skip


def brightness(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    return images.float().mean((1, 2, 3))


class PlainEngine:
    """An engine of plain torch in this process."""

    steps_begun, skipped_steps, loss_scale = 0, 0, None

    def __init__(self, policy: nn.Module, ranks: Ranks, options: EngineOptions) -> None:
        self.policy, self.ranks = policy.to(options.dtype), ranks
        self.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=options.learning_rate)

    def __call__(self, *arguments: Any) -> Tensor:
        return self.policy(*arguments)

    def rollout_policy(self) -> nullcontext:
        return nullcontext(self.policy)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def set_learning_rate(self, learning_rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = learning_rate

    def step(self) -> Tensor:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.zeros(())

    def state(self) -> Shard:
        return Shard({}, {}, {})

    def trained_state(self) -> dict[str, Tensor]:
        return {name: p.detach().float().clone() for name, p in self.trained.items()}

    @contextmanager
    def swapped(self, state: dict[str, Tensor]) -> Iterator[None]:
        saved = {name: p.detach().clone() for name, p in self.trained.items()}
        for chosen in (state, saved):
            with torch.no_grad():
                for name, p in self.trained.items():
                    p.copy_(chosen[name])
            if chosen is state:
                yield


def trainer_of(output: Path, *settings: str, rank: int = 0, ranks: int = 1) -> Trainer:
    """A trainer in this process, of a LoRA that has an effect."""
    config = load_config(CONFIG, [*SMALL, f"output={output}", *settings])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgrpo.trainer.Engine", PlainEngine)
        trainer = Trainer(config, ranks=OneRank(rank, ranks))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.engine.trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return trainer


def networks_of(trainer: Trainer) -> tuple[list[tuple], list[tuple]]:
    """What the network will be given, (x, sigma, rows of the conditioning) a pass: in rollouts, and in updates."""
    in_rollout, in_update = [], []

    def record(module: nn.Module, arguments: tuple) -> None:
        x, sigma, conditioning = arguments
        (in_update if torch.is_grad_enabled() else in_rollout).append((x, sigma, len(conditioning[0])))

    trainer.engine.policy.register_forward_pre_hook(record)
    return in_rollout, in_update
