"""Downloads files from the public internet: a name is resolved once, and addresses of private networks are refused."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpcore2

from xl2jax.serving.errors import RequestError

_REDIRECTS = 3
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
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise _refused("the host of the video's address is not known") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise _refused("the video's address leads into a private network")
        return await self._network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        raise _refused("the video's address leads to no host")

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


def _refused(message: str) -> RequestError:
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
                for _ in range(_REDIRECTS + 1):
                    self._check(url)
                    following = await self._get(pool, url, target)
                    if following is None:
                        return
                    url = following
                raise _refused("the video's address leads on to others too often")
        except TimeoutError:
            raise RequestError(
                400, f"the video was not downloaded within {self.max_seconds:g} s", code="media_timeout"
            ) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException):
            raise RequestError(400, "the video could not be downloaded", code="media_unreachable") from None

    def _check(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            host, _ = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise _refused("the video's address is not one") from None
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
            raise _refused("the video's address should be https://HOST/PATH, without a name or password")
        allowed = self.domains is None or any(host == d or host.endswith(f".{d}") for d in self.domains)
        if not allowed:
            raise _refused("videos of this host are not allowed here (--allow-media-domain of the server)")

    async def _get(self, pool: httpcore2.AsyncConnectionPool, url: str, target: Path) -> str | None:
        """Downloads one address, or returns the one that it leads on to."""
        headers = [("Accept", "video/*, image/*, */*"), ("Accept-Encoding", "identity"), ("User-Agent", "xl2jax")]
        idle = dict.fromkeys(("connect", "read", "write", "pool"), _IDLE_SECONDS)
        try:
            stream = pool.stream("GET", url, headers=headers, extensions={"timeout": idle})
        except (ValueError, TypeError):
            raise _refused("the video's address is not one") from None
        async with stream as response:
            answered = {name.lower(): value for name, value in response.headers}
            if response.status in (301, 302, 303, 307, 308) and b"location" in answered:
                return urljoin(url, answered[b"location"].decode("latin-1"))
            if response.status != 200:
                raise RequestError(
                    400, f"the video's address answers with status {response.status}", code="media_unreachable"
                )
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
