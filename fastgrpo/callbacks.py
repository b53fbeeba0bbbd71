"""Callbacks, which a run tells what happens while it runs: for a logger, a test, a stop of one's own.

    class Watch(Callback):
        def on_iteration(self, trainer, metrics):
            if trainer.ranks.rank == 0:
                wandb.log(metrics)

Callbacks are called on every rank, in the order in which they were given, after the run's own files are written.
What one raises ends the run, and must be raised on every rank.
"""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from fastgrpo.config.keys import Config
from fastgrpo.config.reading import dump_config
from fastgrpo.engine.ranks import Ranks
from fastgrpo.files import write_atomically
from fastgrpo.guards import Fault
from fastgrpo.inputs import write_inputs
from fastgrpo.parts import Objects, Parts
from fastgrpo.reporting.report import write_report
from fastgrpo.reporting.run_folder import RunFolder, missing_iterations, readable_lines
from fastgrpo.reporting.runlog import RunLog
from fastgrpo.validation import changes_of_run, has_trained

LONGER = 1.05  # by how much a run must have grown for another report
Samples = tuple[Tensor, list[dict]]


class Run(Protocol):
    """The members of a trainer that a callback can rely on; a `fastgrpo.trainer.Trainer` has many more."""

    config: Config
    ranks: Ranks
    objects: Objects  # what was handed in
    parts: Parts  # what it is made of
    iteration: int  # iterations done
    rollout_form: str  # how rollouts are run, for people to read

    @property
    def saved(self) -> int: ...  # the iteration of the last checkpoint


class Callback:
    """Does nothing; a subclass overrides what it wants to hear of."""

    def on_start(self, trainer: Run) -> None:
        """Before the first iteration of `Trainer.run`; `trainer.iteration` are done already in a run that goes on."""

    def on_iteration(self, trainer: Run, metrics: dict) -> None:
        """After an iteration, with its line of metrics.jsonl."""

    def on_fault(self, trainer: Run, fault: Fault) -> None:
        """After numbers that were not finite were found, also where the run then ends; `fault.row()` is of faults.jsonl."""

    def on_evaluation(self, trainer: Run, row: dict, samples: Samples | None) -> None:
        """After an evaluation: its line of evaluations.jsonl; images (n, 3, H, W) uint8 to look at, and their records.

        samples: None where `evaluation.samples` is 0.
        """

    def on_checkpoint(self, trainer: Run, folder: Path) -> None:
        """After a checkpoint and the averaged weights were written into the run's folder."""

    def on_stop(self, trainer: Run, error: BaseException) -> None:
        """Where a run ends early, after its state was saved; the error's notes say what was. Only this rank may be there."""

    def on_end(self, trainer: Run, summary: dict) -> None:
        """After the last iteration, its evaluation and its checkpoint; the summary is empty on all ranks but 0."""


class FolderLog(Callback):
    """Writes a run's own files, on rank 0: see `fastgrpo.reporting.runlog`. Nothing is written outside of `Trainer.run`."""

    def __init__(self) -> None:
        self.log: RunLog | None = None
        self._reported = 0  # the iteration of the last report

    def on_start(self, trainer: Run) -> None:
        if trainer.ranks.rank != 0:
            return
        folder = trainer.config.output
        folder.mkdir(parents=True, exist_ok=True)
        corrected = not has_trained(folder) and changes_of_run(trainer.config)
        write_atomically(RunFolder(folder).config, dump_config(trainer.config, folder))
        trainer.objects.write_prompts(trainer.config, trainer.parts.prompts, trainer.parts.held_out)
        write_inputs(folder, trainer.parts.inputs)
        for change in trainer.parts.changes:
            print(change, flush=True)
        missing = missing_iterations(readable_lines(RunFolder(folder).metrics)[0], range(1, trainer.iteration + 1))
        if missing:
            print(f"warning: {RunFolder(folder).metrics} has no line of {missing}: their numbers are lost", flush=True)
        # The first evaluation of a run that trained nothing is not that of the corrected one.
        self.log = RunLog(folder, -1 if corrected else trainer.iteration)
        print(f"rollout: {trainer.rollout_form}", flush=True)

    def on_iteration(self, trainer: Run, metrics: dict) -> None:
        if self.log:
            self.log.metrics(metrics)

    def on_fault(self, trainer: Run, fault: Fault) -> None:
        if self.log:
            self.log.fault(fault.row())

    def on_evaluation(self, trainer: Run, row: dict, samples: Samples | None) -> None:
        if self.log:
            if samples is not None:
                self.log.samples(row["iteration"], *samples)
            self.log.evaluation(row)  # last: where it has a line, an evaluation is not done again

    def on_checkpoint(self, trainer: Run, folder: Path) -> None:
        # A report costs as much as the run is long: one at every checkpoint would make a long run ever slower.
        if self.log and trainer.iteration >= LONGER * self._reported:
            self._reported = trainer.iteration
            with self.log.may_fail("the report"):
                write_report(folder)

    def on_stop(self, trainer: Run, error: BaseException) -> None:
        if self.log:
            self.log.close()
            write_report(trainer.config.output)

    def on_end(self, trainer: Run, summary: dict) -> None:
        if self.log:
            self.log.summary(summary)
            self.log.close()
            write_report(trainer.config.output)
