"""A reward behind HTTP, so that its model has a machine of its own and several runs share it.

    fastgrpo serve-reward --reward jpeg_compressibility --port 8000

    POST /score     images, prompts and metadata as in `fastgrpo.rewards.serving.wire` -> {"scores", "reward", "version"}
    GET  /health    what is served, with its version and limits; 503 where nothing would be scored any more
    GET  /metrics   counters as Prometheus reads them
    GET  /docs      this, as OpenAPI says it

Requests that arrive while a batch is being scored wait, and are then scored together, as many as one could hold; more than
the limits allow are sent away with 503 and Retry-After. A request whose client has left is not scored. A bad request fails
for its sender alone (4xx): when a batch fails, each of its requests is scored again by itself.
"""

import asyncio
import hmac
import traceback
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import fastapi
import torch
from fastapi import Depends, HTTPException, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from fastgrpo.rewards import load_reward, reward_version
from fastgrpo.rewards.calling import Reward, RewardError, in_percent, score_range, scores_of
from fastgrpo.rewards.serving.batching import Batcher
from fastgrpo.rewards.serving.counting import Counted, Counts, exposition, no_counts
from fastgrpo.rewards.serving.limits import RETRY_AFTER, Full, Limits, Place, Room
from fastgrpo.rewards.serving.wire import Request, WireError, unpack


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


class Refusal(BaseModel):
    """Why there are no scores."""

    detail: str


@dataclass(frozen=True, kw_only=True)
class Service:
    """What is served, to whom, and how much of it at a time."""

    name: str
    reward: Reward
    version: str
    token: str | None = field(default=None, repr=False)
    limits: Limits = Limits()
    counts: Counts = field(default_factory=no_counts)

    def score(self, request: Request) -> list[float]:
        """Checked, so that no client can get a score that is none."""
        return scores_of(self.reward, self.name, *request).tolist()

    def health(self) -> Health:
        low, high = (bound if abs(bound) < float("inf") else None for bound in score_range(self.reward))
        return Health(
            reward=self.name, version=self.version, low=low, high=high, percent=in_percent(self.reward),
            max_images=self.limits.max_images, max_bytes=self.limits.max_bytes,
        )  # fmt: skip


def application(service: Service) -> fastapi.FastAPI:
    """The web application around a service."""
    room, limits = Room(service.limits), service.limits
    batcher = Batcher(service.score, limits, service.counts)
    scoring: list[asyncio.Task] = []

    @asynccontextmanager
    async def life(app: fastapi.FastAPI) -> AsyncIterator[None]:
        scoring.append(asyncio.create_task(batcher.run()))
        yield
        scoring[0].cancel()

    title = f"fastgrpo reward: {service.name}"
    app = fastapi.FastAPI(title=title, description=__doc__, version=service.version, lifespan=life)
    app.add_middleware(Counted, counts=service.counts)
    add_refusals(app)

    def check_scoring() -> None:
        if scoring[0].done():
            raise HTTPException(503, "the scoring has ended by an error; start the service again")

    @app.get("/health", responses=describe(503))
    async def health() -> Health:
        """What is served, with its version and limits."""
        check_scoring()
        return service.health()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Counters, in Prometheus' text format."""
        return exposition(service.counts, room)

    async def check_token(sent: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        expected = service.token or ""
        if expected and not hmac.compare_digest((sent.credentials if sent else "").encode(), expected.encode()):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "wrong or missing token: send it as 'Authorization: Bearer TOKEN'", challenge)

    @app.post("/score", openapi_extra=BODY, responses=describe(*REFUSALS), dependencies=[Depends(check_token)])
    async def score(request: fastapi.Request) -> Scores:
        """Score images. The body is a request of `fastgrpo.rewards.serving.wire`; its format is described there."""
        check_scoring()
        try:
            with room.place() as place:
                data = await read_body(request, place, limits)
                unpacked = await asyncio.to_thread(
                    unpack, data, limits.max_images, limits.max_bytes, lambda size: place.hold(len(data) + size)
                )
                scores = await unless_left(request, batcher(unpacked))
        except asyncio.CancelledError:  # by the server alone, at the end of its patience with what still waits
            raise Full("the service ends") from None
        except RewardError as error:
            refused = isinstance(error, ValueError) or isinstance(error.__cause__, ValueError)
            if not refused:
                traceback.print_exception(error)
            raise HTTPException(422 if refused else 500, str(error)) from None
        return Scores(scores=scores, reward=service.name, version=service.version)

    return app


BEARER = HTTPBearer(auto_error=False, description="Needed where the service was started with a token.")
BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}}}
REFUSALS = {
    400: "The request cannot be read.",
    401: "The token is wrong.",
    408: "The request came too slowly.",
    413: "More images or bytes than a request may hold, see /health.",
    422: "The reward refuses these images, or what it returned is no score.",
    500: "The reward failed.",
    503: "As many requests as may wait do so already, or the service ends; ask again after Retry-After seconds.",
}


def describe(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of them."""
    return {status: {"description": REFUSALS[status], "model": Refusal} for status in statuses}


def add_refusals(app: fastapi.FastAPI) -> None:
    """How errors of the service's own become answers."""

    @app.exception_handler(WireError)
    async def unreadable(request: fastapi.Request, error: WireError) -> Response:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.exception_handler(Full)
    async def full(request: fastapi.Request, error: Full) -> Response:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(ClientDisconnect)
    async def left(request: fastapi.Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # for the counters: nobody is there to read it


async def read_body(request: fastapi.Request, place: Place, limits: Limits) -> bytearray:
    """The request's bytes, for which there is a place and time; what announces itself as too much is not read."""
    announced = request.headers.get("content-length", "0")
    size = int(announced) if announced.isdecimal() and len(announced) < 20 else limits.body_bytes + 1
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            check_size(size, place, limits)
            async for part in request.stream():
                data += part
                check_size(len(data), place, limits)
    except TimeoutError:
        late = f"{len(data)} bytes came in {limits.body_seconds:g} s, and not all; send faster, or smaller requests"
        raise HTTPException(408, late, {"Connection": "close"}) from None
    return data


def check_size(size: int, place: Place, limits: Limits) -> None:
    if size > limits.body_bytes:
        raise WireError(f"{size} bytes: at most {limits.body_bytes}", 413)
    place.hold(size)


async def unless_left(request: fastapi.Request, scores: Coroutine[Any, Any, list[float]]) -> list[float]:
    """The scores; ClientDisconnect as soon as the client has left, and then they are no longer waited for."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.create_task(scores), asyncio.create_task(left())
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        leaving.cancel()


def make_service(
    name: str, *, device: torch.device | str, settings: dict[str, Any], token: str | None, limits: Limits
) -> Service:
    """Load the reward. It scores what clients send, frames or clips: they decide on that by their `reward.frames`."""
    reward = load_reward(name, device=device, settings=settings, frames="clip")
    return Service(name=name, reward=reward, version=reward_version(name, settings), token=token, limits=limits)
