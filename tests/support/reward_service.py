"""A service whose scores tell what was scored, in a thread, and its client."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastgrpo.rewards.serving.limits import Limits
from fastgrpo.rewards.serving.remote import Remote
from fastgrpo.rewards.serving.server import Files, make_server
from fastgrpo.rewards.serving.service import Service, make_service

CPU = torch.device("cpu")
SLOW = threading.Event()  # makes the reward take long enough for requests to wait


def fingerprint(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """A number of the pixels, the prompt and the metadata, so that no answer can pass for another's."""
    if SLOW.is_set():
        time.sleep(0.02)
    if "crash" in prompts:
        raise RuntimeError("out of memory")
    weights = torch.arange(1, images[0].numel() + 1, dtype=torch.float64)
    pixels = (images.flatten(1).double() * weights).sum(1) / weights.sum()
    more = [len(prompt) + record["bonus"] for prompt, record in zip(prompts, metadata, strict=True)]
    return (pixels + torch.tensor(more, dtype=torch.float64)).float()


NAME = f"{__name__}:fingerprint"
SMALL = {"max_images": 16, "max_bytes": 1 << 16, "shutdown_seconds": 1}


def example(count: int, seed: int, side: int = 6) -> tuple[torch.Tensor, list[str], list[dict]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return images, [f"{seed} {'é' * i}" for i in range(count)], [{"bonus": 10.0 * seed + i} for i in range(count)]


def service(token: str | None = None, **limits: Any) -> Service:
    return make_service(NAME, device="cpu", settings={}, token=token, limits=Limits(**(SMALL | limits)))


@contextmanager
def serving(one: Service, tls: Files | None = None) -> Iterator[str]:
    """The server in a thread; its address."""
    server = make_server(one, "127.0.0.1", 0, tls)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def remote(*urls: str, **options: Any) -> Remote:
    return Remote(device=CPU, urls=urls, **(dict(timeout=20, retries=1, pause=0.01) | options))
