"""The client of reward services among servers that are slow, hostile, busy or of another opinion."""

import gzip
import json
import socket
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme
from cryptography.hazmat.primitives import serialization
from support.reward_service import CPU, example, fingerprint, remote, service, serving
from support.sockets import Talk, drip, raw_server
from support.web import GOOD, HEALTH, Answer, answering, says

from fastgrpo.rewards import RewardError, RewardUnavailable, retry
from fastgrpo.rewards.client import MOST_BYTES, Client, NoAnswer, token_from
from fastgrpo.rewards.serving import server
from fastgrpo.rewards.serving.remote import Remote

IMAGES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
ASKED = (IMAGES, ["a", "b"], [{}, {}])
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"


def talkative(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b" " * (1 << 16))


def after_request(data: bytes) -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        drip(connection, data)

    return talk


NEVER = {
    "says nothing": lambda connection: time.sleep(60),
    "a head of one byte at a time": after_request(HEAD + b"X: " + b"x" * 10_000),
    "a body of one byte at a time": after_request(HEAD + b"\r\n" + b" " * 10_000),
    "headers without end": after_request(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000),
}


@pytest.mark.parametrize("talk", NEVER.values(), ids=NEVER)
def test_one_deadline_holds_for_the_whole_answer(talk: Talk) -> None:
    """Each of these would go on for minutes, and none is silent for longer than the deadline but the first."""
    with raw_server(talk) as url:
        client, began = Client(url, timeout=0.5), time.monotonic()
        with pytest.raises(NoAnswer, match=r"^no whole answer in 0.5 s$"):
            client.request("GET", url)
        assert time.monotonic() - began < 30


def test_it_holds_for_what_is_sent_too() -> None:
    with raw_server(lambda connection: time.sleep(60)) as url:
        with pytest.raises(NoAnswer, match="no whole answer in 0.5 s"):
            Client(url, timeout=0.5).request("POST", url, content=bytes(16 << 20))


def test_an_answer_is_bounded_also_after_it_was_unpacked() -> None:
    with raw_server(talkative) as url, pytest.raises(NoAnswer, match=f"more than {MOST_BYTES} bytes"):
        Client(url, timeout=60).request("GET", url)
    bomb = gzip.compress(bytes(MOST_BYTES + 1))
    assert len(bomb) < 10_000
    with answering(lambda path: (200, bomb, {"Content-Encoding": "gzip"})) as url:
        with pytest.raises(NoAnswer, match=f"more than {MOST_BYTES} bytes"):
            Client(url, timeout=60).request("GET", url)


BAD = {
    "no JSON": says(scores=b"<html>"),
    "a list": says(scores=[0.1, 0.2]),
    "another version": says(scores={**GOOD, "version": "2"}),
    "without scores": says(scores={"version": "1"}),
    "too few": says(scores={**GOOD, "scores": [0.1]}),
    "texts": says(scores={**GOOD, "scores": ["0.1", "0.2"]}),
    "not a number": says(scores=b'{"version": "1", "scores": [NaN, 0.1]}'),
    "infinite": says(scores=b'{"version": "1", "scores": [1e400, 0.1]}'),
    "huge": says(scores=b'{"version": "1", "scores": [1%s, 0.1]}' % (b"0" * 400)),
    "hugest": says(scores=b'{"version": "1", "scores": [1%s, 0.1]}' % (b"0" * 9000)),
    "out of range": says(scores={**GOOD, "scores": [-1.0, 0.1]}),
    "too deep": says(scores=b"[" * 100_000),
    "no UTF-8": says(scores=b'{"version": "\xff"}'),
    "bad gzip": lambda path: (*says()(path), {"Content-Encoding": "gzip"} if path == "/score" else {}),
    "400 of a proxy": says(scores=b"Bad Request", status=400),
    "413 of a proxy": says(scores={"error": "too large"}, status=413),
} | {
    str(status): says(scores={"detail": "no"}, status=status)
    for status in (201, 204, 301, 302, 307, 403, 404, 405, 408, 425, 429, 500, 502, 503, 504)
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_server_that_answers_badly_is_passed_by(bad: Answer) -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(answering(one)) for one in (bad, says()))
        client = Remote(device=CPU, urls=[first, second], retries=0)
        for _ in range(2):  # each of them is asked first once
            assert client(*ASKED).tolist() == [0.25, 0.5]
        client.urls = [first]
        with pytest.raises(RewardUnavailable, match="no reward server answered in 1 rounds"):
            client(*ASKED)


NO_HEALTH = [
    b"hello", {"status": "fine"}, {**HEALTH, "max_images": 0}, {**HEALTH, "low": "0"}, [HEALTH], {**HEALTH, "high": 10**400},
    json.dumps({**HEALTH, "low": float("nan")}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("health", NO_HEALTH)
def test_what_is_no_reward_server_is_passed_by(health: Any) -> None:
    with answering(says(health=health)) as other, answering(says()) as url:
        assert Remote(device=CPU, urls=[other, url], retries=0).version == "1"
        with pytest.raises(RewardUnavailable, match="what is no"):
            Remote(device=CPU, urls=[other], retries=0)


@pytest.mark.parametrize("status", [400, 401, 413, 422])
def test_a_request_that_all_refuse_is_an_error_at_once_and_one_that_one_takes_is_scored(status: int) -> None:
    asked: Counter[str] = Counter()

    def refusing(path: str) -> tuple:
        asked[path] += 1
        return says(scores={"detail": "these images?"}, status=status)(path)

    with ExitStack() as stack:
        first, second, good = (stack.enter_context(answering(one)) for one in (refusing, refusing, says()))
        client = Remote(device=CPU, urls=[first, second, good], retries=9, pause=9.0)
        for _ in range(3):
            assert client(*ASKED).tolist() == [0.25, 0.5]
        client.urls = [first, second, "http://127.0.0.1:9"]  # where nobody is
        asked.clear()
        with pytest.raises(ValueError, match=f"{second} refused with {status}: .*these images") as error:
            client(*ASKED)
    assert asked["/score"] == 2, "each of them once"
    assert first in str(error.value) and not isinstance(error.value, RewardError)
    assert ("reward.settings.remote.token_env names" in str(error.value)) == (status == 401)


@pytest.mark.parametrize(
    ("said", "least", "most"), [("7", 7, 10.5), ("9999", 30, 45), ("-1", 0, 0.1), ("Wed, 21 Oct 2026 07:28:00 GMT", 0, 0.1)]
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says_within_reason(
    status: int, said: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, waits = Counter[str](), []

    def busy_once(path: str) -> tuple:
        times[path] += 1
        if path == "/score" and times[path] == 1:
            return status, b"busy", {"Retry-After": said}
        return says()(path)

    monkeypatch.setattr(retry.time, "sleep", waits.append)
    with answering(busy_once) as url:
        assert Remote(device=CPU, urls=[url], pause=0.01)(*ASKED).tolist() == [0.25, 0.5]
    assert len(waits) == 1 and least <= waits[0] <= most


def test_all_tries_together_end_too() -> None:
    def talk(connection: socket.socket) -> None:
        body = json.dumps(HEALTH).encode() if b"/health" in connection.recv(1 << 16) else b""
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (len(body) or 1) + body)
        if not body:
            time.sleep(60)

    with raw_server(talk) as first, raw_server(talk) as second:
        client = Remote(device=CPU, urls=[first, second], timeout=0.4, total_timeout=1.0, retries=1000, pause=0.01)
        began = time.monotonic()
        with pytest.raises(RewardUnavailable, match=r"in \d rounds: .*no whole answer in 0\."):
            client(*ASKED)
        assert time.monotonic() - began < 30


def test_a_token_that_no_header_can_carry_is_refused_and_none_is_ever_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("not-to-be-seen\n", "not to be seen", "nöt-to-be-seen", "\x00"):
        monkeypatch.setattr("os.environ", {"TOKEN": token})
        with pytest.raises(ValueError, match="^some.key = 'TOKEN': this environment variable holds what no header") as error:
            token_from("TOKEN", "some.key")
        assert "be-seen" not in str(error.value) and "be seen" not in str(error.value)
    with pytest.raises(ValueError, match=r"^reward\.settings\.remote\.urls\[0\]: has an @") as error:
        Remote(device=CPU, urls=["http://me:not-to-be-seen@127.0.0.1:9"])
    assert "not-to-be-seen" not in str(error.value)


def test_a_wrong_token_is_an_error_that_names_the_setting_and_not_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "not-to-be-seen")
    with serving(service(token="another-one")) as url:
        client = remote(url, token_env="TOKEN", retries=9, pause=9.0)
        with pytest.raises(ValueError, match="refused with 401: .*wrong or missing token.*remote.token_env") as error:
            client(*example(1, 0))
        assert "not-to-be-seen" not in repr(error.value) + repr(vars(client)) and "another-one" not in str(error.value)


@pytest.fixture
def tls(tmp_path: Path) -> tuple[str, str, str]:
    """A certificate of this machine, its key, and the authority that signed it: files."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    files = [str(tmp_path / name) for name in ("certificate.pem", "key.pem", "authority.pem")]
    certificate.cert_chain_pems[0].write_to_path(files[0])
    certificate.private_key_pem.write_to_path(files[1])
    authority.cert_pem.write_to_path(files[2])
    return files[0], files[1], files[2]


def test_https_with_an_authority_of_ones_own(tls: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    certificate, key, authority = tls
    asked = example(3, 1)
    with serving(service(token="secret"), tls=(certificate, key)) as url:
        assert url.startswith("https://")
        assert torch.equal(remote(url, token_env="TOKEN", ca_file=authority)(*asked), fingerprint(*asked))
        with pytest.raises(RewardUnavailable, match="certificate verify failed"):
            remote(url, token_env="TOKEN")
        with pytest.raises(RewardUnavailable, match="gave no answer"):
            remote(url.replace("https", "http"), token_env="TOKEN")


def test_files_of_tls_that_are_none_are_refused_by_name(tls: tuple[str, str, str], tmp_path: Path) -> None:
    certificate, key, authority = tls
    for file in (key, "/no/such/file"):
        with pytest.raises(ValueError, match=rf"^reward\.settings\.remote\.ca_file = '{file}': .*name a PEM file"):
            remote("https://127.0.0.1:9", ca_file=file)
    locked = str(tmp_path / "locked.pem")
    opened = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    Path(locked).write_bytes(opened.private_bytes(pem, form, serialization.BestAvailableEncryption(b"password")))
    for wrong in ((key, certificate), (authority, key), ("/no/such/file", key), (certificate, locked)):
        with pytest.raises(ValueError, match=f"^--tls-certificate {wrong[0]} --tls-key {wrong[1]}: .*; name the PEM files"):
            server.check_tls(*wrong)
