"""What a run keeps of itself: a copy in memory after every iteration, checkpoints of it, and the weights that it hands out.

    saving.keep(iteration, seconds)     the copy, each rank its part
    saving.begin()                      a checkpoint of it, written beside the training
    saving.settle()                     between iterations, collective: what has become of it
    saving.last(deadline)               however the run ends: the newest copy, without the other ranks' help

The device holds the weights of the last whole iteration only until the next update begins. So it is the copy that is
saved, at whatever moment a run ends. A checkpoint that the system refuses to write is owed: the next copy is tried again.
"""

import errno
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from fastgrpo.config.keys import Config
from fastgrpo.engine.checkpoint import GivenUp, Snapshot, load
from fastgrpo.engine.checkpoint_folders import is_complete, prune
from fastgrpo.engine.ranks import Ranks
from fastgrpo.engine.saver import Saver
from fastgrpo.engine.zero import Engine
from fastgrpo.learning.ema import Ema
from fastgrpo.policy import Model
from fastgrpo.reporting.run_folder import RunFolder, best_iteration, readable_lines
from fastgrpo.trained_files import keep_trained, write_trained

EMA = "ema"  # the average that is evaluated and handed out


class Saving:
    """averages: by the names under which a checkpoint holds them; `ema` is the one that is handed out."""

    def __init__(self, config: Config, ranks: Ranks, engine: Engine, model: Model, averages: Mapping[str, Ema]) -> None:
        self.config, self.ranks, self.engine, self.model, self.averages = config, ranks, engine, model, averages
        self.folder = RunFolder(config.output)
        self.newest: Snapshot | None = None
        self.saved = 0  # the iteration of the last complete checkpoint
        self.owed = False  # whether one could not be written
        self.saver = Saver(
            self.folder.checkpoints, ranks, lambda done: self._hand_out(done.iteration, done.averages, write_trained)
        )
        self._unsettled = False  # whether a checkpoint was begun of which the ranks have not agreed how it went

    def resume(self) -> tuple[int, float]:
        """Loads the last whole checkpoint; the iterations done and the seconds they took, 0 if there is none. Collective."""
        saved = load(self.folder.checkpoints, self.ranks)
        if saved is None:
            return 0, 0.0
        self.engine.load_state(saved.shards)
        for name, average in self.averages.items():
            weights = {key: saved.averages[f"{name}/{key}"] for key in average.weights}
            average.load_state_dict({"updates": saved.state["updates"][name], "weights": weights})
        self.saved = saved.iteration
        if self.ranks.rank == 0:
            self._hand_out(saved.iteration, saved.averages, keep_trained)
        return self.saved, saved.state["seconds"]

    def keep(self, iteration: int, seconds: float) -> None:
        """Copies this rank's part of the state to the host."""
        averages: dict[str, Tensor] = {}
        if self.ranks.rank == 0:
            for name, average in self.averages.items():
                averages |= {f"{name}/{key}": value.to("cpu", copy=True) for key, value in average.weights.items()}
        # Prompts and noise follow from the iteration, so there is no other position or random state to keep.
        updates = {name: average.updates for name, average in self.averages.items()}
        self.newest = Snapshot(iteration, self.engine.state(), averages, {"seconds": seconds, "updates": updates})

    def begin(self) -> None:
        """Begins a checkpoint of the newest copy; the one before must be settled."""
        assert self.newest is not None and not self._unsettled, "keep and settle come first"
        self.saver.begin(self.newest)
        self._unsettled = True
        if not self.config.checkpoint.in_memory:
            self.newest = None

    def settle(self, wait: bool = False) -> bool:
        """Whether a checkpoint was completed since the last call, as all ranks see it. Collective.

        Where a rank could not write its part nothing of it is left, it is said why, and the checkpoint is owed. wait: for
        the checkpoint that is being written.
        """
        if not self._unsettled:
            return False
        if wait and self.ranks.world_size == 1:
            self.saver.wait(None)
        while True:
            failed, busy = self._agreed(self.saver.error is not None, self.saver.busy)
            if failed or not busy or not wait:
                break
            time.sleep(0.02)
        if busy and not failed:
            return False
        self._unsettled, snapshot = False, self.saver.snapshot
        assert snapshot is not None
        if not failed:
            self.saved, self.owed = snapshot.iteration, False
            return True
        self.saver.give_up()
        error, self.owed = self.saver.error, True
        if not isinstance(error, OSError | GivenUp | None):
            raise error
        if isinstance(error, OSError):
            tqdm.write(f"warning: the state after iteration {snapshot.iteration} is not saved: {error}; it is tried again")
        return False

    @property
    def failure(self) -> Exception:
        """Why the last checkpoint is not there."""
        error = self.saver.error
        if isinstance(error, OSError):
            return error
        return OSError(errno.EIO, "another rank could not write", str(self.folder.path))

    def last(self, deadline: float) -> None:
        """Saves the newest copy if it is not saved; raises as `Saver.last`. From any thread, and without the other ranks."""
        begun = self.saver.snapshot if self._unsettled else None
        if self.saver.wait(deadline) and begun is not None and is_complete(self.folder.checkpoints, begun.iteration):
            self.saved = begun.iteration
        if self.newest is not None and self.newest.iteration > self.saved:
            self.saver.last(self.newest, deadline)
            self.saved = self.newest.iteration

    def _agreed(self, *flags: bool) -> list[bool]:
        """Which of the flags are up on any rank."""
        if self.ranks.world_size == 1:
            return list(flags)
        return self.ranks.all_reduce(torch.tensor(flags, dtype=torch.int32, device=self.ranks.device), "max").bool().tolist()

    def _hand_out(self, iteration: int, averages: Mapping[str, Tensor], write: Callable[..., None]) -> None:
        """On rank 0, of a complete checkpoint: the averaged weights, and no more checkpoints than are asked for.

        write: `write_trained`, or `keep_trained` where a run that was killed may have written them.
        """
        weights = _trained(averages)
        write(self.model, self.config.output, iteration, weights)
        best = self._best_until(iteration) if self.config.checkpoint.keep_best else None
        if best == iteration:
            write(self.model, self.folder.best, best, weights)
        prune(self.folder.checkpoints, self.config.checkpoint.keep, but=() if best is None else (best,))

    def _best_until(self, iteration: int) -> int | None:
        """Later evaluations are of weights that no checkpoint has yet."""
        rows = readable_lines(self.folder.evaluations)[0]
        return best_iteration([row for row in rows if row["iteration"] <= iteration])


def _trained(averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights to hand out, by the names of the transformer's parameters."""
    prefix = f"{EMA}/transformer."
    return {name.removeprefix(prefix): value for name, value in averages.items() if name.startswith(prefix)}
