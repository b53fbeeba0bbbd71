"""Addresses are checked before they are asked, this machine never through a proxy, and bad servers are passed by."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from fastgrpo.rewards import RewardError, RewardSum, RewardUnavailable
from fastgrpo.rewards.client import checked_url, is_loopback, make_client
from fastgrpo.rewards.judge import VLMJudge
from fastgrpo.rewards.serving.remote import Remote

CPU = torch.device("cpu")
IMAGES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
HEALTH = {"reward": "a", "version": "1", "low": 0.0, "high": None, "max_images": 8, "max_bytes": 4096}
GOOD = {"scores": [0.25, 0.5], "reward": "a", "version": "1"}
Answer = Callable[[str], tuple[int, bytes]]  # path -> status and body


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def says(health: Any = HEALTH, scores: Any = GOOD, status: int = 200) -> Answer:
    def answer(path: str) -> tuple[int, bytes]:
        said = health if path.endswith("/health") else scores
        return (200 if path.endswith("/health") else status), said if isinstance(said, bytes) else json.dumps(said).encode()

    return answer


URLS = [
    ("localhost:9000", "write http://localhost:9000"),
    ("10.0.0.2", "write http://10.0.0.2"),
    ("//10.0.0.2:80", "write http://10.0.0.2:80"),
    ("ftp://10.0.0.2", "write http://10.0.0.2"),
    ("http:/10.0.0.2", "begins with http://"),
    ("", "write one such as http://127.0.0.1:8000"),
    ("http://", "no valid host and port"),
    ("http://:8000", "no valid host and port"),
    ("http://host:port", "is no address"),
    ("http://host:70000", "is no address"),
    ("http://host:0", "no valid host and port"),
    ("http://a host:80", "no valid host and port"),
    ("http://host:80\n", "no valid host and port"),
    ("http://[::1:80", "is no address"),
    ("http://host:80/?a=1", "ends in ? or #"),
]


@pytest.mark.parametrize(("url", "fix"), URLS)
def test_what_is_no_address_is_refused_at_once_with_the_fix(url: str, fix: str) -> None:
    with pytest.raises(ValueError) as error:
        checked_url(url, "some.key")
    assert str(error.value).startswith(f"some.key = {url!r}: ") and fix in str(error.value)
    with pytest.raises(ValueError, match=r"^reward\.settings\.remote\.urls\[1\] = "):
        Remote(device=CPU, urls=["http://127.0.0.1:9", url], retries=9, pause=9.0)
    with pytest.raises(ValueError, match=r"^reward\.settings\.vlm_judge\.url = "):
        VLMJudge(CPU, url=url, model="a")


def test_addresses_are_taken_as_they_are() -> None:
    for url in ("http://127.0.0.1:8000", "https://example.org/v1", "http://[::1]:8000", "HTTP://A-b.example"):
        assert checked_url(url, "k") == checked_url(f"{url}/", "k") == url


@pytest.mark.parametrize(
    "host", ["localhost", "a.localhost", "127.0.0.1", "127.8.9.1", "::1", "0.0.0.0", "::ffff:127.0.0.1"]
)
def test_this_machine_is_known_by_all_its_names(host: str) -> None:
    assert is_loopback(host) and not any(map(is_loopback, ("10.0.0.2", "example.org", "localhost.example.org", "")))


def test_this_machine_is_asked_past_every_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def proxy(path: str) -> tuple[int, bytes]:
        asked.append(path)
        return 502, b"the proxy"

    answer = json.dumps({"choices": [{"message": {"content": "Final Score: 5"}}]}).encode()
    with serving(proxy) as other, serving(says(scores=answer)) as judge, serving(says()) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, other)
            monkeypatch.setenv(name.upper(), other)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for url in (judge, judge.replace("127.0.0.1", "localhost")):
            assert VLMJudge(CPU, url=url, model="a", retries=0)(IMAGES, ["a", "b"], [{}, {}]).tolist() == [0.5, 0.5]
        assert Remote(device=CPU, urls=[server], retries=0)(IMAGES, ["a", "b"], [{}, {}]).tolist() == [0.25, 0.5]
        assert not asked
        assert make_client("http://example.invalid", timeout=5).get("http://example.invalid/x").status_code == 502
        assert asked == ["http://example.invalid/x"], "others go through the proxy that the environment names"


BAD = {
    "a failure": says(scores=b"x", status=503),
    "no JSON": says(scores=b"<html>"),
    "a list": says(scores=[0.1, 0.2]),
    "another version": says(scores={**GOOD, "version": "2"}),
    "without scores": says(scores={"version": "1"}),
    "too few": says(scores={**GOOD, "scores": [0.1]}),
    "texts": says(scores={**GOOD, "scores": ["0.1", "0.2"]}),
    "not a number": says(scores=b'{"version": "1", "scores": [NaN, 0.1]}'),
    "out of range": says(scores={**GOOD, "scores": [-1.0, 0.1]}),
    "a redirect": says(scores=b"", status=302),
    "too deep": says(scores=b"[" * 100_000),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_server_that_answers_badly_is_passed_by(bad: Answer) -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(serving(one)) for one in (bad, says()))
        client = Remote(device=CPU, urls=[first, second], retries=0)
        for _ in range(2):  # each of them is asked first once
            assert client(IMAGES, ["a", "b"], [{}, {}]).tolist() == [0.25, 0.5]
        client.urls = [first]
        with pytest.raises(RewardUnavailable, match="no reward server answered in 1 rounds"):
            client(IMAGES, ["a", "b"], [{}, {}])


@pytest.mark.parametrize(
    "health", [b"hello", {"status": "fine"}, {**HEALTH, "max_images": 0}, {**HEALTH, "low": "0"}, [HEALTH]]
)
def test_what_is_no_reward_server_is_passed_by(health: Any) -> None:
    with serving(says(health=health)) as other, serving(says()) as server:
        assert Remote(device=CPU, urls=[other, server], retries=0).version == "1"
        with pytest.raises(RewardUnavailable, match="what is no"):
            Remote(device=CPU, urls=[other], retries=0)


def test_a_request_that_is_at_fault_is_an_error_and_no_reason_to_wait() -> None:
    with serving(says(scores=b"these images?", status=422)) as server:
        client = Remote(device=CPU, urls=[server], retries=9, pause=9.0)
        one = RewardSum(rewards={"remote": client}, weights={"remote": 1.0})
        with pytest.raises(RewardError, match=r"reward 'remote' failed: .* refused with 422: these images\?") as error:
            one(IMAGES, ["a", "b"], [{}, {}])
        assert not isinstance(error.value, RewardUnavailable)


def test_a_judge_that_is_gone_is_unavailable() -> None:
    with serving(says(scores=b"busy", status=503)) as server:
        judge = VLMJudge(CPU, url=server, model="a", retries=0)
        with pytest.raises(RewardUnavailable, match="no score in 1 tries for the prompt 'a'; the last: status 503"):
            judge(IMAGES[:1], ["a"], [{}])


def test_what_a_request_cannot_carry_is_found_before() -> None:
    for record in ({"a": float("nan")}, {"a": {1, 2}}, {"a": b"x"}, {"a": "\ud800"}):
        with pytest.raises(ValueError, match="which cannot say this prompt's record"):
            Remote.check(["a"], [record])
    Remote.check(["é"], [{"a": [1, None, {"b": "\U0001f600"}]}])
    with pytest.raises(ValueError, match="surrogates not allowed"):
        VLMJudge.check(["a \udc00"], [{}])


@pytest.mark.parametrize("token", ["two words", "line\n", "s\u00e9cret", "sec\0ret"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="no header can carry") as refusal:
        make_client("http://127.0.0.1:9", token=token, timeout=1)
    assert token not in str(refusal.value)
