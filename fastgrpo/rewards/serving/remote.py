"""A reward that other machines compute: the client of `fastgrpo.rewards.serving.service`.

    reward: {train: remote, eval: remote, settings: {remote: {urls: ["http://10.0.0.2:8000", "http://10.0.0.3:8000"]}}}

A batch is cut into requests as large as the servers allow, which the servers share. A request goes to one server after the
other until one gives scores. What is the server's fault lets it be passed by: no answer in `timeout` seconds, no JSON, other
scores than asked for, another version, and any status but those below. When all were passed by, they are asked again after
growing and random pauses, or as late as Retry-After says; after `retries` rounds more or `total_timeout` seconds
`RewardUnavailable` stops the run. A server that finds fault with the request itself (400, 413 and 422 in the service's own
words, 401) is passed by too; but when no other one gives scores in that round, it is an error at once, in its words.

Only servers of one version are used: the images of a group are compared, so the same reward must score all.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor

from fastgrpo.config.bounds import Above, AtLeast
from fastgrpo.daemon_pool import DaemonPool
from fastgrpo.rewards.calling import BadScores, RewardUnavailable, checked
from fastgrpo.rewards.client import Answer, Client, NoAnswer, checked_url, token_from, trusting
from fastgrpo.rewards.retry import Tries
from fastgrpo.rewards.serving.wire import Format, pack

Found = TypeVar("Found")
REFUSALS = (400, 413, 422)  # of the request, where the service says so in its own words
HEALTH_SECONDS = 10.0  # a service that can score says so at once
SETTINGS = "reward.settings.remote"
LARGEST = torch.finfo(torch.float32).max  # of a score


class Lost(Exception):
    """A server that could not answer this time. after: seconds after which it wants to be asked again."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class Refused(Exception):
    """A server that finds fault with the request itself."""


class Remote:
    """Scores from the servers at `urls`, in the order of the images."""

    def __init__(
        self,
        *,
        device: torch.device,
        urls: Sequence[str],  # of the servers, such as http://10.0.0.2:8000
        token_env: str | None = None,  # the environment variable that holds the token
        ca_file: str | None = None,  # PEM file of the authorities that sign https servers, if not the usual ones
        timeout: Annotated[float, Above(0)] = 120.0,  # seconds for a request to one server, all of it
        # Seconds for a request with all its retries and pauses. Less than reward.timeout, so that servers that are gone are
        # told apart from a reward that hangs. Nine rounds of one server that never answers would be 20 minutes.
        total_timeout: Annotated[float, Above(0)] = 900.0,
        retries: Annotated[int, AtLeast(0)] = 8,  # rounds after the first, over all servers
        pause: Annotated[float, AtLeast(0)] = 0.5,  # seconds before the second round, then twice as long each
        max_images: Annotated[int, AtLeast(1)] = 64,  # a request; a server may allow fewer
        form: Format = "raw",  # of the images on the wire; png is slower and smaller
    ) -> None:
        if isinstance(urls, str) or not urls:
            raise ValueError(f"{SETTINGS}.urls = {urls!r}: expected a list such as [http://127.0.0.1:8000]")
        self.urls = [checked_url(url, f"{SETTINGS}.urls[{i}]") for i, url in enumerate(urls)]
        self.retries, self.pause, self.total_timeout, self.form = retries, pause, total_timeout, form
        token = token_from(token_env, f"{SETTINGS}.token_env") if token_env else None
        tls = trusting(ca_file, f"{SETTINGS}.ca_file") if ca_file else None
        # Asked directly, whatever proxy the environment names: these are the user's own machines.
        self._client = Client(self.urls[0], token=token, timeout=timeout, direct=True, tls=tls)
        self._threads = DaemonPool(len(self.urls), "remote")
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

        def ask(url: str, seconds: float) -> list[float]:
            answer = self._ask("POST", f"{url}/score", seconds, content=data)
            if answer.get("version") != self.version:
                raise Lost(f"has version {answer.get('version')!s:.100}, this run's scores are of version {self.version}")
            try:
                return checked(answer.get("scores"), f"{self.name} of {url}", prompts, self.low, self.high).tolist()
            except BadScores as error:
                raise Lost(f"answered without proper scores ({error})") from None

        return self._try(ask, first)

    def _healths(self) -> dict:
        """What is served, under the narrowest limits of all servers; those that answer must serve the same."""
        found: dict[str, dict] = {}

        def ask(url: str, seconds: float) -> None:
            health = self._ask("GET", f"{url}/health", min(seconds, HEALTH_SECONDS))
            if not is_health(health):
                raise Lost(f"answered what is no state of a reward server: {str(health)[:200]}")
            found[url] = health

        self._try(ask, 0)
        for url in self.urls:
            try:
                ask(url, self._client.timeout)
            except (Lost, Refused):
                continue  # it may come later: each answer's version is compared again
        versions = {url: f"{one['reward']} {one['version']}" for url, one in found.items()}
        if len(set(versions.values())) > 1:
            raise ValueError(f"{SETTINGS}.urls: the servers differ in reward or version: {versions}")
        limits = {key: min(one[key] for one in found.values()) for key in ("max_images", "max_bytes")}
        return {**next(iter(found.values())), **limits}

    def _try(self, ask: Callable[[str, float], Found], first: int) -> Found:
        """What the first server gives, asking them in turn and round after round. ask: of an address, within seconds."""
        reasons: dict[str, str] = {}
        rounds = 0
        for _ in (tries := Tries(self.retries, self.pause, self.total_timeout)):
            rounds += 1
            refusals: list[str] = []
            waits: list[float] = []
            for i in range(len(self.urls)):
                url = self.urls[(first + i) % len(self.urls)]
                if (left := tries.left()) <= 0:
                    break
                try:
                    return ask(url, min(self._client.timeout, left))
                except Refused as refusal:
                    refusals.append(f"reward server {url} refused with {refusal}")
                except Lost as lost:
                    reasons[url] = str(lost)
                    waits.append(lost.after)
            if refusals:
                raise ValueError("; ".join(refusals))
            tries.after = min(waits, default=0.0)
        summary = "; ".join(f"{url} {reason}" for url, reason in reasons.items())
        raise RewardUnavailable(f"no reward server answered in {rounds} rounds: {summary}")

    def _ask(self, method: str, url: str, seconds: float, **content: Any) -> dict:
        """The JSON of a server's answer. Raises `Lost` where the server is to blame, `Refused` where the request is."""
        try:
            answer = self._client.request(method, url, seconds, **content)
        except NoAnswer as error:
            raise Lost(f"gave no answer ({error})") from None
        said = json_object(answer)
        if answer.status == 401:
            raise Refused(f"401: {answer.text}; {SETTINGS}.token_env names the environment variable that holds its token")
        if answer.status in REFUSALS and isinstance(said.get("detail"), str):
            raise Refused(f"{answer.status}: {said['detail'][:500]}")
        if answer.status != 200:
            raise Lost(f"answered {answer.status}: {answer.text}", answer.after)
        if not said:
            raise Lost(f"answered what is no JSON object: {answer.text[:100]!r}")
        return said


def json_object(answer: Answer) -> dict[str, Any]:
    """The object of JSON that an answer is, empty where it is none."""
    try:
        said = answer.json()
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def is_health(answer: dict) -> bool:
    """Whether an answer tells what a client must know of a server: see `fastgrpo.rewards.serving.service.Health`."""
    texts = (answer.get(key) for key in ("reward", "version"))
    bounds = (answer.get(key, "") for key in ("low", "high"))
    limits = (answer.get(key) for key in ("max_images", "max_bytes"))
    return (
        all(isinstance(text, str) for text in texts)
        and all(bound is None or (type(bound) in (int, float) and abs(bound) < LARGEST) for bound in bounds)
        and all(type(limit) is int and limit > 0 for limit in limits)
    )
