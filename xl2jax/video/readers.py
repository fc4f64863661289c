"""Readers of open videos, which give chosen frames as RGB arrays.

PyAV (FFmpeg) reads every format; decord is accepted only for formats that it reads correctly. Frame i is the i-th frame
in presentation order. Frames are rotated as the file's metadata says.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xl2jax.errors import UserError, first_line
from xl2jax.video.containers import MAX_PIXELS, opened
from xl2jax.video.index import VideoIndex, read_index

logger = logging.getLogger(__name__)

SPAN_FRAMES = 16
"""A span that one thread reads has at least this many frames, except for the last."""

_MIN_SKIP = 16  # a seek must skip more frames than this to be worth its cost


class Reader(Protocol):
    """An open video.

    total: number of frames.
    fps: average frames a second.
    seconds: float64 [total], presentation times relative to the first frame; None if they are index / fps.
    damaged: numbers of the chosen frames that could not be decoded and were replaced by the next good frame.
    """

    total: int
    fps: float
    seconds: np.ndarray | None = None
    damaged: Set[int] = frozenset()

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.total / self.fps

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Yields RGB uint8 [H, W, 3] for ascending indices, which may repeat. Ends early if the file is cut off."""
        ...

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        """Cuts indices into spans that several threads can read in parallel."""
        ...


class _IndexedReader(Reader):
    """A file whose packets were read. Frame counts and times come from the index, whichever library decodes."""

    def __init__(self, path: Path, max_pixels: int | None = None):
        self._path = path
        self._index: VideoIndex = read_index(path, max_pixels)
        self.total, self.fps, self.seconds = self._index.total, self._index.rate, self._index.seconds

    @property
    def duration(self) -> float:
        return self._index.duration


class PyAVReader(_IndexedReader):
    """Decodes with PyAV (FFmpeg). Damaged packets are skipped."""

    def __init__(self, path: Path, threads: int = 0, max_pixels: int | None = None):
        """`threads`: number of decoding threads; 0 lets FFmpeg choose. `max_pixels`: limit on the pixels of a frame."""
        super().__init__(path, max_pixels)
        self._max_pixels = max_pixels or MAX_PIXELS
        self._threads = threads
        self._replaced: set[int] = set()  # reading threads add to it
        self.damaged = self._replaced
        self._key_numbers = np.asarray([n for n, _ in self._index.keys], np.int64)

    def _key_before(self, number: int) -> int:
        """Position in `keys` of the last key frame up to frame `number`, or -1."""
        return int(np.searchsorted(self._key_numbers, number, side="right")) - 1

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        """Spans that each begin with the first wanted frame after a key frame, so that no frame is decoded twice."""
        keys = np.searchsorted(self._key_numbers, indices, side="right")
        cuts, first = [], 0
        for i in np.flatnonzero(np.diff(keys)) + 1:
            if i - first >= SPAN_FRAMES:
                cuts.append(int(i))
                first = int(i)
        return np.split(indices, cuts)

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Decodes from the start, and seeks to a key frame wherever that skips enough frames."""
        keys, numbers = self._index.keys, self._index.numbers
        wanted = indices.tolist()
        done = 0
        with opened(self._path) as container:
            stream = container.streams[self._index.stream]
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = self._threads
            stream.codec_context.options = {"max_pixels": str(self._max_pixels)}
            seek = bool(keys)
            last = target = -1  # the last decoded frame, and the key frame of the last seek
            while done < len(wanted):
                key = self._key_before(wanted[done]) if seek else -1
                jumped = key > target and keys[key][0] > max(last, 0) + _MIN_SKIP
                if jumped:
                    target = key
                    container.seek(keys[key][1], stream=stream)
                elif last >= 0:
                    return  # the file ended
                for count, frame in enumerate(_decoded(container, stream)):
                    number = count if not numbers or frame.pts is None else numbers.get(frame.pts, -1)
                    if jumped and number > keys[key][0]:
                        break  # the seek went beyond its target
                    jumped, last = False, max(last, number)
                    image = upright(frame) if wanted[done] <= number else None
                    while image is not None and done < len(wanted) and wanted[done] <= number:
                        if wanted[done] < number:
                            self._replaced.add(wanted[done])
                        yield image
                        done += 1
                    if done == len(wanted):
                        return
                    if seek and wanted[done] > last + _MIN_SKIP:
                        ahead = self._key_before(wanted[done])
                        if ahead > target and keys[ahead][0] > last + _MIN_SKIP:
                            break  # seek again; a seek may also end before its target, and then decoding goes on
                else:
                    if not jumped:
                        return  # the file ended
                if jumped:  # this file cannot be seeked: decode it from the beginning
                    seek, last = False, -1
                    container.seek(0)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of all packets that can be decoded, including those that the decoder buffers."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            packet = None  # the file ends here: flush
        with contextlib.suppress(av.FFmpegError):
            yield from stream.codec_context.decode(packet)
        if packet is None:
            return


def upright(frame: Any) -> np.ndarray:
    """RGB uint8 [H, W, 3], rotated by the display rotation, which FFmpeg counts counter-clockwise."""
    image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, (frame.rotation // 90) % 4)) if frame.rotation else image


class DecordReader(_IndexedReader):
    """Decodes with decord, which upstream uses. Its memory grows on long files, and it reads in one thread.

    Only in the formats below does decord give the same frames as FFmpeg. It raises an error for some frame sizes (odd
    sides, and rotated clips whose sides it cannot align).
    """

    _FORMATS = ("mov,mp4", "matroska", "flv", "ogg", "avi")
    _BATCH = 8

    def __init__(self, path: Path):
        import decord

        super().__init__(path)
        name = self._index.container
        if not name.startswith(self._FORMATS) or (name == "avi" and not self._index.numbers):
            kind = "avi files with B-frames" if name == "avi" else f"{name} files"
            raise UserError(f"{path}: decord gives wrong frames of {kind}, or none; use the backend pyav")
        # For a file that it cannot open, decord raises its own error or RuntimeError.
        try:
            self._reader = decord.VideoReader(str(path.absolute()), num_threads=1)
            count = len(self._reader)
        except Exception as e:
            raise UserError(f"{path}: not a video that decord can read ({first_line(e)}); pyav reads more") from None
        if count != self.total:
            raise UserError(f"{path}: decord counts {count} frames where {self.total} are shown; use the backend pyav")

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        return [indices]

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        for first in range(0, len(indices), self._BATCH):
            try:
                batch = self._reader.get_batch(indices[first : first + self._BATCH].tolist()).asnumpy()
            except Exception as e:
                if "size must exactly match" in str(e):
                    raise UserError(
                        f"{self._path}: decord cannot read frames of this size or rotation; use the pyav backend"
                    ) from None
                yield from self._one_by_one(indices[first : first + self._BATCH])
                return
            yield from batch

    def _one_by_one(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """The frames of a batch that failed, up to the first bad one."""
        for i in indices:
            try:
                frame = self._reader[int(i)].asnumpy()
            except Exception as e:
                logger.info("decord stopped: %s", first_line(e))
                return
            yield frame
