"""A service among slow, greedy and vanishing clients: what it takes in is bounded, and honest ones are served meanwhile."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from support.reward_service import example, fingerprint, remote, service, serving
from support.sockets import connect, drip, post, rest

from fastgrpo.rewards.serving.limits import Limits
from fastgrpo.rewards.serving.service import Service
from fastgrpo.rewards.serving.wire import pack

LONG = 10_000  # bytes that nobody sends to the end at the pace of `drip`


def wait_until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def score(url: str, body: bytes, **options: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/score", content=body, timeout=60, trust_env=False, **options)


def gauge(url: str, name: str) -> int:
    text = httpx2.get(f"{url}/metrics", timeout=60, trust_env=False).text
    return int(text.split(f"\nfastgrpo_reward_{name} ")[1].split("\n")[0])


class Held:
    """A service whose reward does not go on before it is let."""

    def __init__(self, **limits: Any) -> None:
        self.go_on, self.began = threading.Event(), threading.Event()
        self.service: Service = replace(service(**limits), reward=self.reward)

    def reward(self, images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        self.began.set()
        assert self.go_on.wait(60)
        return fingerprint(images, prompts, metadata)


def test_slow_and_idle_clients_are_cut_and_others_served_meanwhile() -> None:
    one = service(token="secret", head_seconds=0.5, body_seconds=0.5, idle_seconds=1)
    headers = {"Authorization": "Bearer secret"}
    head, key = post(LONG)[:-4], "Authorization: Bearer secret"
    with serving(one) as url, ThreadPoolExecutor(5) as pool:
        slow = {
            "silent": (b"", b""),
            "head": (b"", head + b"\r\nX: " + b"x" * LONG),
            "second head": (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", head + b"\r\nX: " + b"x" * LONG),
            "body": (post(LONG, key), bytes(LONG)),
            "refused body": (post(LONG), bytes(LONG)),
        }
        connections = {name: connect(url) for name in slow}
        for name, (first, then) in slow.items():
            connections[name].sendall(first)
            pool.submit(drip, connections[name], then)
        assert score(url, pack(*example(1, 0)), headers=headers).status_code == 200
        said = {name: rest(connection) for name, connection in connections.items()}
        for connection in connections.values():
            connection.close()
        assert score(url, pack(*example(1, 0)), headers=headers).status_code == 200
    assert said["silent"] == said["head"] == b""
    assert said["second head"].startswith(b"HTTP/1.1 200 ") and said["second head"].count(b"HTTP/1.1") == 1
    assert said["body"].startswith(b"HTTP/1.1 408 ") and b"bytes came in 0.5 s" in said["body"]
    assert said["refused body"].startswith(b"HTTP/1.1 401 ")


def test_a_connection_is_kept_between_requests_and_closed_when_it_stays_silent() -> None:
    with serving(service(head_seconds=0.5, idle_seconds=1)) as url, connect(url) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            said = b""
            while not said.endswith(b"}"):
                said += connection.recv(1 << 16)
            assert said.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.7)  # longer than a head may take, which has not begun
        assert rest(connection) == b""


def test_one_connection_too_many_is_closed_at_once() -> None:
    with serving(service(max_connections=2)) as url:
        with connect(url) as first, connect(url):
            with connect(url) as third:
                assert rest(third) == b""
            first.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert rest(first).startswith(b"HTTP/1.1 200 ")
            wait_until(lambda: httpx2.get(f"{url}/health", trust_env=False).status_code == 200)


def test_who_finds_no_room_hears_it_before_his_body_is_read_and_comes_again() -> None:
    held, asked = Held(max_waiting=1), example(2, 3)
    with serving(held.service) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(score, url, pack(*asked))
        held.began.wait(60)
        with connect(url) as connection:
            connection.sendall(post(LONG, "Connection: close"))
            said = rest(connection)
        assert said.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in said
        assert b"1 requests wait already: at most 1" in said
        client = remote(url, retries=50)
        second = pool.submit(client, *asked)
        wait_until(lambda: held.service.counts["status_503"] >= 2)
        held.go_on.set()
        assert first.result().status_code == 200
        assert torch.equal(second.result(), fingerprint(*asked))
        assert gauge(url, "waiting") == gauge(url, "waiting_bytes") == 0


@pytest.mark.parametrize("announced", [True, False])
def test_bytes_that_wait_are_bounded_whether_or_not_they_are_announced(announced: bool) -> None:
    """Room for two of the largest requests: the third one is told so, by its length or while it is read."""
    body = pack(*example(16, 0, side=36))
    held = Held(max_waiting_bytes=2 * (1 << 21))
    most = held.service.limits.body_bytes - 1
    with serving(held.service) as url, ExitStack() as stack:
        waiting = [stack.enter_context(connect(url)) for _ in range(3)]
        for connection in waiting:
            connection.sendall(post(most))
        wait_until(lambda: gauge(url, "waiting") == 3)
        assert gauge(url, "waiting_bytes") == 3 * most
        stream = iter([bytes(1 << 16)] * (most >> 16))
        answer = score(url, bytes(most)) if announced else score(url, stream)  # type: ignore[arg-type]
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert "bytes wait already: at most 4194304" in answer.json()["detail"]
        stack.close()
        wait_until(lambda: gauge(url, "waiting") == 0)
        held.go_on.set()
        assert score(url, body).status_code == 200


def test_what_images_take_when_they_are_unpacked_counts_too() -> None:
    images = torch.zeros(1, 3, 140, 140, dtype=torch.uint8)  # 58,800 bytes, and as a PNG 300
    body = pack(images, ["a"], [{"bonus": 0}], "png")
    held = Held()
    with serving(held.service) as url, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(score, url, body)
        held.began.wait(60)
        assert gauge(url, "waiting_bytes") == len(body) + images.numel()
        held.go_on.set()
        assert answer.result().status_code == 200


def test_a_request_whose_client_has_left_is_not_scored() -> None:
    held, body = Held(), pack(*example(1, 0))
    with serving(held.service) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(score, url, body)
        held.began.wait(60)
        with connect(url) as connection:
            connection.sendall(post(body))
            wait_until(lambda: gauge(url, "waiting") == 2)
        wait_until(lambda: gauge(url, "waiting") == 1)
        held.go_on.set()
        assert first.result().status_code == 200 and score(url, body).status_code == 200
    assert held.service.counts["images"] == 2 and held.service.counts["status_499"] == 1


def test_many_large_requests_at_once_take_no_more_memory_than_allowed() -> None:
    """32 of 8 MB, of which 20 MB may be there."""
    images = torch.zeros(1, 3, 1664, 1664, dtype=torch.uint8)
    body = pack(images, ["a"], [{"bonus": 0}])
    held = Held(max_images=1, max_bytes=images.numel(), max_waiting_bytes=20 << 20)

    def ask(url: str) -> bytes:
        with connect(url) as connection:
            connection.sendall(post(len(body)))
            connection.sendall(body)
            return connection.recv(13)

    with serving(held.service) as url, ThreadPoolExecutor(32) as pool:
        before = resident()
        answers = [pool.submit(ask, url) for _ in range(32)]
        peak = 0
        while sum(answer.done() for answer in answers) < 30:
            peak = max(peak, resident())
            time.sleep(0.002)
        held.go_on.set()
        statuses = [answer.result() for answer in answers]
    assert statuses.count(b"HTTP/1.1 200 ") == 2 and statuses.count(b"HTTP/1.1 503 ") == 30
    assert peak - before < 100 << 20


def test_what_those_who_left_had_sent_is_forgotten_before_its_turn_comes() -> None:
    """A client that gives up and comes again must not fill the memory of a server that is busy."""
    images = torch.zeros(1, 3, 1664, 1664, dtype=torch.uint8)
    body = pack(images, ["a"], [{"bonus": 0}])
    held = Held(max_images=1, max_bytes=images.numel(), max_waiting_bytes=20 << 20)
    with serving(held.service) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(score, url, body)
        held.began.wait(60)
        before = resident()
        for _ in range(16):
            with connect(url) as connection:
                connection.sendall(post(len(body)))
                connection.sendall(body)
                wait_until(lambda: gauge(url, "waiting_bytes") == 2 * len(body))
            wait_until(lambda: gauge(url, "waiting_bytes") == len(body))
        assert resident() - before < 64 << 20
        held.go_on.set()
        assert first.result().status_code == 200


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_service_whose_scoring_has_ended_says_so() -> None:
    class Broken(defaultdict):
        def __setitem__(self, key: str, value: float) -> None:
            if key == "batches":
                raise RuntimeError("no more")
            super().__setitem__(key, value)

    one = replace(service(body_seconds=1), counts=Broken(int))
    with serving(one) as url:
        assert httpx2.get(f"{url}/health", trust_env=False).status_code == 200
        with connect(url) as connection:
            connection.sendall(post(pack(*example(1, 0))))
            wait_until(lambda: httpx2.get(f"{url}/health", trust_env=False).status_code == 503)
        answer = score(url, pack(*example(1, 0)))
        assert answer.status_code == 503 and "the scoring has ended" in answer.json()["detail"]


def test_limits_that_no_request_could_keep_are_refused() -> None:
    with pytest.raises(ValueError, match="^max_waiting_bytes = 1000: a request of max_bytes = 65536 can take"):
        Limits(max_bytes=1 << 16, max_waiting_bytes=1000)
