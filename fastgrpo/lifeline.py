"""What ends a run early: on this rank or on another, in its own thread or, where that cannot, in another.

    lifeline = Lifeline(config, ranks, saving)
    with lifeline.watched(release=..., tell=...):
        ...
        lifeline.stop_if_asked()        between two phases: raises what has come

Whatever leaves the block as an exception, the newest copy of the state is saved first; its notes say so. The other ranks are
told, and do the same. `fastgrpo.endings` has what is said and the exit status of each kind.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from fastgrpo.config.keys import Config
from fastgrpo.endings import Ending, ending_of, is_broken_link, said, tells
from fastgrpo.engine.board import Board
from fastgrpo.engine.ranks import Ranks
from fastgrpo.saving import Saving
from fastgrpo.stopping import LostRank, Stopped, Watch

HEARSAY = 3.0  # seconds in which the board tells of a rank to which the link broke


class Lifeline:
    """Of one rank."""

    def __init__(self, config: Config, ranks: Ranks, saving: Saving) -> None:
        self.config, self.ranks, self.saving = config, ranks, saving
        self.watch = Watch(config.checkpoint.grace, self._end_in_its_place)
        self._is_ending = threading.Lock()

    @contextmanager
    def watched(self, *, release: Callable[[], None], tell: Callable[[BaseException], None]) -> Iterator[None]:
        """Inside, every ending saves.

        release: gives the run's folder free, where the process is ended in place of its own thread. tell: called with the
        error after the state was saved, where it was the run's own thread that ended it.
        """
        self._release = release
        self.board = Board(self.ranks, self.config.engine.lost_after, self.watch.note)
        with self.watch, self.board:
            try:
                yield
            except BaseException as error:
                cause = self._cause_of(error)
                with self._is_ending:  # the other thread would end the process inside
                    self.watch.ending()
                    self._save(cause)
                    tell(cause)
                if cause is error:
                    raise
                raise cause from error

    def stop_if_asked(self, within: bool = False) -> None:
        """Raises on every rank what came to one of them and ends the run. Collective, if not `within` a phase.

        Within a phase a rank cannot wait for the others: there a signal stops only a single process. When another rank is
        gone no rank can go on, wherever it is.
        """
        if self.ranks.world_size > 1 and (self.watch.cause is None or self.watch.number):
            if within:
                return
            noted = torch.tensor([self.watch.number], device=self.ranks.device)
            number = int(self.ranks.all_reduce(noted, "max"))
            if number:
                self.watch.note(Stopped(number))
        self.watch.check()

    def _cause_of(self, error: BaseException) -> BaseException:
        """What an error comes from: where the talk with the other ranks broke off, of what happened to them."""
        if isinstance(error, SystemExit):
            return RuntimeError(f"sys.exit({error.code!r}) was called in a run that is not finished")
        if not is_broken_link(error):
            return error
        self.watch.wait(HEARSAY)
        return self.watch.cause or LostRank(f"the link to another rank broke: {str(error).splitlines()[0]}")

    def _save(self, cause: BaseException) -> None:
        """Tells the other ranks and saves; says in the error's notes what is saved."""
        ending = ending_of(cause)
        if ending is None:
            self.board.post(f"error: on rank {self.ranks.rank}: {type(cause).__name__}: {cause}", 1)
        else:
            self.board.post(f"{ending.words} (on rank {self.ranks.rank})", ending.status)
        self.board.leave()
        # A second before the end, to say what was saved. Without a signal the other ranks have as long as a silent one has.
        asked, grace, lost_after = isinstance(cause, Stopped), self.config.checkpoint.grace, self.config.engine.lost_after
        deadline = self.watch.came + grace - 1 if asked else time.monotonic() + lost_after
        try:
            self.saving.last(deadline)
        except Exception as second:
            cause.add_note(f"what is newer could not be saved: {second}")
        saved = self.saving.saved
        cause.add_note(f"the state after iteration {saved} is saved" if saved else "nothing is saved yet")

    def _end_in_its_place(self, cause: Exception) -> None:
        """In another thread, where that of the run waits for what may never come: saves, and ends the process."""
        with self._is_ending:
            self._save(cause)
            ending = ending_of(cause) or Ending(1, f"error: {cause}")
            with suppress(Exception):
                if tells(cause, self.ranks.rank):
                    print(said(ending, cause), file=sys.stderr, flush=True)
                self._release()
            os._exit(ending.status)
