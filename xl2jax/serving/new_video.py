"""A new video, or pictures: a thread opens it and reads ahead of the engine, which watches it for one or more jobs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xl2jax.inference.pictures import Surroundings
from xl2jax.inference.watching import Watching
from xl2jax.serving.jobs import Job
from xl2jax.serving.limits import Limits
from xl2jax.video.clip import Clip

_SEGMENTS_AHEAD = 2


class NewVideo:
    """A video that is watched for one or more jobs.

    A thread opens the clip, waits for `begin`, and then reads ahead; the engine takes what it has read.

    Attributes:
      jobs: those that wait for it.
      opened, watching: None until it was opened, and until it is begun.
      parts: what is left of the segment that was begun last; None between two segments.
      reserved: bytes that were reserved for its KV.
    """

    def __init__(self, first: Job, limits: Limits, wake: Callable[[], None], around: Callable[..., Surroundings]):
        """`around`: that of the model."""
        assert first.media is not None
        self.key, self.jobs = first.key, [first]
        self._media, self._frames, self._limits = first.media.hold(), first.frames, limits
        self._asked, self._wake, self._around = first.asked, wake, around
        self._read: queue.Queue[Any] = queue.Queue(_SEGMENTS_AHEAD)
        self._begun = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self.opened: Clip | Surroundings | None = None
        self.watching: Watching | None = None
        self.parts: Iterator[None] | None = None
        self.reserved = 0

    @property
    def path(self) -> Path:
        return self._media.path

    def open(self) -> None:
        """Starts the thread, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="read a video")
            self._thread.start()

    def begin(self, watching: Watching) -> None:
        self.watching = watching
        self._begun.set()

    def take(self) -> Any:
        """What the thread has given: what it opened, frames, an error, or "end"; None if nothing."""
        try:
            return self._read.get_nowait()
        except queue.Empty:
            return None

    @property
    def has_read(self) -> bool:
        return not self._read.empty()

    def close(self) -> None:
        """Ends the thread. The file is let go when it has ended."""
        self._closed = True
        self._begun.set()
        if self._thread is None:
            self._media.release()

    def _work(self) -> None:
        try:
            self._give(self._opened())
            self._begun.wait()
            for frames in self._batches():
                if not self._give(frames):
                    return
            self._give("end")
        except Exception as e:
            self._give(e)
        finally:
            self._media.release()

    def _opened(self) -> Clip | Surroundings:
        if self._asked.source.pictures:
            return self._around(self._media.pictures(self._limits), self._asked.text)
        return self._media.open(self._frames, self._asked.folder_fps, self._limits)

    def _batches(self) -> Iterator[np.ndarray]:
        return iter(()) if self.watching is None else self.watching.batches()

    def _give(self, item: Any) -> bool:
        while not self._closed:
            try:
                self._read.put(item, timeout=0.2)
            except queue.Full:
                continue
            self._wake()
            return True
        return False
