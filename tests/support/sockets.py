"""Servers and clients that speak bytes, so that they can say what no library would, as slowly as they like."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

Talk = Callable[[socket.socket], object]  # what a server does with a connection, until it returns or the other side leaves
DRIP = 0.02  # seconds between two bytes of what comes slowly


@contextmanager
def raw_server(talk: Talk) -> Iterator[str]:
    """A server that talks with each connection in a thread; its address."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            talk(connection)

    def accept() -> None:
        with suppress(OSError):  # closed
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def connect(url: str) -> socket.socket:
    """To a server, with a minute of patience, after which a test has failed."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60)


def drip(connection: socket.socket, data: bytes) -> None:
    """One byte after the other, until the other side has had enough."""
    with suppress(OSError):
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(DRIP)


def rest(connection: socket.socket) -> bytes:
    """What comes until the other side closes the connection."""
    data = b""
    with suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            data += part
    return data


def post(body: bytes | int, *headers: str) -> bytes:
    """A request for scores; of a number, the head that announces so many bytes."""
    length = body if isinstance(body, int) else len(body)
    head = "\r\n".join(("POST /score HTTP/1.1", "Host: a", f"Content-Length: {length}", *headers, "", ""))
    return head.encode() + (b"" if isinstance(body, int) else body)


def free_port() -> int:
    """At which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
