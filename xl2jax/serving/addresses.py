"""Downloads files from the public internet: a name is resolved once, and addresses of private networks are refused."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore2

from xl2jax.serving.errors import RequestError

REDIRECTS = 3
HEADERS = [("Accept", "video/*, image/*, */*"), ("Accept-Encoding", "identity"), ("User-Agent", "xl2jax")]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IDLE_SECONDS = 30.0


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it stands for an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def _checked_address(host: str, port: int, is_allowed: Callable[[str], bool]) -> str:
    """The address of a host. Raises RequestError unless all of its addresses are allowed."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise unknown_host() from None
    return checked_address(found, is_allowed)


def checked_address(found: Iterable[Any], is_allowed: Callable[[str], bool]) -> str:
    """The first address that `getaddrinfo` found. Raises RequestError unless all of them are allowed."""
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not addresses or not all(map(is_allowed, addresses)):
        raise refused("the video's address leads into a private network")
    return addresses[0]


class _CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to the addresses that a name had when it was checked, so that a second answer of its server is never used."""

    def __init__(self, is_allowed: Callable[[str], bool]):
        self._is_allowed, self._network = is_allowed, httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        address = await _checked_address(host, port, self._is_allowed)
        return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        raise refused("the video's address leads to no host")

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


def unknown_host() -> RequestError:
    """The error for a name that has no address."""
    return refused("the host of the video's address is not known")


def refused(message: str) -> RequestError:
    """The error for an address that may not be read."""
    return RequestError(400, message, code="media_refused")


@dataclasses.dataclass(frozen=True)
class Downloads:
    """Which addresses are downloaded, and within what limits.

    domains: names of hosts that are allowed, with those below them; None allows any.
    is_allowed: whether an IP address may be connected to.
    """

    domains: tuple[str, ...] | None
    max_bytes: int
    max_seconds: float
    is_allowed: Callable[[str], bool] = is_public

    async def fetch(self, url: str, target: Path) -> None:
        """Writes the file at an http or https address to `target`, following at most three redirects.

        Raises RequestError for an address that is not allowed, an answer that is not a file, and beyond the limits.
        """
        try:
            async with (
                asyncio.timeout(self.max_seconds),
                httpcore2.AsyncConnectionPool(network_backend=_CheckedNetwork(self.is_allowed)) as pool,
            ):
                for _ in range(REDIRECTS + 1):
                    self.check(url)
                    following = await self._get(pool, url, target)
                    if following is None:
                        return
                    url = following
                raise too_far()
        except TimeoutError:
            raise RequestError(
                400, f"the video was not downloaded within {self.max_seconds:g} s", code="media_timeout"
            ) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException):
            raise unreachable() from None

    async def check_host(self, url: str) -> None:
        """Raises RequestError for an address that is not allowed, or whose host has an address that is not."""
        self.check(url)
        parts = urlsplit(url)
        await _checked_address(parts.hostname or "", parts.port or 0, self.is_allowed)

    def check(self, url: str) -> None:
        """Raises RequestError unless an address is one of http or https, of an allowed host."""
        try:
            parts = urlsplit(url)
            host, _ = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise refused("the video's address is not one") from None
        if not url.isprintable():  # it may be logged
            raise refused("the video's address has characters that no address has")
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
            raise refused("the video's address should be https://HOST/PATH, without a name or password")
        allowed = self.domains is None or any(host == d or host.endswith(f".{d}") for d in self.domains)
        if not allowed:
            raise refused("videos of this host are not allowed here (--allow-media-domain of the server)")

    async def _get(self, pool: httpcore2.AsyncConnectionPool, url: str, target: Path) -> str | None:
        """Downloads one address, or returns the one that it leads on to."""
        idle = dict.fromkeys(("connect", "read", "write", "pool"), _IDLE_SECONDS)
        try:
            stream = pool.stream("GET", url, headers=HEADERS, extensions={"timeout": idle})
        except (ValueError, TypeError):
            raise refused("the video's address is not one") from None
        async with stream as response:
            answered = {name.lower(): value for name, value in response.headers}
            if (following := redirected(url, response.status, answered)) is not None:
                return following
            count = 0
            with open(target, "wb") as out:
                async for block in response.aiter_stream():
                    count += len(block)
                    if count > self.max_bytes:
                        raise too_large(self.max_bytes)
                    await asyncio.to_thread(out.write, block)
        return None


def too_large(limit: int) -> RequestError:
    """The error for a video of more than `limit` bytes."""
    return RequestError(413, f"the video has more than the {limit:,} bytes that are read", code="video_too_large")


def redirected(url: str, status: int, headers: Mapping[bytes, bytes]) -> str | None:
    """Where an answer leads on to, or None where it is the file. Raises RequestError for any other status."""
    if status in (301, 302, 303, 307, 308) and b"location" in headers:
        return urljoin(url, headers[b"location"].decode("latin-1"))
    if status != 200:
        raise RequestError(400, f"the video's address answers with status {status}", code="media_unreachable")
    return None


def too_far() -> RequestError:
    """The error for an address that leads on to others more than `REDIRECTS` times."""
    return refused("the video's address leads on to others too often")


def unreachable() -> RequestError:
    """The error for an address that does not answer."""
    return RequestError(400, "the video could not be downloaded", code="media_unreachable")
