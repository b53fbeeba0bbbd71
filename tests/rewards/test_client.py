"""Addresses are checked before they are asked, and this machine never through a proxy."""

import json

import pytest
import torch
from support.web import answering, says

from fastgrpo.rewards import RewardUnavailable
from fastgrpo.rewards.client import Client, checked_url, is_loopback, is_this_machine
from fastgrpo.rewards.judge import VLMJudge
from fastgrpo.rewards.serving.remote import Remote

CPU = torch.device("cpu")
IMAGES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
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
    assert is_this_machine(host) and is_loopback(host) == (host != "0.0.0.0")
    for other in ("10.0.0.2", "example.org", "localhost.example.org", ""):
        assert not is_this_machine(other) and not is_loopback(other)


def test_this_machine_is_asked_past_every_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def proxy(path: str) -> tuple[int, bytes]:
        asked.append(path)
        return 502, b"the proxy"

    answer = json.dumps({"choices": [{"message": {"content": "Final Score: 5"}}]}).encode()
    with answering(proxy) as other, answering(says(scores=answer)) as judge, answering(says()) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, other)
            monkeypatch.setenv(name.upper(), other)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for url in (judge, judge.replace("127.0.0.1", "localhost")):
            assert VLMJudge(CPU, url=url, model="a", retries=0)(IMAGES, ["a", "b"], [{}, {}]).tolist() == [0.5, 0.5]
        assert Remote(device=CPU, urls=[server], retries=0)(IMAGES, ["a", "b"], [{}, {}]).tolist() == [0.25, 0.5]
        assert not asked
        assert Client("http://example.invalid", timeout=5).request("GET", "http://example.invalid/x").status == 502
        assert asked == ["http://example.invalid/x"], "others go through the proxy that the environment names"


def test_a_judge_that_is_gone_is_unavailable() -> None:
    with answering(says(scores=b"busy", status=503)) as server:
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
