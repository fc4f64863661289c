"""Frames of a stream, a device, a pipe or a file that is read once, through PyAV (FFmpeg).

What goes wrong on the way is not an error: damaged packets are skipped, and a stream that is cut off is opened anew. An
address that gives no frame at all is one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from xl2jax.errors import UserError, first_line
from xl2jax.video.containers import MAX_PIXELS
from xl2jax.video.readers import upright

logger = logging.getLogger(__name__)

_PROTOCOLS = "http,https,tcp,tls,crypto,udp,rtp,rtsp,rtsps,rtmp,rtmps,srt,hls,data,httpproxy"
"""What an address may make FFmpeg open. A playlist from elsewhere cannot name files of this machine."""

_FORMATS = "hls,mpegts,mpeg,flv,live_flv,matroska,webm,mov,mp4,mpjpeg,mjpeg,mpegvideo,h264,hevc,ogg,avi,nut"
"""What is read where FFmpeg opens nothing itself. Of these, playlists (hls) name what else is opened."""

_LONGEST_WAIT = 30.0
_LOOK_AGAIN = 0.05  # seconds


class Readable(Protocol):
    """An open address.

    Attributes:
      url: the address at the end of all redirects, to which names in a playlist are relative.
      length: bytes, where they are known: a recording, which ends.
      is_playlist: whether the server says that it is one (hls).
    """

    url: str
    length: int | None
    is_playlist: bool

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


type Connect = Callable[[str, threading.Event], Readable]
"""Opens an address. Once the event is set, nothing waits for its bytes any more."""


def address_of(text: str | Path) -> str:
    """The address that a path stands for: pathlib merges two slashes into one."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", str(text))
    return f"{match[1]}://{str(text)[match.end() :]}" if match else str(text)


class Stream:
    """The frames of an address, as `Model.watch_live` takes them: (seconds by the stream's clock, function that decodes).

    Attributes:
      address: a URL, the path of a file, a pipe or a device, or `-` for standard input.
      is_url: whether frames come as they are taken, and a cut stream is opened anew.
      follow: whether a file may still be written, so that its end is waited at.
      damaged: packets that could not be decoded.
      opened: how often the address was opened with success.
    """

    def __init__(
        self,
        address: str | Path,
        *,
        follow: bool = False,
        retries: int = 6,
        first_wait: float = 1.0,
        timeout: float = 15.0,
        connect: Connect | None = None,
    ):
        """`follow`: the address is a file that another program is writing. It may be empty yet, and it has ended when nothing
        was added for `timeout` seconds. `retries`: how often in a row a URL is tried again before the stream counts as
        ended. The waits between begin with `first_wait` seconds and double, up to half a minute. `timeout`: seconds
        without data after which a URL counts as cut off. `connect` opens the address, and what a playlist names, so that
        FFmpeg itself opens nothing; only formats of streams are then read. A UserError of it ends the stream.

        Raises UserError for a protocol that is not read, and for a local path that cannot be one.
        """
        self.address = address_of(address)
        self.is_url, self.follow = "://" in self.address, follow
        self.damaged = self.opened = 0
        self._retries, self._first_wait, self._timeout, self._connect = retries, first_wait, timeout, connect
        self._length: int | None = None
        self._closed = threading.Event()
        self.on_reopen: Callable[[], None] = lambda: None
        if self.is_url and (protocol := self.address.partition("://")[0].lower()) not in _PROTOCOLS.split(","):
            raise UserError(f"{self.address}: {protocol}:// is not read: give a path, or one of {_PROTOCOLS}")
        if not self.is_url and self.address != "-":
            path = Path(self.address)
            if not path.exists():
                raise UserError(f"{self.address}: no such video")
            if path.is_dir() or (path.is_file() and not path.stat().st_size and not follow):
                raise UserError(f"{self.address}: {'a folder' if path.is_dir() else 'empty'}, not a video")
        if follow and (self.is_url or not Path(self.address).is_file()):
            raise UserError(f"{self.address}: is no file: only files that are being written are followed")

    def close(self) -> None:
        """Ends the stream, from any thread, within the timeout."""
        self._closed.set()

    def __iter__(self) -> Iterator[tuple[float | None, Callable[[], np.ndarray | None]]]:
        failures, seen = 0, False
        while not self._closed.is_set():
            reason, got = "the stream ended", False
            try:
                for item in self._once():
                    failures, got = 0, True
                    yield item
                    if self._closed.is_set():
                        return
                if not self.is_url or self._is_whole:
                    if not (seen or got):
                        raise UserError(f"{self.address}: holds no video that can be read")
                    return
            except _Failure as e:
                reason = str(e)
                if not self.is_url:
                    if seen or got:
                        logger.warning("%s: ended early (%s)", self.address, reason)
                        return
                    raise UserError(f"{self.address}: not a video that can be read ({reason})") from None
            if self._closed.is_set():
                return
            seen |= got
            if failures == self._retries:
                if seen:
                    logger.warning("%s: ended (%s; tried %d more times)", self.address, reason, failures)
                    return
                raise UserError(f"{self.address}: gives no video ({reason}; tried {failures + 1} times)")
            wait = min(self._first_wait * 2**failures, _LONGEST_WAIT)
            failures += 1
            logger.warning("%s: %s: trying again in %.3g s", self.address, reason, wait)
            self._closed.wait(wait)
            self.on_reopen()

    def _once(self) -> Iterator[tuple[float | None, Callable[[], np.ndarray | None]]]:
        """The frames of one connection. Raises _Failure where it breaks."""
        import av

        self._is_whole, self._length = False, None
        options = {"protocol_whitelist": _PROTOCOLS, "rtsp_transport": "tcp"} if self.is_url else {}
        name: Any = (
            self.address
            if self.is_url
            else "pipe:0"
            if self.address == "-"
            else f"file:{Path(self.address).absolute()}"
        )
        others: dict[str, Any] = {}
        with contextlib.ExitStack() as opened:
            try:
                if self.follow:
                    name = _GrowingFile(opened.enter_context(open(self.address, "rb")), self._timeout, self._closed)
                if (connect := self._connect) is not None:
                    # What is opened past `connect` is refused, whatever makes FFmpeg open it.
                    options = {"protocol_whitelist": "none", "format_whitelist": _FORMATS, "http_persistent": "0"}
                    first = connect(self.address, self._closed)
                    opened.callback(first.close)  # FFmpeg leaves it open where it is no video
                    name, self._length, waiting = first.url, first.length, [first]
                    others["io_open"] = lambda url, flags, options: (
                        waiting.pop() if waiting else connect(url, self._closed)
                    )
                    if first.is_playlist:
                        others["format"] = "hls"
                timeout = self._timeout if self.is_url else None
                container = opened.enter_context(av.open(name, options=options, timeout=timeout, **others))
            except UserError:
                raise
            except Exception as e:  # on damaged data PyAV raises others besides its own errors
                raise _Failure(first_line(e)) from None
            stream: Any = container.streams.best("video")
            if stream is None:
                raise _Failure("it holds no video")
            self.opened += 1
            # A recording, which is not watched again when it ends. The size of a playlist is not that of its video.
            known = (container.size or 0) > 0 or self._length is not None
            self._is_whole = bool(container.duration) or (known and container.format.name != "hls")
            # Threads by frame would hold frames back.
            stream.thread_type = "SLICE" if self.is_url or self.follow else "AUTO"
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            packets = container.demux(stream)
            while not self._closed.is_set():
                try:
                    packet = next(packets, None)
                except UserError:
                    raise
                except av.ExitError:
                    raise _Failure(f"no data for {self._timeout:g} s") from None
                except Exception as e:
                    raise _Failure(first_line(e)) from None
                if packet is None:  # the packet before it, an empty one, gave the last frames
                    return
                yield from self._decoded(stream, packet)

    def _decoded(self, stream: Any, packet: Any) -> Iterator[tuple[float | None, Callable[[], np.ndarray | None]]]:
        try:
            decoded = stream.codec_context.decode(packet)
        except Exception as e:
            logger.debug("%s: %r", self.address, e)
            self.damaged += 1
            return
        for frame in decoded:
            yield frame.time, functools.partial(self._picture, frame)

    def _picture(self, frame: Any) -> np.ndarray | None:
        try:
            return upright(frame)
        except Exception as e:
            logger.debug("%s: %r", self.address, e)
            self.damaged += 1
            return None


class _GrowingFile:
    """A file that is still written, for PyAV: at its end it waits for more, and ends after `timeout` seconds without.

    FFmpeg's own way to follow a file cuts off what a packet lacks at that moment.
    """

    def __init__(self, file: IO[bytes], timeout: float, closed: threading.Event):
        self._file, self._timeout, self._closed = file, timeout, closed
        self._over = False

    def read(self, size: int) -> bytes:
        waited_since = time.monotonic()
        while not (data := self._file.read(size)) and not self._over:
            late = time.monotonic() - waited_since >= self._timeout
            self._over = late or self._closed.wait(_LOOK_AGAIN)  # FFmpeg reads several times at the end
        return data


class _Failure(Exception):
    """Why a connection gave no more frames."""


class Buffer[T]:
    """Hands items from a thread that may not wait to one that takes its time.

    Where `size` items wait, the oldest one is dropped for a new one: what is newest matters most.

    Attributes:
      dropped: how many were.
    """

    def __init__(self, size: int):
        self._size, self._items = size, list[T]()
        self._changed, self._ended = threading.Condition(), False
        self.dropped = 0

    def put(self, item: T) -> None:
        with self._changed:
            self._items.append(item)
            if len(self._items) > self._size:
                del self._items[0]
                self.dropped += 1
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self, timeout: float, most: int | None = None) -> list[T] | None:
        """Up to `most` of the items that wait, after up to `timeout` seconds; None where there will be no more."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._items and not self._ended and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            if not self._items and self._ended:
                return None
            items, self._items = self._items[:most], [] if most is None else self._items[most:]
            return items
