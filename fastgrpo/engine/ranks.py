"""The processes of a run, one for each device, and the talk between them.

    ranks = start()
    mine = samples[ranks.rank :: ranks.world_size]
    scores = ranks.gather(score(mine))          the same on every rank
    finish()

A method or function marked collective must be called by all ranks, in the same order. Importing this file does not
import deepspeed; `load_deepspeed` does, and no other file may.
"""

import functools
import gc
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


@functools.cache
def load_deepspeed() -> ModuleType:
    """DeepSpeed, imported on first use, as it takes seconds and chooses its accelerator there and then."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It calls torch.distributed by names that torch has deprecated, in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*_tensor` is deprecated.*")
    return deepspeed


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them. Made by `start`; see also `OneRank`."""

    rank: int  # number of this process, from 0
    world_size: int  # how many processes there are
    device: torch.device  # of this process

    def gather(self, tensor: Tensor) -> Tensor:
        """Joins the tensors of all ranks, (n, ...) with the same n each, to (W n, ...) in the order of ranks. Collective.

        No gradient flows through it.
        """
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def all_reduce(self, tensor: Tensor, op: Literal["mean", "sum", "min", "max"] = "mean") -> Tensor:
        """Reduces the tensors of all ranks element by element, into a new tensor without gradient. Collective."""
        reduced = tensor.detach().clone()
        kind = dist.ReduceOp.SUM if op == "mean" else getattr(dist.ReduceOp, op.upper())
        dist.all_reduce(reduced, kind)
        return reduced / self.world_size if op == "mean" else reduced

    def broadcast_object(self, value: Any = None) -> Any:
        """Returns rank 0's value on every rank; it is pickled on the way. Collective."""
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    @contextmanager
    def together(self, *kinds: type[Exception]) -> Iterator[None]:
        """Raises on every rank what one of them raised inside, when all have left the block, so that all can save.

        Another rank raises the first of `kinds` that the error is of. Collective on leaving; nothing inside may be
        collective. Exceptions of other kinds pass at once, and the launcher then ends the job.
        """
        own_error = None
        try:
            yield
        except kinds as error:
            own_error = error
        said = None
        if own_error is not None:
            said = next(i for i, kind in enumerate(kinds) if isinstance(own_error, kind)), str(own_error)
        heard: list[tuple[int, str] | None] = [None] * self.world_size
        dist.all_gather_object(heard, said)
        if any(heard):
            rank, (kind, message) = next((rank, one) for rank, one in enumerate(heard) if one)
            raise _shared(own_error or kinds[kind](f"on rank {rank}: {message}"))

    def barrier(self) -> None:
        """Waits until all ranks are here. Collective."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


@dataclass(frozen=True)
class OneRank(Ranks):
    """`Ranks` without a process group: the only process of a run, or in a test one of several.

    Every other rank is taken to hold and to say just what this one does.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor.detach()] * self.world_size)

    def all_reduce(self, tensor: Tensor, op: Literal["mean", "sum", "min", "max"] = "mean") -> Tensor:
        return tensor.detach() * self.world_size if op == "sum" else tensor.detach().clone()

    def broadcast_object(self, value: Any = None) -> Any:
        return value

    @contextmanager
    def together(self, *kinds: type[Exception]) -> Iterator[None]:
        yield

    def barrier(self) -> None:
        pass


def _shared(error: Exception) -> Exception:
    """The error, marked for `is_shared`."""
    vars(error)["is_shared"] = True
    return error


def is_shared(error: BaseException) -> bool:
    """Whether `Ranks.together` raised the error on every rank, so that all of them can still do something collective."""
    return vars(error).get("is_shared", False)


def start() -> Ranks:
    """Joins the processes that the launcher started, or makes a group of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deepspeed = load_deepspeed()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        disable_shm_op(deepspeed)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    tell_once(dist.get_rank())
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)


def tell_once(rank: int) -> None:
    """Leaves the warnings of the project's log to the first rank: what all of them read is alike."""
    logging.getLogger("fastgrpo").setLevel(logging.NOTSET if rank == 0 else logging.ERROR)


def disable_shm_op(deepspeed: ModuleType) -> None:
    """Keeps DeepSpeed from compiling its shared-memory all-reduce, which serves its inference only, at a CPU start.

    That takes ninja, a C++ compiler and a minute, and the lock of a killed build hangs the next start.
    """
    ops = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(ops, dict) and "deepspeed_shm_comm" in ops:
        ops["deepspeed_shm_comm"] = False
    else:
        warnings.warn(
            f"deepspeed {deepspeed.__version__} has no known switch for its shared-memory operation: "
            "it may compile it now, for which it needs ninja and a C++ compiler",
            stacklevel=3,
        )


def finish() -> None:
    """Leaves the group. Close the engines before.

    Do not call it in a `finally`: after an error the other ranks may not come, and the launcher ends them all.
    """
    # A tensor that a thread of gloo frees while the interpreter shuts down aborts the process: free all now.
    gc.collect()
    if dist.is_initialized():
        load_deepspeed().comm.destroy_process_group()
