"""The web server around a service: uvicorn, with deadlines and a limit of connections that it does not have.

    serve(service, "0.0.0.0", 8000, tls=("certificate.pem", "key.pem"))

SIGTERM and Ctrl-C end it: it takes no more connections, answers what waits, and ends after `shutdown_seconds` at the latest.
"""

import asyncio
import ssl
from contextlib import suppress
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastgrpo.rewards.serving.limits import Limits
from fastgrpo.rewards.serving.service import Service, application

Files = tuple[str, str]  # of a certificate and of its key, PEM


class Connection(H11Protocol):
    """A connection, cut where its client sends the head of a request, or a body that nobody reads, for too long.

    The body of a request that is read has its deadline where it is read, and silence after an answer has uvicorn's.
    """

    def __init__(self, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self._limits, self._sends = limits, ""
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(error)

    def _watch(self) -> None:
        """Sets the deadline of what the client sends now, when that is another thing than before."""
        answering = self.cycle is not None and not self.cycle.response_complete
        sends = "what is read" if answering else "body" if self.conn.their_state is h11.SEND_BODY else "head"
        if sends != self._sends:
            self._sends = sends
            self._unwatch()
            if not answering:
                seconds = self._limits.body_seconds if sends == "body" else self._limits.head_seconds
                self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _unwatch(self) -> None:
        if self._deadline:
            self._deadline.cancel()


def make_server(service: Service, host: str, port: int, tls: Files | None = None) -> uvicorn.Server:
    """The server, to be run. tls: with it, it speaks https only."""
    limits = service.limits
    certificate, key = tls or (None, None)
    return uvicorn.Server(
        uvicorn.Config(
            application(service), host=host, port=port, log_level="warning", ws="none",
            http=cast(type[asyncio.Protocol], partial(Connection, limits)),
            timeout_keep_alive=limits.idle_seconds, timeout_graceful_shutdown=limits.shutdown_seconds,
            ssl_certfile=certificate, ssl_keyfile=key,
        )
    )  # fmt: skip


def check_tls(certificate: str, key: str) -> Files:
    """The two files, or a ValueError where they are none or do not belong together."""
    try:
        # A key with a password is refused by the empty one, where OpenSSL would ask at the terminal and wait.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password="")
    except OSError as error:  # ssl.SSLError is one too
        given = f"--tls-certificate {certificate} --tls-key {key}"
        raise ValueError(
            f"{given}: {error.strerror or error}; name the PEM files of a certificate and of its key, without a password"
        ) from None
    return certificate, key


def serve(service: Service, host: str, port: int, tls: Files | None = None) -> None:
    """Serve the reward until a signal ends the process."""
    server = make_server(service, host, port, tls)
    scheme = "https" if tls else "http"
    print(f"reward {service.name}, version {service.version}: {scheme}://{host}:{port}/docs", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again when all has ended
        server.run()
