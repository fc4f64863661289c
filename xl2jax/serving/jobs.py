"""A question on its way through the engine, and what the engine tells about it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from xl2jax.serving.errors import RequestError
from xl2jax.serving.live import LiveSession
from xl2jax.serving.media import Media
from xl2jax.serving.protocol import Asked
from xl2jax.serving.reply import VideoUse
from xl2jax.serving.videos import VideoKey
from xl2jax.video.clip import FrameSampling


@dataclasses.dataclass(frozen=True)
class Watched:
    """So many of the chosen frames have been watched."""

    frames: int
    total: int


@dataclasses.dataclass(frozen=True)
class Begun:
    """The answer begins."""

    use: VideoUse


@dataclasses.dataclass(frozen=True)
class Piece:
    """More text of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """The answer is complete."""

    reason: str
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Failed:
    """There will be no more of the answer."""

    error: RequestError


type Event = Watched | Begun | Piece | Ended | Failed


@dataclasses.dataclass(eq=False)
class Job:
    """One question on its way through the engine.

    media: None where the video is only known by name. live: the live video that is asked about. emit: called in the engine's
    thread with each event.
    """

    asked: Asked
    key: VideoKey
    media: Media | None
    frames: FrameSampling
    emit: Callable[[Event], None]
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    cancelled: bool = False
    cached: bool = True
    live: LiveSession | None = None
