"""The commands of the console script, one file each: `add_arguments(parser)`, and `run(arguments)` with the exit status."""

import io
import sys

UNAVAILABLE = 75  # exit status of "try again later", by the convention of sysexits.h


def print_anything() -> None:
    """Printing stops no command: where the terminal lacks a script, its characters are shown by number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
