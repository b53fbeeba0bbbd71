"""How rewards talk to servers: one kind of client for all of them, and addresses that are checked before they are asked.

    client = Client("http://10.0.0.2:8000", token=token, timeout=120)
    answer = client.request("POST", "http://10.0.0.2:8000/score", content=data)     or NoAnswer

`timeout` holds for the whole of a request: to connect, to send, to wait and to take in the answer to its last byte. A limit
on each read would never end where a server sends one byte a second. So requests run in an event loop, which can leave a
request wherever it is; the loop has a thread of its own, for which the process does not wait when it ends.
"""

import asyncio
import ipaddress
import os
import ssl
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from fastgrpo.data.json_records import parse_json

try:
    import httpx2
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("httpx2 is not installed: pip install 'fastgrpo[serve]' or 'fastgrpo[judge]'") from error

SCHEMES = ("http", "https")
CONNECT_SECONDS = 10.0  # to reach a server, of its `timeout`: one whose machine is off must not take all of that
MOST_BYTES = 1 << 22  # of an answer, unpacked: scores and texts are small


class NoAnswer(Exception):
    """There was no answer, or none that could be taken in."""


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    content: bytes
    after: float  # seconds after which it wants to be asked again, 0 where it does not say

    @property
    def text(self) -> str:
        """For people, and no more than they read."""
        return self.content[:500].decode(errors="replace")

    def json(self) -> Any:
        """The strict JSON in it; ValueError where it is none."""
        return parse_json(self.content.decode())


class Client:
    """Asks the servers at one address, or several like it, from any thread.

    token: the bearer's. timeout: seconds for a request, all of it.
    connections: at once, at most.
    direct: past the proxy that the environment names; to this machine itself it always goes directly.
    tls: what tells which certificates are trusted, if not the usual ones.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float,
        connections: int = 100,
        direct: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.timeout = timeout
        self._loop = _loop(os.getpid())
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx2.Timeout(None, connect=min(timeout, CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=not direct and not is_this_machine(urlsplit(url).hostname or ""),
            verify=tls or True,
        )

    def request(self, method: str, url: str, timeout: float | None = None, **content: Any) -> Answer:
        """A server's answer, whatever its status; redirects are not followed. Raises NoAnswer.

        timeout: seconds, if not the client's. content: `content` bytes or `json` a value, as httpx2 takes them.
        """
        seconds = self.timeout if timeout is None else timeout
        return asyncio.run_coroutine_threadsafe(self._request(method, url, seconds, content), self._loop).result()

    async def _request(self, method: str, url: str, seconds: float, content: dict[str, Any]) -> Answer:
        data = bytearray()
        try:
            async with asyncio.timeout(seconds), self._client.stream(method, url, **content) as response:
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > MOST_BYTES:
                        raise NoAnswer(f"the answer has more than {MOST_BYTES} bytes")
        except TimeoutError:
            raise NoAnswer(f"no whole answer in {seconds:.3g} s") from None
        except httpx2.RequestError as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from None
        after = response.headers.get("retry-after", "")
        return Answer(response.status_code, bytes(data), float(after) if after.isdecimal() and len(after) < 10 else 0.0)


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all clients of a process, in a thread; a forked process has no threads, and so gets another."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="clients", daemon=True).start()
    return loop


def trusting(ca_file: str, key: str) -> ssl.SSLContext:
    """Trust in the certificates that the authorities in a PEM file signed; ValueError with the key where it holds none."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one too
        raise ValueError(f"{key} = {ca_file!r}: {error.strerror or error}; name a PEM file of certificates") from None


def token_from(variable: str, key: str) -> str:
    """The token in an environment variable; ValueError with the key, and never with the token, where it is none."""
    token, where = os.environ.get(variable), f"{key} = {variable!r}: this environment variable"
    if not token:
        raise ValueError(f"{where} is not set")
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(f"{where} holds what no header can carry, such as a space, a line's end or an accent")
    return token


def checked_url(url: str, key: str) -> str:
    """The address without a slash at its end, or a ValueError with the key, the value and the fix."""
    where = f"{key} = {url!r}"
    if "@" in url:
        raise ValueError(f"{key}: has an @, before which a name or a password stands that errors would show; leave it out")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{where}: is no address ({error}); write one such as http://127.0.0.1:8000") from None
    if parts.scheme not in SCHEMES or "://" not in url:
        fix = f"write http://{url.rpartition('//')[2]}" if url else "write one such as http://127.0.0.1:8000"
        raise ValueError(f"{where}: is no address, which begins with http:// or https://; {fix}")
    if not host or port == 0 or not url.isprintable() or any(character.isspace() for character in url):
        raise ValueError(f"{where}: has no valid host and port; write one such as http://127.0.0.1:8000")
    if parts.query or parts.fragment:
        raise ValueError(f"{where}: ends in ? or #, after which no path can follow; leave it out")
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{where}: is no address ({error}); write one such as http://127.0.0.1:8000") from None
    return url.rstrip("/")


def is_this_machine(host: str) -> bool:
    """Whether a client that asks this host asks its own machine, which 0.0.0.0 and :: mean too."""
    return is_loopback(host) or getattr(_address(host), "is_unspecified", False)


def is_loopback(host: str) -> bool:
    """Whether a host can be reached from this machine alone."""
    named = host == "localhost" or host.endswith(".localhost")
    return named or getattr(_address(host), "is_loopback", False)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as, None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
