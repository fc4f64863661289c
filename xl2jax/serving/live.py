"""Live videos of clients. Frames come over a WebSocket or from an address, and the engine's thread watches them.

Other threads decode frames, which then wait (`LiveVideo.offer`). Only the engine's thread uses the device: it opens and
closes live videos, and watches a step of one of them between its other work.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from xl2jax.errors import NotEnoughMemory, UserError
from xl2jax.inference.api import Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.live import LiveVideo
from xl2jax.inference.live_sizes import LiveMemory
from xl2jax.serving.errors import RequestError, internal_error, public_error, request_error, shutting_down
from xl2jax.serving.limits import Limits
from xl2jax.serving.metrics import Metrics
from xl2jax.serving.videos import WatchedVideos
from xl2jax.video.image_files import decode_image
from xl2jax.video.live_clock import ClockMode
from xl2jax.video.live_source import Connect, Stream

logger = logging.getLogger(__name__)

LIVE_ID = re.compile(r"live_[0-9a-f]{32}")
"""Ids of live videos, which stand where a chat request has the `uuid` of a video."""


@dataclasses.dataclass(frozen=True)
class LiveSettings:
    """What a client asks for. Without a `url`, frames come over a WebSocket."""

    url: str | None
    fps: float
    clock: ClockMode
    dense_minutes: float
    minutes: float
    host_gib: float


class LiveSession:
    """A live video of a client.

    Attributes:
      id, settings, created_at, expires_at: `time.time()` seconds.
      opened: done when the engine has opened it; then `video` is there.
      feeder: stands for the connection that feeds it now.
      turn: of its connections, so that those that wait for each other hold none of the threads that others need.
      received, damaged: images that came over a WebSocket, and those of them that could not be read.
      connections: how often a client connected.
      over: why it has ended for everybody, once it has.
    """

    video: LiveVideo

    def __init__(self, settings: LiveSettings, limits: Limits, connect: Connect | None):
        """`connect`: opens addresses, where `settings` has one."""
        self.id = f"live_{secrets.token_hex(16)}"
        self.settings, self._limits, self._connect = settings, limits, connect
        self.created_at = time.time()
        self.expires_at = self.created_at + limits.live.seconds
        self.opened: Future[None] = Future()
        self.feeder: object | None = None
        self.turn = asyncio.Lock()
        self.received = self.damaged = self.connections = 0
        self.over: str | None = None
        self._failure: str | None = None
        self._counted = (0, 0)
        self._active = time.monotonic()

    def touch(self) -> None:
        """Says that the session is used."""
        self._active = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        return time.monotonic() - self._active

    # --- frames ---------------------------------------------------------------------------------

    def connect(self) -> object:
        """Lets a new connection feed the session, in place of an earlier one: what stands for it.

        The time between two connections is counted by this machine's clock.
        """
        self.touch()
        self.connections += 1
        if self.connections > 1:
            self.video.interrupted()
        self.feeder = object()
        return self.feeder

    def feed(self, data: bytes, seconds: float | None) -> None:
        """Adds an image file, dated `seconds` by the client's clock. One that cannot be read is counted.

        Raises UserError where the video cannot be watched any more.
        """
        self.touch()
        self.received += 1

        def picture() -> Any:
            try:
                return decode_image(data, self._limits.frame_pixels)
            except UserError:
                self.damaged += 1
                return None

        self.video.offer(seconds, picture)

    def read(self) -> None:
        """Reads the address to its end."""
        try:
            self.video.read()
        except Exception as e:  # the session's state says it
            if not isinstance(e, UserError):
                logger.error("the address of a live video could not be read", exc_info=e)

    # --- in the engine's thread -------------------------------------------------------------------

    def open(self, model: Model, bilevel: BilevelConfig, videos: WatchedVideos, wake: Callable[[], None]) -> None:
        """Makes the video. Raises UserError or RequestError."""
        asked, cache = self.settings, videos.cache
        memory = LiveMemory(
            asked.dense_minutes, asked.minutes, asked.host_gib, pooled_dtype="int8" if cache.quantized else None
        )
        options: Any = {
            "fps": asked.fps,
            "config": videos.prefill,
            "bilevel": bilevel,
            "cache": cache,
            "memory": memory,
        }
        if not videos.make_room(model.live_sizes(**options).kept, "a live video"):
            raise RequestError(503, "the memory for videos is in use: try again later", code="no_room", retry_after=10)
        source = None if asked.url is None else Stream(asked.url, connect=self._connect)
        while True:
            try:
                self.video = model.watch_live(source, clock=asked.clock, **options)
                break
            except NotEnoughMemory:
                if not videos.free_some():
                    raise
        videos.reserve_live(self.video.device_bytes)
        self.video.path = self.id
        self.video.on_offer = self._offered(wake)
        if source is not None:
            threading.Thread(target=self.read, daemon=True, name=f"read {self.id}").start()

    def _offered(self, wake: Callable[[], None]) -> Callable[[], None]:
        def offered() -> None:
            self.touch()
            wake()

        return offered

    def step(self, metrics: Metrics) -> bool:
        """Watches a step. Returns whether a frame waited."""
        started = time.monotonic()
        try:
            if not self.video.step():
                return False
        except Exception as e:
            self._failure = request_error(e).message
            return False
        metrics.watch_seconds.inc(time.monotonic() - started)
        self.count(metrics)
        return True

    def count(self, metrics: Metrics) -> None:
        """Counts what happened since the last time."""
        now = self.video.frames, self.video.dropped
        metrics.live_frames.inc(now[0] - self._counted[0])
        metrics.live_dropped.inc(now[1] - self._counted[1])
        self._counted = now

    def close(self, videos: WatchedVideos) -> None:
        """Frees the memory of the video."""
        if not self.video.closed:
            videos.reserve_live(-self.video.device_bytes)
            self.video.close()

    # --- what is known about it -------------------------------------------------------------------

    @property
    def state(self) -> Literal["watching", "ended", "failed"]:
        if self.reason is not None:
            return "failed"
        return "ended" if self.video.finished else "watching"

    @property
    def reason(self) -> str | None:
        """Why it failed, if it did."""
        error = self.video.error
        if self._failure is not None or error is None:
            return self._failure
        if isinstance(error, UserError):
            return public_error(error, [] if self.settings.url is None else [self.settings.url]).message
        return internal_error().message

    @property
    def is_lost(self) -> bool:
        """Whether it failed and can be asked nothing."""
        return self._failure is not None or (
            self.video.error is not None and self.video.finished and not self.video.frames
        )

    @property
    def progress(self) -> dict[str, Any]:
        video = self.video
        return {
            "state": self.state,
            "seconds": video.seconds,
            "frames": video.frames,
            "received": self.received,
            "dropped": video.dropped,
            "late": video.clock.late,
            "damaged": self.damaged,
            "gaps": video.gaps,
        }

    def describe(self) -> dict[str, Any]:
        """The session as JSON."""
        video = self.video
        used = {
            "url": self.settings.url,
            "fps": self.settings.fps,
            "clock": self.settings.clock,
            "dense_minutes": round(video.sizes.dense_minutes, 3),
            "minutes": round(video.sizes.minutes, 3),
            "host_gib": self.settings.host_gib,
        }
        return {
            "id": self.id,
            "object": "live",
            "created_at": int(self.created_at),
            "expires_at": int(self.expires_at),
            "idle_seconds": self._limits.live.idle_seconds,
            "socket": None if self.settings.url else f"/v1/live/{self.id}/frames",
            "settings": used,
            **self.progress,
            "reason": self.reason,
            "connections": self.connections,
            "bytes": {"device": video.device_bytes, "host": video.host_bytes},
        }


class LiveSessions:
    """The live videos of a server.

    Attributes:
      wake: wakes the engine's thread.
    """

    def __init__(
        self, model: Model, videos: WatchedVideos, limits: Limits, metrics: Metrics, *, bilevel: BilevelConfig | None
    ):
        """`bilevel`: how questions read them."""
        self._model, self._videos, self._limits, self._metrics = model, videos, limits, metrics
        self._bilevel = bilevel or BilevelConfig()
        self._sessions: dict[str, LiveSession] = {}
        self._new: collections.deque[LiveSession] = collections.deque()
        self._open: collections.deque[LiveSession] = collections.deque()  # that of whose turn it is first
        self._lock = threading.Lock()
        self._closed = False
        self.wake: Callable[[], None] = lambda: None

    # --- from other threads -----------------------------------------------------------------------

    def open(self, settings: LiveSettings, connect: Connect | None = None) -> LiveSession:
        """Begins a session. It can be used when it is `opened`. Raises RequestError where there are too many."""
        session = LiveSession(settings, self._limits, connect)
        most = self._limits.live.sessions
        with self._lock:
            if self._closed:
                raise shutting_down()
            if len(self._sessions) >= most:
                raise RequestError(
                    429,
                    f"{most} live videos are open: end one of them, or try again later",
                    code="too_many_live_videos",
                    retry_after=30,
                )
            self._sessions[session.id] = session
            self._new.append(session)
        self.wake()
        return session

    def get(self, name: str) -> LiveSession:
        """A session that is open. Raises RequestError with status 404."""
        session = self._sessions.get(name)
        if session is None or not session.opened.done():
            raise unknown_live()
        return session

    def list(self) -> list[LiveSession]:
        """The open sessions, the newest first."""
        with self._lock:
            found = [session for session in self._sessions.values() if session.opened.done()]
        return found[::-1]

    def end(self, session: LiveSession, why: str) -> None:
        """Ends a session for everybody. The engine frees its memory."""
        session.over = session.over or why
        with self._lock:
            self._sessions.pop(session.id, None)
        self.wake()

    # --- in the engine's thread -------------------------------------------------------------------

    @property
    def any(self) -> bool:
        """Whether there are any, so that their time has to be watched."""
        return bool(self._open or self._new)

    def tend(self) -> None:
        """Opens new sessions, and closes those that have ended or are not used."""
        limits = self._limits.live
        for session in list(self._open):
            if session.idle_seconds > limits.idle_seconds:
                self.end(session, f"no frame and no question came for {limits.idle_seconds:g} s")
            elif time.time() > session.expires_at:
                self.end(session, f"it was open for {limits.seconds:g} s")
            if session.over is not None or session.is_lost:
                session.count(self._metrics)
                session.close(self._videos)
            if session.over is not None:
                self._open.remove(session)
        while self._new:
            session = self._new.popleft()
            if not session.opened.set_running_or_notify_cancel():
                self.end(session, "nobody waited for it")
                continue
            try:
                session.open(self._model, self._bilevel, self._videos, self.wake)
            except Exception as e:
                self.end(session, "it could not be opened")
                session.opened.set_exception(request_error(e, too_large="live_too_large"))
            else:
                self._open.append(session)
                session.opened.set_result(None)
        self._metrics.live_videos.set(len(self._open))

    def step(self) -> bool:
        """Watches a step of the session whose turn it is. Returns whether there was one."""
        for _ in range(len(self._open)):
            session = self._open[0]
            self._open.rotate(-1)
            if not session.video.closed and session.step(self._metrics):
                return True
        return False

    def close(self) -> None:
        """Ends all sessions."""
        with self._lock:
            self._closed = True
        error = shutting_down()
        while self._new:
            session = self._new.popleft()
            self.end(session, error.message)
            if session.opened.set_running_or_notify_cancel():
                session.opened.set_exception(error)
        for session in self._open:
            self.end(session, error.message)
        self.tend()


def unknown_live() -> RequestError:
    """The error for the id of no live video."""
    return RequestError(
        404,
        "no live video of this id is open: it was ended, or nobody used it for too long",
        code="live_not_found",
    )
