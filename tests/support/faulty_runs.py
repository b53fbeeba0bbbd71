"""Runs with numbers that go wrong at a known place, as `python -m fastgrpo` otherwise: the first argument says which.

infinite_loss    the first update of the second iteration, on rank 0 alone; its gradient is finite
lost_velocity    one of the samples of the second iteration
infinite_weight  after the second iteration's updates
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from fastgrpo import trainer
from fastgrpo.commands.cli import main as fastgrpo
from fastgrpo.engine.zero import Engine
from fastgrpo.learning import update

calls = [0]


def infinite_loss() -> None:
    """Each iteration has 2 updates of 2 batches of 2 steps, over the ranks."""
    original = update.transition_loss

    def transition_loss(*arguments: Any) -> Any:
        calls[0] += 1
        loss = original(*arguments)
        bad = calls[0] == 8 // dist.get_world_size() + 1 and dist.get_rank() == 0
        return loss._replace(loss=loss.loss + math.inf) if bad else loss

    update.transition_loss = transition_loss


def lost_velocity() -> None:
    """Each iteration has 4 batches."""
    original = trainer.captured_or_eager

    def captured_or_eager(*arguments: Any) -> Any:
        run, form = original(*arguments)

        def rollout(*arguments: Any) -> Any:
            calls[0] += 1
            result = run(*arguments)
            if calls[0] == 6:
                result.v_old[0, 1] = math.nan
            return result

        return rollout, form

    trainer.captured_or_eager = captured_or_eager


def infinite_weight() -> None:
    original = Engine.step

    def step(self: Engine) -> Any:
        norm = original(self)
        if self.steps_begun == 4:
            trained = next(p for p in self.deepspeed.module.parameters() if p.requires_grad)
            trained.data.view(-1)[0] = math.inf
        return norm

    Engine.step = step


def main(arguments: Sequence[str]) -> int:
    faults: dict[str, Callable[[], None]] = {one.__name__: one for one in (infinite_loss, lost_velocity, infinite_weight)}
    faults[arguments[0]]()
    return fastgrpo(list(arguments[1:]))
