"""How a run ends that does not come to its end: for each kind its exit status, what is said, and what to do.

The page Reliability of the docs has the table of statuses. Those from 64 to 78 are those of sysexits.h.
"""

import os
from dataclasses import dataclass

import torch

from fastgrpo.config.schema import ConfigError
from fastgrpo.engine.board import LOST
from fastgrpo.engine.ranks import is_shared
from fastgrpo.finite import Diverged
from fastgrpo.rewards.calling import RewardError, RewardUnavailable
from fastgrpo.stopping import EndedElsewhere, LostRank, Stopped
from fastgrpo.text_files import one_line

AGAIN = "the same command goes on"


@dataclass(frozen=True)
class Ending:
    """What a user is told, and the exit status."""

    status: int
    words: str
    advice: str = AGAIN


def ending_of(error: BaseException) -> Ending | None:
    """None for a fault of code, which only its traceback explains."""
    if isinstance(error, Stopped):
        return Ending(128 + error.number, f"stopped {error}")
    if isinstance(error, EndedElsewhere):
        return Ending(error.status, str(error))
    if isinstance(error, LostRank) or is_broken_link(error):
        return Ending(LOST, f"error: {error}", f"look at that rank's messages; {AGAIN}")
    if isinstance(error, RewardUnavailable):
        return Ending(os.EX_TEMPFAIL, f"stopped: {error}", f"when the reward is there again, {AGAIN}")
    if isinstance(error, RewardError):
        return Ending(os.EX_SOFTWARE, f"error: {error}", f"when the reward is mended, {AGAIN}")
    if isinstance(error, Diverged):
        advice = f"{AGAIN}, best with a smaller learning rate: --set update.learning_rate=..."
        return Ending(os.EX_DATAERR, f"error: {error}", advice)
    if isinstance(error, torch.OutOfMemoryError):
        advice = f"if another process took the memory, {AGAIN}; else set update.gradient_checkpointing, or smaller batches"
        return Ending(os.EX_OSERR, f"error: {str(error).splitlines()[0]}", advice)
    if isinstance(error, ConfigError):
        return Ending(2, f"error: {error}", "")
    if isinstance(error, OSError):
        return Ending(os.EX_IOERR, f"error: {error}", f"when that is mended, {AGAIN}")
    return None


def said(ending: Ending, error: BaseException) -> str:
    """One line: what happened, what is saved, what to do."""
    notes = getattr(error, "__notes__", ["nothing was begun"])
    return one_line("; ".join(part for part in (ending.words, *notes, ending.advice) if part))


def tells(error: BaseException, rank: int) -> bool:
    """Whether this rank says it: what all ranks know of is said by the first."""
    return rank == 0 or not (is_shared(error) or isinstance(error, Stopped | EndedElsewhere))


def is_broken_link(error: BaseException) -> bool:
    """Whether the talk with other ranks broke off: gloo's errors have no class of their own."""
    return isinstance(error, torch.distributed.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)
