"""What the HTTP interface works with, and the bounded queue of its requests."""

from __future__ import annotations

import dataclasses
import math
import time

from starlette.requests import HTTPConnection

from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.prompt import PromptTokenizer
from xl2jax.serving.engine import Engine
from xl2jax.serving.errors import RequestError, not_kept, shutting_down
from xl2jax.serving.limits import Limits
from xl2jax.serving.live import LIVE_ID, LiveSessions
from xl2jax.serving.media import Library
from xl2jax.serving.metrics import Metrics
from xl2jax.serving.partial import PartialUploads
from xl2jax.serving.uploads import Uploads
from xl2jax.serving.videos import WatchedVideos
from xl2jax.video.frame_sampling import FrameSampling


@dataclasses.dataclass
class Service:
    """What the HTTP interface works with.

    model: its name for clients. hosts: allowed values of the Host header, without a port; None allows any.
    draining: no new request is admitted.
    """

    model: str
    tokenizer: PromptTokenizer
    engine: Engine
    videos: WatchedVideos
    library: Library
    uploads: Uploads
    partial: PartialUploads
    live: LiveSessions
    limits: Limits
    metrics: Metrics
    bilevel: BilevelConfig | None
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    draining: bool = False
    in_flight: int = 0
    mean_seconds: float = 1.0
    """Of the latest requests, weighted towards the newest."""

    def __post_init__(self) -> None:
        self._named: dict[str, tuple[str, FrameSampling, float | None]] = {}

    def remember(self, uuid: str, content: str, frames: FrameSampling, folder_fps: float | None) -> None:
        """Gives a video a name for later requests. The oldest of very many names are forgotten.

        Raises RequestError for a name that a live video may have.
        """
        if LIVE_ID.fullmatch(uuid):
            raise RequestError(400, "messages: this uuid is the id of a live video", param="messages")
        self._named.pop(uuid, None)
        self._named[uuid] = (content, frames, folder_fps)
        if len(self._named) > 100_000:
            del self._named[next(iter(self._named))]

    def named(self, uuid: str) -> tuple[str, FrameSampling, float | None]:
        """The content, frames and folder rate of a named video. Raises RequestError with status 404."""
        if uuid not in self._named:
            raise not_kept()
        return self._named[uuid]


def service_of(request: HTTPConnection) -> Service:
    """The service that a request came to."""
    service: Service = request.app.state.service
    return service


class Place:
    """A request's place in the bounded queue, until `leave`."""

    def __init__(self, service: Service):
        limit = service.limits.queue
        if service.draining:
            raise shutting_down()
        if service.in_flight >= limit:
            wait = math.ceil(service.mean_seconds * limit / max(service.limits.answers, 1))
            raise RequestError(
                429, f"{limit} requests are waiting: try again later", code="queue_full", retry_after=min(wait, 600)
            )
        self._service, self._left, self._started = service, False, time.monotonic()
        self._add(1)

    def leave(self) -> None:
        if not self._left:
            self._left = True
            self._add(-1)
            mean = self._service.mean_seconds
            self._service.mean_seconds = mean + 0.1 * (time.monotonic() - self._started - mean)

    def _add(self, number: int) -> None:
        self._service.in_flight += number
        self._service.metrics.in_flight.set(self._service.in_flight)
