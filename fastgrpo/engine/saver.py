"""Checkpoints that are written beside the training, by a thread of each rank.

    saver.begin(snapshot)           returns at once, or when the checkpoint before is done
    ...                             the training goes on
    saver.busy, saver.error         how this rank's part is getting on; the caller asks the other ranks about theirs
    saver.give_up()                 where one of them failed

Rank 0 alone knows when a checkpoint is whole: its thread waits for the parts of the others.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from fastgrpo.daemon_pool import DaemonPool
from fastgrpo.engine.checkpoint import GivenUp, Snapshot, complete, write_part
from fastgrpo.engine.checkpoint_folders import discard, is_complete
from fastgrpo.engine.ranks import Ranks

LOOK = 0.05  # seconds between two looks whether rank 0 has completed a checkpoint


class Saver:
    """Writes one snapshot at a time.

    after: called on rank 0, in the thread, with a snapshot whose checkpoint is complete.
    """

    def __init__(self, root: Path, ranks: Ranks, after: Callable[[Snapshot], None]) -> None:
        self.root, self.ranks, self._after = root, ranks, after
        self._pool = DaemonPool(1, "saver")
        self._given_up = threading.Event()
        self._writing: Future[None] | None = None
        self.snapshot: Snapshot | None = None  # that is being written, or was last

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._writing is not None and not self._writing.done()

    @property
    def error(self) -> BaseException | None:
        """What kept this rank from writing the last snapshot."""
        return self._writing.exception() if self._writing is not None and self._writing.done() else None

    def begin(self, snapshot: Snapshot) -> None:
        """Begins to write; the one before must be done."""
        self._given_up.clear()
        self.snapshot, self._writing = snapshot, self._pool.submit(self._write, snapshot, None)

    def give_up(self) -> None:
        """Another rank failed: this rank's thread waits no longer, and rank 0 removes what was written."""
        self._given_up.set()
        self.wait(None)
        if self.ranks.rank == 0 and self.snapshot is not None:
            discard(self.root, self.snapshot.iteration)

    def wait(self, deadline: float | None) -> bool:
        """Whether this rank's thread is done, by a deadline of the monotonic clock."""
        if self._writing is None:
            return True
        try:
            self._writing.exception(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return False
        return True

    def last(self, snapshot: Snapshot, deadline: float) -> None:
        """Writes a snapshot of a run that ends, here and now, and returns when its checkpoint is complete.

        Raises GivenUp where that is not so at the deadline, and OSError where the system refuses to write.
        """
        if not self.wait(deadline):
            raise GivenUp("a checkpoint that was begun is not complete in time")
        if not is_complete(self.root, snapshot.iteration):
            try:
                self._write(snapshot, deadline)
            except OSError:
                if self.ranks.rank == 0:
                    discard(self.root, snapshot.iteration)
                raise

    def _write(self, snapshot: Snapshot, deadline: float | None) -> None:
        def give_up() -> bool:
            return self._given_up.is_set() or deadline is not None and time.monotonic() > deadline

        write_part(snapshot, self.root, self.ranks)
        if self.ranks.rank == 0:
            complete(self.root, snapshot.iteration, self.ranks, give_up)
            self._after(snapshot)
        while deadline is not None and not is_complete(self.root, snapshot.iteration):
            if give_up():
                raise GivenUp(f"rank 0 did not complete the checkpoint of iteration {snapshot.iteration}")
            time.sleep(LOOK)
