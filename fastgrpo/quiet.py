"""Libraries that say less: loading without a dozen progress bars, encoding without a screen of warnings."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Without the loading bars of these libraries, "diffusers" and "transformers"; imports no other."""
    logs = [importlib.import_module(f"{library}.utils.logging") for library in libraries]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in logs:
            log.enable_progress_bar()


@contextmanager
def without_warnings(*libraries: str) -> Iterator[None]:
    """Without the warnings that these libraries, "diffusers" and "transformers", log; their errors are shown."""
    logs = [importlib.import_module(f"{library}.utils.logging") for library in libraries]
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
