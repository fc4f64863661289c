"""Reads live videos from addresses, by the rules of downloads. FFmpeg gets the bytes and opens no connection itself."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpcore2

from xl2jax.errors import UserError
from xl2jax.serving.addresses import (
    HEADERS,
    REDIRECTS,
    Downloads,
    checked_address,
    redirected,
    too_far,
    unknown_host,
    unreachable,
)
from xl2jax.serving.errors import RequestError

_SECONDS = 15.0  # without a byte, after which an address counts as cut off
_PLAYLIST_BYTES = 1 << 20


class _EndingStream(httpcore2.NetworkStream):
    """A connection of which nothing more is read once `closed` is set, however slowly bytes come."""

    def __init__(self, stream: httpcore2.NetworkStream, closed: threading.Event):
        self._stream, self._closed = stream, closed

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._closed.is_set():
            raise httpcore2.ReadError("the video was closed")
        return self._stream.read(max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _EndingStream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._closed)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _CheckedNetwork(httpcore2.NetworkBackend):
    """Connects to addresses that were checked, as `addresses` does for downloads, until `closed` is set."""

    def __init__(self, is_allowed: Callable[[str], bool], closed: threading.Event):
        self._is_allowed, self._closed, self._network = is_allowed, closed, httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise unknown_host() from None
        address = checked_address(found, self._is_allowed)
        opened = self._network.connect_tcp(address, port, timeout, local_address, socket_options)
        return _EndingStream(opened, self._closed)


class OpenAddress:
    """The bytes of an http or https address, as `Stream` reads them. At most three redirects are followed.

    Attributes:
      url: where the redirects lead to.
      length: how many there are, where the server says so.
      is_playlist: whether the server says that they are a playlist.
    """

    def __init__(self, downloads: Downloads, url: str, closed: threading.Event):
        """Raises UserError where the address is not allowed, and RequestError where it does not answer, or not before
        `closed` is set."""
        self._rest, self._count, self._is_playlist = b"", 0, False
        with contextlib.ExitStack() as opened:
            try:
                network = _CheckedNetwork(downloads.is_allowed, closed)
                pool = opened.enter_context(httpcore2.ConnectionPool(network_backend=network))
                response = self._get(opened, pool, downloads, url)
            except RequestError as e:
                if e.code == "media_refused":
                    raise UserError(e.message) from None
                raise
            except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, ValueError, TypeError):
                raise unreachable() from None
            headers = {name.lower(): value for name, value in response.headers}
            length = headers.get(b"content-length", b"")
            self.length = int(length) if length.isdigit() else None
            self.is_playlist = b"mpegurl" in headers.get(b"content-type", b"").lower()
            self._blocks: Iterator[bytes] = response.iter_stream()
            self._opened = opened.pop_all()

    def _get(
        self, opened: contextlib.ExitStack, pool: httpcore2.ConnectionPool, downloads: Downloads, url: str
    ) -> httpcore2.Response:
        idle = dict.fromkeys(("connect", "read", "write", "pool"), _SECONDS)
        for _ in range(REDIRECTS + 1):
            downloads.check(url)
            response = opened.enter_context(pool.stream("GET", url, headers=HEADERS, extensions={"timeout": idle}))
            following = redirected(url, response.status, {name.lower(): value for name, value in response.headers})
            if following is None:
                self.url = url
                return response
            url = following
        raise too_far()

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end. Raises RequestError where the connection breaks."""
        if not self._rest:
            try:
                self._rest = next(self._blocks, b"")
            except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException):
                raise RequestError(400, "the connection was cut off", code="media_unreachable") from None
            self._is_playlist |= self._count == 0 and self._rest.startswith(b"#EXTM3U")
            self._count += len(self._rest)
            if self._is_playlist and self._count > _PLAYLIST_BYTES:  # FFmpeg keeps all of it in memory
                raise UserError(f"the playlist has more than the {_PLAYLIST_BYTES:,} bytes that are read")
        part, self._rest = self._rest[:size], self._rest[size:]
        return part

    def close(self) -> None:
        self._opened.close()
