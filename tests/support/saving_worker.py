"""A training run whose saving is watched, or disturbed, for `support.runs.ForkServer`.

    support.saving_worker:main  SETTINGS  the arguments of `fastgrpo train`

SETTINGS is JSON, and each of them may be left out:

slow      true: no checkpoint is written before the last one is about to be begun. Each rank prints what happened in order
scores    the overall score of the evaluation after each iteration, from the base on
kill      an iteration: SIGKILL between its checkpoint and the weights that are handed out
prompts   prompts that are handed in as objects, with `held_out`
"""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from fastgrpo import saving
from fastgrpo.callbacks import Callback
from fastgrpo.commands import train
from fastgrpo.engine import saver
from fastgrpo.evaluation import Evaluator
from fastgrpo.trainer import Trainer

TIMEOUT = 60  # seconds after which a training that waits for the disk is seen


def watch_slow_saving() -> list[str]:
    """Patches the writing of checkpoints; returns the list of what happens."""
    events: list[str] = []
    begun = threading.Event()
    write_part, begin_to_save, iterate = saver.write_part, Trainer.begin_to_save, Trainer.iterate

    def slow(snapshot: Any, *arguments: Any) -> None:
        if not begun.wait(TIMEOUT):
            raise RuntimeError("the training waits for the disk")
        events.append(f"write {snapshot.iteration}")
        write_part(snapshot, *arguments)

    def begin(self: Trainer) -> None:
        events.append(f"begin {self.iteration}")
        if self.iteration == self.config.iterations:
            begun.set()
        begin_to_save(self)

    def noted(self: Trainer, iteration: int) -> dict:
        events.append(f"iterate {iteration}")
        return iterate(self, iteration)

    saver.write_part, Trainer.begin_to_save, Trainer.iterate = slow, begin, noted
    return events


def give_scores(scores: list[float]) -> None:
    evaluate = Trainer.evaluate
    now = [0]

    def noted(self: Trainer, iteration: int | None = None, images: int | None = None) -> dict:
        now[0] = self.iteration if iteration is None else iteration
        return evaluate(self, iteration, images)

    def accuracy(self: Evaluator, *_: Any) -> dict:
        return {"accuracy": {"overall": scores[now[0]]}, "images": 6, "percent": [], "categories": {}}

    Trainer.evaluate, Evaluator.accuracy = noted, accuracy


def kill(iteration: int) -> None:
    write_trained = saving.write_trained

    def killed(model: Any, folder: Path, now: int, weights: Any) -> None:
        if now == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        write_trained(model, folder, now, weights)

    saving.write_trained = killed


class Told(Callback):
    """Notes the checkpoints that it hears of."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        self.events.append(f"told {trainer.saved}")


def main(arguments: list[str]) -> int:
    settings, *options = json.loads(arguments[0]), *arguments[1:]
    events: list[str] = watch_slow_saving() if "slow" in settings else []
    if "scores" in settings:
        give_scores(settings["scores"])
    if "kill" in settings:
        kill(settings["kill"])
    objects = {name: settings[name] for name in ("prompts", "held_out") if name in settings}
    original = Trainer.__init__

    def handed_in(self: Trainer, config: Any, **named: Any) -> None:
        original(self, config, **named, **objects, callbacks=[Told(events)])

    Trainer.__init__ = handed_in
    status = train.main(options)
    print(f"\nrank {os.environ['RANK']}: {'; '.join(events)}", flush=True)
    return status
