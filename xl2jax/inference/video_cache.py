"""A watched video or pictures that were seen, and the settings of how their KV is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np

from xl2jax.errors import UserError
from xl2jax.inference.session import VideoKV
from xl2jax.video.clip import Clip
from xl2jax.video.read_ahead import resize

_THUMBNAILS, THUMBNAIL_SIZE = 12, 64


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How a video's KV is kept.

    dtype: int8, with a scale for each token and head, or None for the dtype of the model.
    offload: the visual KV moves to host memory once the video is watched. Only bi-level decoding can read it there.
    """

    dtype: Literal["bfloat16", "float32", "float16", "int8"] | None = None
    offload: bool = False

    def check(self, model_dtype: str) -> None:
        """Raises UserError for a dtype that is neither int8 nor the model's."""
        if self.dtype not in (None, "int8", model_dtype):
            raise UserError(
                f"cache dtype {self.dtype}: choose int8 or the model's own, {model_dtype} (--dtype changes both)"
            )

    @property
    def quantized(self) -> bool:
        return self.dtype == "int8"


@dataclasses.dataclass(eq=False)
class WatchedVideo:
    """A video in the KV cache of the model that watched it, pictures, or both.

    Questions never change it, and several threads may ask about it. `close()`, or the end of a `with` block, frees its
    memory.
    """

    path: str
    """The video, or the names of the pictures."""
    duration: float
    times: list[float]
    """Seconds of every frame; none without a video."""
    kv: VideoKV
    timings: dict[str, float]
    thumbnails: list[tuple[float, np.ndarray]]
    """Up to 12 evenly spread (seconds, uint8 [64, 64, 3]); empty where the cache came from a file."""
    head_copies: int = 1
    """How often each KV head is there (see `Network`)."""
    lead: str = "\n"
    """The text between the video, or the last picture, and the question."""
    picture_tokens: int = 0
    """Visual tokens of all pictures."""
    first_chunk: int = 0
    """How many selection blocks a live video has forgotten. Numbers of its chunks count them."""
    closed: bool = False
    _readers: list[int] = dataclasses.field(default_factory=list)
    """Threads that generate an answer now."""
    _free: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    """Its lock is held while `closed` or `_readers` change."""

    @property
    def device_bytes(self) -> int:
        """Bytes that the video holds on each device."""
        with self._free:
            if self.closed:
                return 0
            arrays = jax.tree.leaves((self.kv.cache, dict(self.kv.pooled)))
            return sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                for x in arrays
                if isinstance(x, jax.Array)
            )

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of all frames and pictures."""
        return self.kv.layout.groups * self.kv.layout.visual_tokens + self.picture_tokens

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keeps the video open. Raises UserError where it was closed."""
        with self._free:
            if self.closed:
                raise UserError(f"{self.path}: the watched video was closed")
            self._readers.append(threading.get_ident())
        try:
            yield
        finally:
            with self._free:
                self._readers.remove(threading.get_ident())
                self._free.notify_all()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[WatchedVideo]:
        """What a question sees: the video itself. That of a live video is not the same at every moment."""
        yield self

    def close(self) -> None:
        """Frees the video's memory. It first waits for answers that other threads are generating.

        Raises UserError if the calling thread is itself in the middle of an answer.
        """
        with self._free:
            if threading.get_ident() in self._readers:
                raise UserError(f"{self.path}: cannot be closed while this thread generates an answer about it")
            self._free.wait_for(lambda: not self._readers)
            if not self.closed:
                self.closed = True
                del self.kv

    def __enter__(self) -> WatchedVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def thumbnail_places(clip: Clip) -> list[int]:
    """Indices of the frames of a clip that become thumbnails."""
    return np.linspace(0, len(clip.indices) - 1, min(_THUMBNAILS, len(clip.indices))).astype(int).tolist()


def read_thumbnails(clip: Clip) -> list[tuple[float, np.ndarray]]:
    """Thumbnails (seconds, image) read from the file, for a video whose cache was not made in this process."""
    places = thumbnail_places(clip)
    frames = clip.reader.frames(clip.indices[places])
    return [(clip.times[i], resize(frame, THUMBNAIL_SIZE)) for i, frame in zip(places, frames, strict=False)]
