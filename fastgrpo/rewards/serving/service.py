"""A reward behind HTTP, so that its model has a machine of its own and several runs share it.

    fastgrpo serve-reward --reward jpeg_compressibility --port 8000

    POST /score     images, prompts and metadata as in `fastgrpo.rewards.serving.wire` -> {"scores", "reward", "version"}
    GET  /health    what is served, with its version and limits
    GET  /metrics   counters as Prometheus reads them
    GET  /docs      this, as OpenAPI says it

Requests that arrive while a batch is being scored wait, and are then scored together, up to `max_images`. A bad request
fails for its sender alone (4xx): when a batch fails, each of its requests is scored again by itself.
"""

import asyncio
import hmac
import time
import traceback
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import fastapi
import torch
import uvicorn
from fastapi import Header, HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from fastgrpo.rewards import load_reward, reward_version
from fastgrpo.rewards.calling import Reward, RewardError, in_percent, score_range, scores_of
from fastgrpo.rewards.serving.wire import HEADER_BYTES, PREAMBLE, Request, WireError, unpack

Counts = dict[str, float]  # what /metrics shows, by name; 0 where nothing was counted


class Scores(BaseModel):
    """One score an image, in the request's order."""

    scores: list[float]
    reward: str
    version: str


class Health(BaseModel):
    """What is served. `low` and `high` bound the scores, null where they are open; `percent`: scores are shares."""

    reward: str
    version: str
    low: float | None
    high: float | None
    percent: bool
    max_images: int
    max_bytes: int


@dataclass(frozen=True, kw_only=True)
class Service:
    """What is served, and how much a request may hold."""

    name: str
    reward: Reward
    version: str
    token: str | None = None
    max_images: int = 64
    max_bytes: int = 1 << 28  # of a request's pixels
    counts: Counts = field(default_factory=lambda: defaultdict(int))

    def score(self, request: Request) -> list[float]:
        """Checked, so that no client can get a score that is none."""
        return scores_of(self.reward, self.name, *request).tolist()

    def health(self) -> Health:
        low, high = (bound if abs(bound) < float("inf") else None for bound in score_range(self.reward))
        return Health(
            reward=self.name, version=self.version, low=low, high=high, percent=in_percent(self.reward),
            max_images=self.max_images, max_bytes=self.max_bytes,
        )  # fmt: skip


class Batcher:
    """Scores what waits together: one batch after the other, in a thread, while the loop takes in more."""

    def __init__(self, score: Callable[[Request], list[float]], max_images: int, counts: Counts) -> None:
        self._score, self._max_images, self._counts = score, max_images, counts
        self._waiting: deque[tuple[Request, asyncio.Future]] = deque()
        self._arrived, self._thread = asyncio.Event(), ThreadPoolExecutor(1, "reward")

    async def __call__(self, request: Request) -> list[float]:
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        self._arrived.set()
        return await answer

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not self._waiting:
                self._arrived.clear()
            await self._answer(batch)

    def _take(self) -> list[tuple[Request, asyncio.Future]]:
        """From the front, what fits into a batch and has the first one's shape of image."""
        batch = [self._waiting.popleft()]
        shape, images = batch[0][0].images.shape[1:], len(batch[0][0].prompts)
        while self._waiting:
            request = self._waiting[0][0]
            images += len(request.prompts)
            if images > self._max_images or request.images.shape[1:] != shape:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _answer(self, batch: list[tuple[Request, asyncio.Future]]) -> None:
        requests = [request for request, _ in batch]
        began = time.perf_counter()
        try:
            scores = await asyncio.get_running_loop().run_in_executor(
                self._thread, lambda: self._score(join_requests(requests))
            )
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    await self._answer([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        self._counts["batches"] += 1
        self._counts["images"] += len(scores)
        self._counts["seconds"] += time.perf_counter() - began
        for request, answer in batch:
            if not answer.done():  # its client may have left
                answer.set_result(scores[: len(request.prompts)])
            scores = scores[len(request.prompts) :]


def join_requests(requests: list[Request]) -> Request:
    """Several requests as one."""
    return Request(
        torch.cat([request.images for request in requests]),
        [prompt for request in requests for prompt in request.prompts],
        [record for request in requests for record in request.metadata],
    )


def application(service: Service) -> fastapi.FastAPI:
    """The web application around a service."""
    batcher: list[Batcher] = []

    @asynccontextmanager
    async def life(app: fastapi.FastAPI) -> AsyncIterator[None]:
        batcher.append(Batcher(service.score, service.max_images, service.counts))
        task = asyncio.create_task(batcher[0].run())
        yield
        task.cancel()

    title = f"fastgrpo reward: {service.name}"
    app = fastapi.FastAPI(title=title, description=__doc__, version=service.version, lifespan=life)

    @app.exception_handler(WireError)
    async def refuse(request: fastapi.Request, error: WireError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.middleware("http")
    async def count(request: fastapi.Request, go_on: Callable) -> Any:
        response = await go_on(request)
        if request.url.path == "/score":
            service.counts[f"status_{response.status_code}"] += 1
        return response

    @app.get("/health")
    async def health() -> Health:
        """What is served, with its version and limits."""
        return service.health()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Counters, in Prometheus' text format."""
        return exposition(service)

    @app.post("/score", openapi_extra=BODY, responses=ERRORS)
    async def score(request: fastapi.Request, authorization: Annotated[str, Header()] = "") -> Scores:
        """Score images. The body is a request of `fastgrpo.rewards.serving.wire`; its format is described there."""
        expected = f"Bearer {service.token}".encode()
        if service.token and not hmac.compare_digest(authorization.encode(), expected):
            raise HTTPException(401, "wrong or missing token: send it as 'Authorization: Bearer TOKEN'")
        data = await body(request, PREAMBLE.size + service.max_bytes + service.max_images * HEADER_BYTES)
        scoring = await asyncio.to_thread(unpack, data, service.max_images, service.max_bytes)
        try:
            scores = await batcher[0](scoring)
        except RewardError as error:
            refused = isinstance(error, ValueError) or isinstance(error.__cause__, ValueError)
            if not refused:
                traceback.print_exception(error)
            raise HTTPException(422 if refused else 500, str(error)) from None
        return Scores(scores=scores, reward=service.name, version=service.version)

    return app


BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be read."},
    401: {"description": "The token is wrong."},
    413: {"description": "More images or bytes than a request may hold, see /health."},
    422: {"description": "The reward refuses these images, or what it returned is no score."},
    500: {"description": "The reward failed."},
}


async def body(request: fastapi.Request, limit: int) -> bytes:
    """The request's bytes, read no further than the limit."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise WireError(f"{announced} bytes: at most {limit}", 413)
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise WireError(f"more than {limit} bytes", 413)
    return bytes(data)


def exposition(service: Service) -> str:
    """The counters as Prometheus reads them."""
    lines = []
    for name, meaning in (
        ("images", "Images scored."), ("batches", "Calls of the reward."), ("seconds", "Time in the reward."),
    ):  # fmt: skip
        name, value = f"fastgrpo_reward_{name}_total", service.counts[name]
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} counter", f"{name} {value}"]
    name = "fastgrpo_reward_requests_total"
    lines += [f"# HELP {name} Requests for scores by status.", f"# TYPE {name} counter"]
    statuses = sorted(key.removeprefix("status_") for key in service.counts if key.startswith("status_"))
    lines += [f'{name}{{status="{status}"}} {service.counts[f"status_{status}"]}' for status in statuses]
    return "\n".join(lines) + "\n"


def make_service(
    name: str, *, device: torch.device | str, settings: dict[str, Any], token: str | None, max_images: int, max_bytes: int
) -> Service:
    """Load the reward. It scores what clients send, frames or clips: they decide on that by their `reward.frames`."""
    reward = load_reward(name, device=device, settings=settings, frames="clip")
    version = reward_version(name, settings)
    return Service(name=name, reward=reward, version=version, token=token, max_images=max_images, max_bytes=max_bytes)


def serve(service: Service, host: str, port: int) -> None:
    """Serve the reward until a signal ends the process."""
    print(f"reward {service.name}, version {service.version}: http://{host}:{port}/docs", flush=True)
    uvicorn.run(application(service), host=host, port=port, log_level="warning")
