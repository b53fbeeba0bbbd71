"""Set-up shared by all tests. Without a GPU the Triton kernels run in the interpreter, on CPU tensors."""

import multiprocessing.process
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from support.helpers import DEVICE
from support.runs import ForkServer
from support.tiny_model import load_tiny_model, load_tuned_model

from fastgrpo.interpreter import use_interpreter

POISONED = ("kernels", "learning", "sampling")  # folders of tests

if not torch.cuda.is_available():
    use_interpreter()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only files that have the mark are read: others may import what a GPU machine does not have."""
    unmarked = collection_path.suffix == ".py" and "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8")
    return True if config.option.markexpr == "gpu" and unmarked else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files whose tests start processes come first: they take long, and none should be what all wait for at the end."""
    long = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in long)


def refuse(*args: object, **kwargs: object) -> None:
    """What stands in for the start of a child process where a test does not say that it starts one."""
    pytest.fail("this test starts a process: give it the mark `processes`, so that `make check` can leave it out")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test has what its marks say, and so have its fixtures.

    Only `gpu` sees a GPU: the others are on the CPU wherever they run. Only `processes` can start a child process, and
    a test on a GPU, where Triton starts compilers.
    """
    marks = {mark.name for mark in item.iter_markers()}
    with ExitStack() as stack:
        if "gpu" not in marks:
            stack.enter_context(mock.patch("torch.cuda.is_available", return_value=False))
        if "processes" not in marks and not (DEVICE == "cuda" and "gpu" in marks):
            stack.enter_context(mock.patch.object(subprocess.Popen, "__init__", refuse))
            stack.enter_context(mock.patch.object(multiprocessing.process.BaseProcess, "start", refuse))
        return (yield)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like return NaN, so that what was never written cannot pass."""
    if request.path.parent.name not in POISONED:
        return

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args, **kwargs) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(scope="session")
def tiny_model():
    """For tests that only look at it."""
    return load_tiny_model()


@pytest.fixture(scope="session")
def device_model():
    """The same on the GPU, where there is one."""
    return load_tiny_model(DEVICE)


@pytest.fixture
def tuned_model():
    """One of a test's own."""
    return load_tuned_model()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """For runs that need not be a process of their own from the start."""
    with ForkServer() as server:
        yield server
