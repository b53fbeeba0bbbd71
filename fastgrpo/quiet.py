"""Loading without a dozen progress bars."""

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
