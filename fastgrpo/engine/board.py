"""What the ranks of a run tell each other at any moment, without waiting for each other: that they live, and that one ends.

    with Board(ranks, lost_after=120, note=watch.note) as board:
        board.post("error: reward 'x' failed", status=70)       the others' `note` gets EndedElsewhere

A collective tells nothing before all ranks have come. So when one has failed alone, or hangs, the others would wait for the
time-out of the process group, half an hour, and would lose what they hold. The board lies in the store by which the ranks
found each other. Every rank counts up a number there, and looks at that of the next rank: where it stands still for
`lost_after` seconds, or where the store itself does not answer for so long, a rank is lost, and all are told.

One thread talks with the store and another counts the seconds of silence, as torch waits without end for the answer of a
machine that is silent. A process that was itself stopped counts no seconds meanwhile.
"""

import itertools
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from fastgrpo.engine.ranks import Ranks
from fastgrpo.stopping import EndedElsewhere, LostRank

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 2.0  # seconds in which a word is posted, or is not
GONE = 1 << 40  # what a rank adds when it leaves the board: it is not lost
LOST = 76  # the exit status where a rank is lost (EX_PROTOCOL of sysexits.h)
TROUBLE = (RuntimeError, ValueError)  # what torch raises where the store is gone or slow
_runs = itertools.count()  # of this process: each has a board of its own, and all ranks begin them in the same order


class Board:
    """Of one run. With one rank there is nobody to tell.

    Where the environment does not say where the store is, as for a group that was made from a file, ranks hear of each other
    by the time-out of the group alone.
    """

    def __init__(self, ranks: Ranks, lost_after: float, note: Callable[[Exception], None]) -> None:
        self.ranks, self.lost_after, self._note = ranks, lost_after, note
        self._key = f"fastgrpo/{next(_runs)}"
        self._over = threading.Event()
        self._other = (ranks.rank + 1) % ranks.world_size
        self._count: int | None = None  # of the other rank, as the store last said
        self._store: dist.TCPStore | None = None
        self._is_silent = ranks.world_size == 1 or "MASTER_ADDR" not in os.environ  # there is nobody to tell, or all is said

    def __enter__(self) -> "Board":
        if not self._is_silent:
            self._store = self._connect()
            for work in (self._talk, self._watch):
                threading.Thread(target=work, name="board", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Looks no more, and is not looked for."""
        self._over.set()

    def post(self, words: str, status: int) -> None:
        """Tells the others that this rank ends the run; the first to say so is heard."""
        if self._is_silent:
            return
        self._is_silent = True
        said = json.dumps({"rank": self.ranks.rank, "words": words, "status": status})

        def post() -> None:
            with suppress(*TROUBLE):  # nobody could read it
                self._connect().compare_set(f"{self._key}/ends", "", said)

        # Where the store is gone torch would try to reach it for as long as a rank may be silent.
        posting = threading.Thread(target=post, name="post", daemon=True)
        posting.start()
        posting.join(PATIENCE)

    def _connect(self) -> dist.TCPStore:
        """A connection of its own: one that waits for an answer cannot be used meanwhile."""
        place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(
            place, port, is_master=False, timeout=timedelta(seconds=self.lost_after), wait_for_workers=False
        )

    def _talk(self) -> None:
        while not self._over.wait(BEAT):
            self._count, heard = self._look(self._other)
            if heard is not None:
                self._note(heard)
                self.leave()
        self._add(self.ranks.rank, GONE)

    def _watch(self) -> None:
        seen, silent = -1, 0.0
        while not self._over.wait(BEAT):
            count = self._count
            if count is not None and count != seen:
                seen, silent = count, 0.0
            elif seen < GONE and (silent := silent + BEAT) > self.lost_after:
                who = f"rank {self._other} of {self.ranks.world_size}"
                lost = LostRank(f"{who} gives no sign of life for {self.lost_after:g} s")
                self.post(f"error: {lost}", LOST)
                self._note(lost)
                self.leave()

    def _look(self, other: int) -> tuple[int | None, EndedElsewhere | None]:
        """The count of another rank, and what one said that ends the run. None for what cannot be known."""
        self._add(self.ranks.rank, 1)
        count = self._add(other, 0)
        ends = f"{self._key}/ends"
        try:
            said = json.loads(self._store.get(ends)) if self._store and self._store.check([ends]) else None
        except TROUBLE:
            said = None
        if said is None or said["rank"] == self.ranks.rank:
            return count, None
        return count, EndedElsewhere(said["words"], said["status"])

    def _add(self, rank: int, amount: int) -> int | None:
        """To the number of a rank; the sum, or None where the store does not answer."""
        try:
            return None if self._store is None else self._store.add(f"{self._key}/beat/{rank}", amount)
        except TROUBLE:
            self._store = None  # it never answers again, and would print a trace each time
            return None
