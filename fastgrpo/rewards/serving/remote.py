"""A reward that other machines compute: the client of `fastgrpo.rewards.serving.service`.

    reward: {train: remote, eval: remote, settings: {remote: {urls: ["http://10.0.0.2:8000", "http://10.0.0.3:8000"]}}}

A batch is cut into requests as large as the servers allow, which the servers share. A server that does not answer is left
out and asked again later, after growing and random pauses; when none has answered in `retries` rounds, `RewardUnavailable`
stops the run. Only servers of one version are used: the images of a group are compared, so the same reward must score all.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypeVar

import torch
from torch import Tensor

try:
    import httpx2
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("httpx2 is not installed: pip install 'fastgrpo[serve]'") from error

from fastgrpo.config.bounds import Above, AtLeast
from fastgrpo.rewards import RewardUnavailable, checked
from fastgrpo.rewards.retry import tries
from fastgrpo.rewards.serving.wire import Format, pack

Answer = TypeVar("Answer")


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
        self.urls, self.retries, self.pause, self.form = [url.rstrip("/") for url in urls], retries, pause, form
        headers = {"Authorization": f"Bearer {os.environ[token_env]}"} if token_env else {}
        # Asked directly, whatever proxy the environment names: these are the user's own machines.
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(timeout, connect=10), trust_env=False)
        self._threads = ThreadPoolExecutor(len(self.urls), "remote")
        self._first = itertools.count(int(os.environ.get("RANK", "0")))  # ranks begin with different servers
        found = self._healths()
        self.name, self.version = found["reward"], found["version"]
        self.low = -math.inf if found["low"] is None else found["low"]
        self.high = math.inf if found["high"] is None else found["high"]
        self.max_images, self.max_bytes = min(max_images, found["max_images"]), found["max_bytes"]

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
                scores = torch.tensor(answer["scores"], dtype=torch.float32)
            except (KeyError, TypeError, ValueError) as error:
                raise Lost(f"answered without scores ({error!r})") from None
            return checked(scores, f"{self.name} of {url}", prompts, self.low, self.high).tolist()

        return self._try(ask, first)

    def _healths(self) -> dict:
        """What is served, under the narrowest limits of all servers; those that answer must serve the same."""
        found: dict[str, dict] = {}

        def ask(url: str) -> None:
            found[url] = self._answer("GET", f"{url}/health")

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
        except httpx2.TransportError as error:
            raise Lost(f"cannot be reached ({type(error).__name__}: {error})") from None
        if response.status_code >= 500 or response.status_code == 429:
            raise Lost(f"answered {response.status_code}: {response.text[:500]}")
        if response.status_code != 200:
            raise ValueError(f"reward server {url} refused with {response.status_code}: {response.text[:500]}")
        try:
            return dict(response.json())
        except (TypeError, ValueError):
            raise Lost(f"answered what is no JSON object: {response.text[:100]!r}") from None
