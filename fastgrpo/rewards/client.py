"""How rewards talk to servers: one kind of client for all of them, and addresses that are checked before they are asked."""

import ipaddress
from urllib.parse import urlsplit

try:
    import httpx2
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("httpx2 is not installed: pip install 'fastgrpo[serve]' or 'fastgrpo[judge]'") from error

SCHEMES = ("http", "https")
Client = httpx2.Client
NoAnswer = httpx2.RequestError  # what a client raises where there was no answer, or none that could be read


def make_client(
    url: str,
    *,
    token: str | None = None,
    timeout: float,
    connect: float | None = None,
    connections: int = 100,
    direct: bool = False,
) -> Client:
    """A client for the servers at one address, or for several like it.

    token: the bearer's. timeout: seconds without a sign of the server. connect: seconds to reach it, if not those.
    connections: at once, at most.
    direct: past the proxy that the environment names; to this machine itself it always goes directly.

    Raises ValueError for a token that no header can carry: what is raised when it is sent would show it.
    """
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(f"the token for {url} has spaces, line ends or letters beyond ASCII, which no header can carry")
    return httpx2.Client(
        headers={"Authorization": f"Bearer {token}"} if token else {},
        timeout=httpx2.Timeout(timeout, connect=timeout if connect is None else connect),
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        trust_env=not direct and not is_loopback(urlsplit(url).hostname or ""),
    )


def checked_url(url: str, key: str) -> str:
    """The address without a slash at its end, or a ValueError with the key, the value and the fix."""
    where = f"{key} = {url!r}"
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


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified
