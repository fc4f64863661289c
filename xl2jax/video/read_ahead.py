"""Frames read and resized in threads, ahead of whoever encodes them, in order and in bounded memory.

Every thread reads runs of frames of its own (see `Reader.spans`). One window over all runs bounds what waits: a frame is
read only once its place in the video lies less than the window's length beyond what the caller has taken. The frame that
the caller waits for always lies within it, so that nothing can lock up.
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
"""A decoder that gives no frame for so long has hung."""

_WAITING_BYTES = 64 << 20  # resized frames that wait, for each thread
_MOST_WORKERS = 8


def default_workers() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_WORKERS)


def resize(frame: np.ndarray, size: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> [size, size, 3]: PIL bicubic, aspect ratio not kept."""
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))


def _resized(reader: Reader, indices: np.ndarray, size: int) -> Generator[np.ndarray]:
    """`reader`'s frames, resized. A reader yields the same array where an index repeats: it is resized once."""
    previous, small = None, np.empty(0)
    for frame in reader.frames(indices):
        if frame is not previous:
            previous, small = frame, resize(frame, size)
        yield small


class _Window:
    """Frames on their way from the reading threads to the caller, by their place among all that are wanted."""

    def __init__(self, length: int):
        self._length = length
        self._frames: dict[int, np.ndarray] = {}
        self._ends: dict[int, BaseException | None] = {}
        self._taken = 0
        self._changed = threading.Condition()
        self._closed = False
        self._last_read = time.monotonic()

    def admit(self, place: int) -> bool:
        """Waits until the frame of a place may be read. False: nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or place < self._taken + self._length)
            return not self._closed

    def put(self, place: int, frame: np.ndarray) -> None:
        with self._changed:
            self._last_read = time.monotonic()
            if not self._closed:
                self._frames[place] = frame
                self._changed.notify_all()

    def end(self, place: int, error: BaseException | None) -> None:
        """There is no frame at a place: the file ended before it, or an error did."""
        with self._changed:
            self._ends[place] = error
            self._changed.notify_all()

    def take(self, stall_seconds: float) -> np.ndarray | None:
        """The next frame, or None where the file ended.

        Raises:
          TimeoutError: no thread has read anything for `stall_seconds`.
          BaseException: what the thread raised that was to read the frame.
        """
        place, waiting_since = self._taken, time.monotonic()
        with self._changed:
            while place not in self._frames and place not in self._ends:
                left = max(self._last_read, waiting_since) + stall_seconds - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._changed.wait(min(left, 1.0))  # (now and then awake, for Ctrl-C)
            if place in self._frames:
                self._taken += 1
                self._changed.notify_all()
                return self._frames.pop(place)
        if (error := self._ends[place]) is not None:
            raise error
        return None

    def close(self) -> None:
        """Ends the threads: each stops before its next frame."""
        with self._changed:
            self._closed = True
            self._frames.clear()
            self._changed.notify_all()


def read_resized(
    reader: Reader, indices: np.ndarray, size: int, workers: int, name: str, *, stall_seconds: float = STALL_SECONDS
) -> Iterator[np.ndarray]:
    """uint8 [size, size, 3] for each of ascending `indices`; ends early where the file does.

    `workers` threads; 0 reads in the caller's own. At most 64 MiB of frames a thread wait for the caller. Threads end
    when the iterator is closed.

    Raises:
      UserError: what the reader raises, or that it has hung.
    """
    if workers == 0:
        yield from _resized(reader, indices, size)
        return
    spans = reader.spans(indices)
    starts = np.cumsum([0, *map(len, spans)]).tolist()
    threads = min(workers, len(spans))
    room = _WAITING_BYTES // (3 * size * size) - 1  # a thread keeps the frame that it made last
    window = _Window(threads * max(room, 1))
    numbers, lock = itertools.count(), threading.Lock()

    def read(span: np.ndarray, start: int) -> None:
        """Reads a span whose first frame has the place `start`."""
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
        except BaseException as e:  # given to the caller, in its turn
            window.end(place, e)

    def work() -> None:
        while True:
            with lock:
                number = next(numbers)
            if number >= len(spans):
                return
            read(spans[number], starts[number])

    # Daemons: a decoder that hangs must not keep the process from ending.
    try:
        for _ in range(threads):
            threading.Thread(target=work, daemon=True, name=f"read {name}").start()
        for index in indices:
            try:
                frame = window.take(stall_seconds)
            except TimeoutError:
                raise UserError(
                    f"{name}: the decoder gave no frame for {stall_seconds:.0f} s at {index / reader.fps:.1f} s of the "
                    "video; try another --video-backend or repair the file"
                ) from None
            if frame is None:
                return  # the file ended early: what other threads may read is not in order any more
            yield frame
    finally:
        window.close()
