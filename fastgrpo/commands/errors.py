"""Errors as a command shows them: one line and a status where a user was refused, a traceback where the code is at fault.

status = shown(run, arguments)
"""

import dis
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastgrpo.commands import UNAVAILABLE
from fastgrpo.config.schema import ConfigError
from fastgrpo.text_files import one_line

PACKAGE = Path(__file__).resolve().parent.parent
Arguments = TypeVar("Arguments")


def shown(run: Callable[[Arguments], int], arguments: Arguments) -> int:
    """Runs a command; returns its exit status, 2 where something was refused, 130 after Ctrl-C."""
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, ArithmeticError, OSError) as error:  # ArithmeticError: `fastgrpo.finite.NotFinite`
        if not is_refusal(error):
            raise
        notes = getattr(error, "__notes__", [])  # what a run saved before it ended
        print(f"error: {one_line('; '.join([str(error), *notes]))}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from fastgrpo.rewards import RewardUnavailable

        if not isinstance(error, RewardUnavailable):
            raise
        print(f"stopped: {one_line(str(error))}", file=sys.stderr)
        return UNAVAILABLE


def is_refusal(error: Exception) -> bool:
    """Whether its words are for a user: a ConfigError, or what a `raise` statement of this package made.

    What Python, a library or a user's own function raises is a fault of code, and is understood only by its traceback.
    """
    if isinstance(error, ConfigError):
        return True
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    own = PACKAGE in Path(code.co_filename).resolve().parents
    return own and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
