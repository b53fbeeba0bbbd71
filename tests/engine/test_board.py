"""What ranks tell each other without waiting: two processes and the store between them."""

import json
import time
from typing import Any

import pytest
from support.runs import ForkServer

from fastgrpo.engine.board import Board
from fastgrpo.engine.ranks import OneRank

LOST = "rank {} of 2 gives no sign of life for 2 s"


def heard(server: ForkServer, kind: str, status: int = 0) -> dict[int, Any]:
    """By each rank that lives to say it: the class, the words and the exit status of all that it was told."""
    printed = server.run(kind, program="support.board_worker:main", ranks=2, status=status)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert not any(line["hangs"] for line in lines)
    return {line["rank"]: line["heard"] for line in lines}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "words"), [("post", ["error: reward 'x' failed (on rank 1)", 70]), ("post twice", ["first", 70])]
)
def test_a_word_that_one_posts_is_heard_by_the_other(kind: str, words: list, fork_server: ForkServer) -> None:
    """The first of them, once; and not by the one who said it."""
    assert heard(fork_server, kind) == {0: [["EndedElsewhere", *words]], 1: []}


@pytest.mark.processes
def test_silence_is_noticed_and_the_silent_one_hears_of_it_when_it_wakes(fork_server: ForkServer) -> None:
    lost = LOST.format(1)
    assert heard(fork_server, "silence") == {0: [["LostRank", lost, None]], 1: [["EndedElsewhere", f"error: {lost}", 76]]}


@pytest.mark.processes
def test_a_rank_that_leaves_is_not_lost(fork_server: ForkServer) -> None:
    assert heard(fork_server, "leave") == {0: [], 1: []}


@pytest.mark.processes
def test_a_store_that_is_gone_hangs_nobody(fork_server: ForkServer) -> None:
    assert heard(fork_server, "store gone", status=-9) == {1: [["LostRank", LOST.format(0), None]]}


@pytest.mark.processes
def test_a_store_that_does_not_answer_hangs_nobody(fork_server: ForkServer) -> None:
    assert heard(fork_server, "store silent")[1] == [["LostRank", LOST.format(0), None]]


def test_one_rank_has_nobody_to_tell() -> None:
    told: list[Exception] = []
    with Board(OneRank(), 0.1, told.append) as board:
        board.post("error", 1)
    assert told == []


class QuietStore:
    """In which the other rank has never counted."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def add(self, key: str, amount: int) -> int:
        return 0

    def check(self, keys: list[str]) -> bool:
        return False

    def compare_set(self, *_: str) -> bytes:
        return b""


def test_a_rank_that_has_never_given_a_sign_is_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is stopped within its first second."""
    monkeypatch.setattr("fastgrpo.engine.board.BEAT", 0.01)
    monkeypatch.setattr("torch.distributed.TCPStore", QuietStore)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    noted: list[Exception] = []
    with Board(OneRank(rank=0, world_size=2), lost_after=0.1, note=noted.append):
        for _ in range(500):
            time.sleep(0.01)
            if noted:
                break
    assert [str(error) for error in noted] == ["rank 1 of 2 gives no sign of life for 0.1 s"]
