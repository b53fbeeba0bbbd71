"""`OneRank` against the process group that it stands in for, and what it says of ranks that are not there."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastgrpo.engine.ranks import OneRank, Ranks, tell_once

CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Ranks]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield Ranks(rank=0, world_size=1, device=CPU)
    dist.destroy_process_group()


def test_one_rank_is_a_group_of_one(group: Ranks) -> None:
    alone = OneRank()
    assert (alone.rank, alone.world_size, alone.device) == (group.rank, group.world_size, group.device)
    tensor = torch.randn(3, 2, requires_grad=True)
    for ranks in (group, alone):
        for result in (ranks.gather(tensor), *(ranks.all_reduce(tensor, op) for op in ("mean", "sum", "min", "max"))):
            assert torch.equal(result, tensor) and not result.requires_grad
            assert result.data_ptr() != tensor.data_ptr()
        assert ranks.broadcast_object({"a": 1}) == {"a": 1}
        ranks.barrier()


def test_together_lets_pass_what_nobody_waits_for(group: Ranks) -> None:
    for ranks in (group, OneRank()):
        with ranks.together(ValueError):
            pass
        for error in (ValueError("expected"), KeyError("another type")):
            with pytest.raises(type(error)) as caught, ranks.together(ValueError):
                raise error
            assert caught.value is error


def test_the_other_ranks_hold_what_this_one_does() -> None:
    ranks, tensor = OneRank(rank=2, world_size=4), torch.tensor([[1.0, 2.0]])
    assert ranks.gather(tensor).tolist() == [[1.0, 2.0]] * 4
    assert ranks.all_reduce(tensor, "sum").tolist() == [[4.0, 8.0]]
    for op in ("mean", "min", "max"):
        assert torch.equal(ranks.all_reduce(tensor, op), tensor)


@pytest.mark.parametrize(("rank", "told"), [(0, True), (1, False)])
def test_what_all_ranks_read_alike_is_told_by_the_first(rank: int, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    try:
        tell_once(rank)
        logging.getLogger("fastgrpo.data.captions").warning("left out")
    finally:
        logging.getLogger("fastgrpo").setLevel(logging.NOTSET)
    assert bool(caplog.records) == told
