"""Reads and resizes frames in threads ahead of the encoder, in order and in bounded memory.

Each thread reads its own spans of frames (see `Reader.spans`). One window over all spans bounds the number of waiting
frames: a frame is read only when its place is less than the window's length ahead of the next frame that the caller
takes. That next frame always lies within the window, so there is no deadlock.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Generator, Iterator

import numpy as np
from PIL import Image

from xl2jax.errors import UserError
from xl2jax.video.readers import Reader

STALL_SECONDS = 120.0
"""A decoder that gives no frame for this long counts as hung."""

_WAITING_BYTES = 64 << 20  # limit on the resized frames that wait, per thread
_MAX_WORKERS = 8


def default_workers() -> int:
    """One thread for each processor that this process may use, up to 8."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(processors, _MAX_WORKERS)


def resize(frame: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 RGB [H, W, 3] to [size, size, 3] with PIL's bicubic filter. The aspect ratio is not kept."""
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))


def _resized(reader: Reader, indices: np.ndarray, size: int) -> Generator[np.ndarray]:
    """Resizes the frames of `reader`. A repeated index yields the same array again, which is resized only once."""
    previous, small = None, np.empty(0)
    for frame in reader.frames(indices):
        if frame is not previous:
            previous, small = frame, resize(frame, size)
        yield small


class _Window:
    """Hands frames from the reading threads to the caller. A frame's place is its position among all wanted frames."""

    def __init__(self, length: int):
        self._length = length
        self._frames: dict[int, np.ndarray] = {}
        self._ends: dict[int, BaseException | None] = {}
        self._taken = 0
        self._changed = threading.Condition()
        self._closed = False
        self._last_read = time.monotonic()

    def admit(self, place: int) -> bool:
        """Waits until the frame at `place` may be read. Returns False if the caller has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or place < self._taken + self._length)
            return not self._closed

    def put(self, place: int, frame: np.ndarray) -> None:
        """Stores the frame at `place` for the caller."""
        with self._changed:
            self._last_read = time.monotonic()
            if not self._closed:
                self._frames[place] = frame
                self._changed.notify_all()

    def end(self, place: int, error: BaseException | None) -> None:
        """Records that there is no frame at `place`: the file ended (`error` is None), or reading failed."""
        with self._changed:
            self._ends[place] = error
            self._changed.notify_all()

    def take(self, stall_seconds: float) -> np.ndarray | None:
        """The next frame, or None if the file ended.

        Raises:
          TimeoutError: no thread has read anything for `stall_seconds`.
          BaseException: the error of the thread that was to read the frame.
        """
        place, waiting_since = self._taken, time.monotonic()
        with self._changed:
            while place not in self._frames and place not in self._ends:
                left = max(self._last_read, waiting_since) + stall_seconds - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._changed.wait(min(left, 1.0))  # wakes up regularly so that Ctrl-C is noticed
            if place in self._frames:
                self._taken += 1
                self._changed.notify_all()
                return self._frames.pop(place)
        if (error := self._ends[place]) is not None:
            raise error
        return None

    def close(self) -> None:
        """Stops the threads: each ends before its next frame."""
        with self._changed:
            self._closed = True
            self._frames.clear()
            self._changed.notify_all()


def read_resized(
    reader: Reader, indices: np.ndarray, size: int, workers: int, name: str, *, stall_seconds: float = STALL_SECONDS
) -> Iterator[np.ndarray]:
    """Yields uint8 [size, size, 3] for each of the ascending `indices`; ends early if the file does.

    Reads in `workers` threads; with 0, in the caller's own thread. At most 64 MiB of frames wait per thread. Closing
    the iterator ends the threads.

    Raises:
      UserError: the reader raised it, or the decoder hangs.
    """
    if workers == 0:
        yield from _resized(reader, indices, size)
        return
    spans = reader.spans(indices)
    starts = np.cumsum([0, *map(len, spans)]).tolist()
    threads = min(workers, len(spans))
    room = _WAITING_BYTES // (3 * size * size) - 1  # each thread also holds the frame that it made last
    window = _Window(threads * max(room, 1))
    numbers, lock = itertools.count(), threading.Lock()

    def read(span: np.ndarray, start: int) -> None:
        """Reads a span whose first frame is at place `start`."""
        place = start
        try:
            with contextlib.closing(_resized(reader, span, size)) as frames:
                for place in range(start, start + len(span)):
                    if not window.admit(place):
                        return
                    if (frame := next(frames, None)) is None:
                        window.end(place, None)
                        return
                    window.put(place, frame)
        except BaseException as e:  # `take` raises it when the caller gets there
            window.end(place, e)

    def work() -> None:
        while True:
            with lock:
                number = next(numbers)
            if number >= len(spans):
                return
            read(spans[number], starts[number])

    # The threads are daemons, so that a hanging decoder does not keep the process from ending.
    try:
        for _ in range(threads):
            threading.Thread(target=work, daemon=True, name=f"read {name}").start()
        for index in indices:
            try:
                frame = window.take(stall_seconds)
            except TimeoutError:
                raise UserError(
                    f"{name}: the decoder gave no frame for {stall_seconds:.0f} s at {index / reader.fps:.1f} s of the "
                    "video; repair the file or convert it to another format"
                ) from None
            if frame is None:
                return  # the file ended early: frames of later spans would leave a gap
            yield frame
    finally:
        window.close()
