"""What a service counts, and how Prometheus reads it."""

from collections import defaultdict

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgrpo.rewards.serving.limits import Room

Counts = dict[str, float]  # by name; 0 where nothing was counted


def no_counts() -> Counts:
    return defaultdict(int)


class Counted:
    """Around an application: counts its answers to requests for scores by their status."""

    def __init__(self, app: ASGIApp, counts: Counts) -> None:
        self.app, self.counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/score":
                self.counts[f"status_{message['status']}"] += 1
            await send(message)

        await self.app(scope, receive, counting)


def exposition(counts: Counts, room: Room) -> str:
    """The counters in Prometheus' text format."""
    lines = []
    for name, kind, meaning, value in (
        ("images_total", "counter", "Images scored.", counts["images"]),
        ("batches_total", "counter", "Calls of the reward.", counts["batches"]),
        ("seconds_total", "counter", "Time in the reward.", counts["seconds"]),
        ("waiting", "gauge", "Requests that are read, wait or are scored.", room.requests),
        ("waiting_bytes", "gauge", "Bytes that these take.", room.bytes),
    ):
        name = f"fastgrpo_reward_{name}"
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f"{name} {value}"]
    name = "fastgrpo_reward_requests_total"
    lines += [f"# HELP {name} Requests for scores by status.", f"# TYPE {name} counter"]
    statuses = sorted(key.removeprefix("status_") for key in counts if key.startswith("status_"))
    lines += [f'{name}{{status="{status}"}} {counts[f"status_{status}"]}' for status in statuses]
    return "\n".join(lines) + "\n"
