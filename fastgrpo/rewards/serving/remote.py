"""A reward that other machines compute: the client of `fastgrpo.rewards.serving.service`.

    reward: {train: remote, eval: remote, settings: {remote: {urls: ["http://10.0.0.2:8000", "http://10.0.0.3:8000"]}}}

A batch is cut into requests as large as the servers allow, which the servers share. A server that does not answer is left
out and asked again later, after growing and random pauses; when none has answered in `retries` rounds, `RewardUnavailable`
stops the run. Only servers of one version are used: the images of a group are compared, so the same reward must score all.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypeVar

import torch
from torch import Tensor

from fastgrpo.config.bounds import Above, AtLeast
from fastgrpo.rewards.calling import BadScores, RewardUnavailable, checked
from fastgrpo.rewards.client import NoAnswer, checked_url, make_client
from fastgrpo.rewards.retry import tries
from fastgrpo.rewards.serving.wire import Format, pack

Answer = TypeVar("Answer")
BUSY = (408, 425, 429)  # of the statuses from 400 to 499 those that speak of the moment and not of the request


class Lost(Exception):
    """A server that could not answer this time."""


class Remote:
    """Scores from the servers at `urls`, in the order of the images."""

    def __init__(
        self,
        *,
        device: torch.device,
        urls: Sequence[str],  # of the servers, such as http://10.0.0.2:8000
        token_env: str | None = None,  # the environment variable that holds the token
        timeout: Annotated[float, Above(0)] = 120.0,  # seconds for an answer
        retries: Annotated[int, AtLeast(0)] = 8,  # rounds after the first, over all servers
        pause: Annotated[float, AtLeast(0)] = 0.5,  # seconds before the second round, then twice as long each
        max_images: Annotated[int, AtLeast(1)] = 64,  # a request; a server may allow fewer
        form: Format = "raw",  # of the images on the wire; png is slower and smaller
    ) -> None:
        if isinstance(urls, str) or not urls:
            raise ValueError(f"reward.settings.remote.urls = {urls!r}: expected a list such as [http://127.0.0.1:8000]")
        if token_env and not os.environ.get(token_env):
            raise ValueError(f"reward.settings.remote.token_env = {token_env!r}: this environment variable is not set")
        self.urls = [checked_url(url, f"reward.settings.remote.urls[{i}]") for i, url in enumerate(urls)]
        self.retries, self.pause, self.form = retries, pause, form
        token = os.environ[token_env] if token_env else None
        # Asked directly, whatever proxy the environment names: these are the user's own machines.
        self._client = make_client(self.urls[0], token=token, timeout=timeout, connect=10, direct=True)
        self._threads = ThreadPoolExecutor(len(self.urls), "remote")
        self._first = itertools.count(int(os.environ.get("RANK", "0")))  # ranks begin with different servers
        found = self._healths()
        self.name, self.version = found["reward"], found["version"]
        self.low = -math.inf if found["low"] is None else found["low"]
        self.high = math.inf if found["high"] is None else found["high"]
        self.percent = found.get("percent") is True
        self.max_images, self.max_bytes = min(max_images, found["max_images"]), found["max_bytes"]

    @staticmethod
    def check(prompts: list[str], metadata: list[dict]) -> None:
        """Refuse what a request cannot carry."""
        try:
            json.dumps([prompts, metadata], allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a request to a server is JSON, which cannot say this prompt's record: {error}") from error

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """images (B, 3, H, W) or (B, T, 3, H, W) uint8 -> (B,)."""
        size = max(1, min(self.max_images, self.max_bytes // max(1, images[0].numel())))
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]

        def scores(part: slice) -> list[float]:
            return self._request(images[part], prompts[part], metadata[part])

        # Packed one by one when their turn comes. `map` keeps the order.
        return torch.tensor([score for answer in self._threads.map(scores, parts) for score in answer])

    def _request(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> list[float]:
        data, first = pack(images, prompts, metadata, self.form), next(self._first)

        def ask(url: str) -> list[float]:
            answer = self._answer("POST", f"{url}/score", content=data)
            if answer.get("version") != self.version:
                raise Lost(f"has version {answer.get('version')}, this run's scores are of version {self.version}")
            try:
                return checked(answer.get("scores"), f"{self.name} of {url}", prompts, self.low, self.high).tolist()
            except BadScores as error:
                raise Lost(f"answered without proper scores ({error})") from None

        return self._try(ask, first)

    def _healths(self) -> dict:
        """What is served, under the narrowest limits of all servers; those that answer must serve the same."""
        found: dict[str, dict] = {}

        def ask(url: str) -> None:
            found[url] = health = self._answer("GET", f"{url}/health")
            if not is_health(health):
                raise Lost(f"answered what is no state of a reward server: {str(health)[:200]}")

        self._try(ask, 0)
        for url in self.urls:
            try:
                ask(url)
            except Lost:
                continue  # it may come later: each answer's version is compared again
        versions = {url: f"{one['reward']} {one['version']}" for url, one in found.items()}
        if len(set(versions.values())) > 1:
            raise ValueError(f"reward.settings.remote.urls: the servers differ in reward or version: {versions}")
        limits = {key: min(one[key] for one in found.values()) for key in ("max_images", "max_bytes")}
        return {**next(iter(found.values())), **limits}

    def _try(self, ask: Callable[[str], Answer], first: int) -> Answer:
        """The first answer, asking the servers in turn and round after round."""
        reasons: dict[str, str] = {}
        for _ in tries(self.retries, self.pause):
            for i in range(len(self.urls)):
                url = self.urls[(first + i) % len(self.urls)]
                try:
                    return ask(url)
                except Lost as lost:
                    reasons[url] = str(lost)
        summary = "; ".join(f"{url} {reason}" for url, reason in reasons.items())
        raise RewardUnavailable(f"no reward server answered in {self.retries + 1} rounds: {summary}")

    def _answer(self, method: str, url: str, content: bytes | None = None) -> dict:
        """The JSON of a server's answer. Raises `Lost` where the server is to blame, ValueError where the request is."""
        try:
            response = self._client.request(method, url, content=content)
        except NoAnswer as error:
            raise Lost(f"cannot be reached ({type(error).__name__}: {error})") from None
        if response.status_code != 200 and not 400 <= response.status_code < 500 or response.status_code in BUSY:
            raise Lost(f"answered {response.status_code}: {response.text[:500]}")
        if response.status_code != 200:
            raise ValueError(f"reward server {url} refused with {response.status_code}: {response.text[:500]}")
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise Lost(f"answered what is no JSON object: {response.text[:100]!r}")
        return answer


def is_health(answer: dict) -> bool:
    """Whether an answer tells what a client must know of a server: see `fastgrpo.rewards.serving.service.Health`."""
    texts = (answer.get(key) for key in ("reward", "version"))
    bounds = (answer.get(key, "") for key in ("low", "high"))
    limits = (answer.get(key) for key in ("max_images", "max_bytes"))
    return (
        all(isinstance(text, str) for text in texts)
        and all(bound is None or type(bound) in (int, float) for bound in bounds)
        and all(type(limit) is int and limit > 0 for limit in limits)
    )
