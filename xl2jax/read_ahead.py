"""Frames read and resized in threads, ahead of whoever encodes them, in order and in bounded memory.

Every thread reads runs of frames of its own (see `Reader.spans`) into a queue of limited size; the caller empties
the queues in order. So no more than a few dozen resized frames exist at a time, and never a raw one for long.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from xl2jax.errors import UserError

if TYPE_CHECKING:
    from xl2jax.video import Reader

STALL_SECONDS = 120.0
"""A decoder that gives no frame for so long has hung."""

_QUEUE_BYTES = 64 << 20  # resized frames of a thread that wait
_MOST_WORKERS = 8


def default_workers() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_WORKERS)


def resize(frame: np.ndarray, size: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] -> [size, size, 3]: PIL bicubic, aspect ratio not kept."""
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))


class _Span:
    """A run of frames that one thread reads. None ends the queue."""

    def __init__(self, indices: np.ndarray, room: int):
        self.indices = indices
        self.frames: queue.Queue[np.ndarray | None] = queue.Queue(room)
        self.error: BaseException | None = None


def read_resized(
    reader: Reader, indices: np.ndarray, size: int, workers: int, name: str, *, stall_seconds: float = STALL_SECONDS
) -> Iterator[np.ndarray]:
    """uint8 [size, size, 3] for each of ascending `indices`; ends early where the file does.

    `workers` threads; 0 reads in the caller's own. Threads end when the iterator is closed.

    Raises:
      UserError: what the reader raises, or that it has hung.
    """
    if workers == 0:
        for frame in reader.frames(indices):
            yield resize(frame, size)
        return
    room = max(_QUEUE_BYTES // (3 * size * size), 8)
    spans = [_Span(part, room) for part in reader.spans(indices)]
    numbers, lock, stop = itertools.count(), threading.Lock(), threading.Event()
    heartbeat = [time.monotonic()]

    def put(span: _Span, frame: np.ndarray | None) -> None:
        while not stop.is_set():
            try:
                span.frames.put(frame, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        while not stop.is_set():
            with lock:
                number = next(numbers)
            if number >= len(spans):
                return
            span = spans[number]
            try:
                for frame in reader.frames(span.indices):
                    heartbeat[0] = time.monotonic()
                    put(span, resize(frame, size))
                    if stop.is_set():
                        return
            except BaseException as e:  # given to the caller, in its turn
                span.error = e
            put(span, None)

    # Daemons: a decoder that hangs must not keep the process from ending.
    threads = [threading.Thread(target=work, daemon=True, name=f"read {name}") for _ in range(min(workers, len(spans)))]
    for thread in threads:
        thread.start()
    try:
        for span in spans:
            given = 0
            while (resized := _take(span, heartbeat, stall_seconds, reader, given, name)) is not None:
                given += 1
                yield resized
            if span.error is not None:
                raise span.error
            if given < len(span.indices):
                return  # the file ended early: what later threads may find is not in order any more
    finally:
        stop.set()


def _take(
    span: _Span, heartbeat: list[float], stall_seconds: float, reader: Reader, given: int, name: str
) -> np.ndarray | None:
    """The next frame of a span. Raises UserError if no thread has read anything for too long."""
    waiting_since = time.monotonic()
    while True:
        try:
            return span.frames.get(timeout=min(1.0, stall_seconds))
        except queue.Empty:
            quiet = time.monotonic() - max(heartbeat[0], waiting_since)
            if quiet > stall_seconds:
                where = span.indices[min(given, len(span.indices) - 1)] / reader.fps
                raise UserError(
                    f"{name}: the decoder gave no frame for {quiet:.0f} s at {where:.1f} s of the video; try another "
                    "--video-backend or repair the file"
                ) from None
