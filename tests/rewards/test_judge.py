"""The judge against a real HTTP server, whose score is a function of the pixels that arrive."""

import base64
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.rewards import REWARDS
from fastgrpo.rewards.judge import PRESETS, VLMJudge

CPU = torch.device("cpu")
Answer = Callable[[dict, int], tuple[int, str]]  # (request, how often that image was asked about) -> status, text


class Judge:
    """What a test sees of its server: the address, the requests, and how many were in hand at once."""

    def __init__(self, url: str) -> None:
        self.url, self.requests, self.headers, self.busy, self.busiest = url, [], [], 0, 0
        self.asked, self.lock = Counter(), threading.Lock()


@contextmanager
def serving(answer: Answer, before: Callable[[dict], object] = lambda request: None) -> Iterator[Judge]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.busy += 1
                judge.busiest = max(judge.busiest, judge.busy)
                judge.requests.append(request)
                judge.headers.append(dict(self.headers))
                key = request["messages"][0]["content"][0]["image_url"]["url"]
                judge.asked[key] += 1
                times = judge.asked[key]
            before(request)
            status, text = answer(request, times)
            with judge.lock:
                judge.busy -= 1
            body = json.dumps({"choices": [{"message": {"content": text}}]}) if status == 200 else text
            self.send_response(status if self.path == "/v1/chat/completions" else 404)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            try:
                self.wfile.write(body.encode())
            except OSError:  # the client gave up on it
                pass

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    judge = Judge(f"http://127.0.0.1:{server.server_address[1]}/v1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()


def red(request: dict) -> int:
    """The top left red value of the image in a request."""
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == "PNG" and image.mode == "RGB"
    return int(np.asarray(image)[0, 0, 0])


def by_red(request: dict, times: int) -> tuple[int, str]:
    return 200, f"It is red.\nFinal Score: {red(request) / 10}"


def reds(*values: int) -> torch.Tensor:
    """Images (B, 3, 6, 4) of these red values."""
    images = torch.zeros(len(values), 3, 6, 4, dtype=torch.uint8)
    images[:, 0] = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1)
    return images


def ask(server: Judge, images: torch.Tensor, **settings: object) -> torch.Tensor:
    reward = VLMJudge(CPU, url=server.url, model="m", **({"backoff": 0.001} | settings))
    return reward(images, [f"prompt {i}" for i in range(len(images))], [{}] * len(images))


def test_every_image_gets_its_own_score_in_order_though_late_ones_come_first() -> None:
    values = list(range(0, 96, 4))
    last = threading.Event()

    def first_waits_for_last(request: dict) -> None:
        if red(request) == values[-1]:
            last.set()
        assert red(request) != values[0] or last.wait(60)

    with serving(by_red, before=first_waits_for_last) as server:
        scores = ask(server, reds(*values), concurrency=8)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(values) / 100)
    assert 2 <= server.busiest <= 8
    for request in server.requests:
        number = values.index(red(request))
        text = request["messages"][0]["content"][1]["text"]
        assert f"for the prompt: prompt {number}\n" in text and "{prompt}" not in text
        assert request["model"] == "m" and request["temperature"] == 0


def test_its_own_scale_becomes_zero_to_one() -> None:
    with serving(by_red) as server:
        scores = ask(server, reds(10, 30, 50), low=1, high=5)
        torch.testing.assert_close(scores, torch.tensor([0.0, 0.5, 1.0]))
        with pytest.raises(RuntimeError, match="without a score from 1 to 5: 'It is red"):
            ask(server, reds(51), low=1, high=5, retries=0)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(status: int) -> None:
    with serving(lambda request, times: by_red(request, times) if times == 3 else (status, "overloaded")) as server:
        torch.testing.assert_close(ask(server, reds(20, 70)), torch.tensor([0.2, 0.7]))
    assert set(server.asked.values()) == {3}
    assert {request["temperature"] for request in server.requests} == {0}


def test_a_broken_endpoint_is_an_error_after_bounded_tries() -> None:
    with serving(lambda request, times: (500, "out of memory")) as server:
        with pytest.raises(RuntimeError, match="in 3 tries for the prompt 'prompt 0'; the last: status 500: 'out of mem"):
            ask(server, reds(20), retries=2)
    assert len(server.requests) == 3


def test_what_no_retry_can_mend_is_not_retried() -> None:
    with serving(lambda request, times: (404, "no model m")) as server:
        with pytest.raises(RuntimeError, match=r"answered 404: 'no model m'; see reward.settings.vlm_judge"):
            ask(server, reds(20))
    assert len(server.requests) == 1


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with serving(lambda request, times: (429, "")) as server, pytest.raises(RuntimeError):
        ask(server, reds(20), retries=7, backoff=1.0)
    for wait, middle in zip(waits, [1, 2, 4, 8, 16, 30, 30], strict=True):
        assert middle / 2 <= wait <= middle * 3 / 2
    assert len({wait / 2**i for i, wait in enumerate(waits)}) == 7


@pytest.mark.parametrize("garbage", ["I cannot judge this.", "Final Score: eleven", "Final Score: 11", ""])
def test_an_answer_without_a_score_is_asked_for_again_at_a_temperature(garbage: str) -> None:
    with serving(lambda request, times: by_red(request, times) if times == 2 else (200, garbage)) as server:
        assert ask(server, reds(20)).tolist() == [pytest.approx(0.2)]
    assert [request["temperature"] for request in server.requests] == [0, 0.7]
    with serving(lambda request, times: (200, garbage)) as server:
        quoted = re.escape(repr(garbage))
        with pytest.raises(RuntimeError, match=f"no score in 2 tries for the prompt 'prompt 0'.*{quoted}"):
            ask(server, reds(20), retries=1)


def test_what_is_no_chat_completion_is_quoted() -> None:
    with serving(lambda request, times: (201, "")) as server, pytest.raises(RuntimeError, match="answered 201"):
        ask(server, reds(20), retries=0)
    with serving(lambda request, times: (200, None)) as server:  # reasoned to the last token and said nothing
        with pytest.raises(RuntimeError, match="without a score from 0 to 10: ''"):
            ask(server, reds(20), retries=0)


def test_a_silent_endpoint_times_out_and_is_asked_again() -> None:
    over = threading.Event()
    with serving(by_red, before=lambda request: len(server.requests) > 1 or over.wait(60)) as server:
        assert ask(server, reds(40), timeout=1.0).tolist() == [pytest.approx(0.4)]
        assert len(server.requests) > 1
        over.set()
    over.clear()
    with serving(by_red, before=lambda request: over.wait(60)) as server:
        with pytest.raises(RuntimeError, match="in 2 tries for the prompt 'prompt 0'; the last: no whole answer in 0.2 s"):
            ask(server, reds(40), timeout=0.2, retries=1)
        over.set()


def test_nobody_there_is_an_error() -> None:
    with serving(by_red) as server:
        pass
    with pytest.raises(RuntimeError, match=f"vlm_judge at {server.url}/chat/completions: .*ConnectError"):
        ask(server, reds(40), retries=1)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "not-to-be-seen")
    with serving(by_red) as server:
        ask(server, reds(40), api_key_env="JUDGE_KEY")
        ask(server, reds(40))
    assert [headers.get("Authorization") for headers in server.headers] == ["Bearer not-to-be-seen", None]
    with serving(lambda request, times: (401, "wrong key")) as server, pytest.raises(RuntimeError) as error:
        ask(server, reds(40), api_key_env="JUDGE_KEY")
    assert "not-to-be-seen" not in str(error.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="api_key_env = 'JUDGE_KEY': this environment variable is not set"):
        VLMJudge(CPU, url="http://localhost", model="m", api_key_env="JUDGE_KEY")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "strict"}, "preset = 'strict': not one of general, unified_reward"),
        ({"score": "(["}, r"score = '\(\[': no regular expression"),
        ({"score": r"\d+"}, "has no group"),
        ({"low": 10}, "low = 10 is not below high = 10"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMJudge(CPU, url="http://localhost", model="m", **settings)


@pytest.mark.parametrize(
    ("preset", "answer", "score"),
    [
        ("general", "I first thought of Final Score: 2.\nFinal Score: 7.5", 0.75),
        ("general", "**Final Score:** 10", 1.0),
        ("unified_reward", "Final Score: 4", 0.75),
        ("qwen_vl_quality", "<Thought>fine</Thought>\n<Score>2</Score>", 0.25),
    ],
)
def test_presets_read_their_answers(preset: str, answer: str, score: float) -> None:
    reward = VLMJudge(CPU, url="http://localhost", model="m", preset=preset)
    assert reward.read(answer) == pytest.approx(score)
    assert reward.low == 0 and reward.high == 1
    assert ("{prompt}" in PRESETS[preset].prompt) == (preset != "qwen_vl_quality")


def test_it_has_a_name() -> None:
    assert REWARDS["vlm_judge"] == f"{VLMJudge.__module__}:{VLMJudge.__name__}"
