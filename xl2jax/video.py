"""From a video file or a folder of frames to RGB frames and times.

Frame i is the i-th frame in presentation order, and its time is i / average frame rate: this is what
upstream does with decord, for variable frame rates too. Frames are turned by the rotation metadata.
decord fails on some sizes (odd sides, turned clips whose sides it cannot align), and says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.read_ahead import read_resized

logger = logging.getLogger(__name__)

type Backend = Literal["auto", "decord", "pyav"]

_SPAN_FRAMES = 16  # fewest frames that a thread reads in one go
_WORTH_A_SEEK = 16  # frames that a jump must save
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Which frames are read: `fps` a second, more (up to `max_fps`) where `max_frames` leaves room."""

    fps: float = 1.0
    max_fps: int | None = 4
    max_frames: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 1000:  # and not nan
            raise UserError(f"fps must be above 0 (at most 1000), not {self.fps}")
        if self.max_fps is not None and self.max_fps < 1:
            raise UserError(f"max fps must be 1 or more, not {self.max_fps}")
        if self.max_frames < FRAMES_PER_GROUP:
            raise UserError(f"max frames must be {FRAMES_PER_GROUP} or more, not {self.max_frames}")


def _candidates(total: int, video_fps: float, fps: float, max_fps: int | None, max_frames: int) -> np.ndarray:
    """Indices before the tail is cut to whole groups."""

    def every(rate: float) -> np.ndarray:
        return np.arange(0, total, max(round(video_fps / rate), 1))

    indices = every(fps)
    if max_fps is not None and len(indices):
        higher = min(max_frames // len(indices), max_fps)
        if higher > fps:
            indices = every(higher)
    if len(indices) > max_frames:
        indices = np.linspace(0, total - 1, max_frames).astype(np.int64)
    return indices


def frame_times(indices: np.ndarray, video_fps: float) -> list[float]:
    """Seconds, rounded to a tenth."""
    return [round(int(i) / video_fps, 1) for i in indices]


def sample_indices(
    total_frames: int, video_fps: float, fps: float = 1.0, max_fps: int | None = 4, max_frames: int = 256
) -> tuple[np.ndarray, list[float]]:
    """Frame indices (a multiple of 4 of them) and their times in seconds, as upstream chooses them.

    Args:
      total_frames: frames in the file.
      video_fps: its average frame rate.
      fps: frames a second wanted.
      max_fps: rate to rise to while `max_frames` is not reached; None to stay at `fps`.
      max_frames: most frames; beyond it they are spread evenly over the file.

    Under 4 frames nothing is left: `open_video` pads such clips.
    """
    indices = _candidates(total_frames, video_fps, fps, max_fps, max_frames)
    indices = indices[: len(indices) // FRAMES_PER_GROUP * FRAMES_PER_GROUP]
    return indices, frame_times(indices, video_fps)


class Reader(Protocol):
    """An open video. `frames` yields RGB uint8 [H, W, 3] for ascending indices, or ends early where
    the file is damaged. `spans` cuts indices into runs that several threads may read side by side."""  # fmt: skip

    total: int
    fps: float

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]: ...

    def spans(self, indices: np.ndarray) -> list[np.ndarray]: ...


class PyAVReader:
    """Reads through the file with PyAV (FFmpeg). Damaged packets are passed over."""

    def __init__(self, path: Path, threads: int = 0):
        """`threads` decode; 0: as many as FFmpeg likes."""
        import av

        self._path, self._threads = path, threads
        try:
            with av.open(str(path)) as container:
                stream = _video_stream(container)
                if stream is None:
                    kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                    raise UserError(f"{path}: holds no video (only {kinds})")
                rate = stream.average_rate or stream.guessed_rate or Fraction(0)
                times: list[int | None] = []
                keys: list[int] = []
                last = 0.0
                try:
                    for packet in container.demux():
                        if packet.stream is stream and packet.size > 0 and not packet.is_discard:
                            times.append(packet.pts)
                            if packet.is_keyframe and packet.pts is not None:
                                keys.append(packet.pts)
                        if packet.pts is not None and packet.time_base is not None:
                            last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                except av.FFmpegError:
                    pass  # cut off: what was counted can be read
                promised = (container.duration or 0) / av.time_base
        except (av.FFmpegError, ValueError, OSError) as e:
            raise UserError(f"{path}: not a video that can be read ({_reason(e)})") from None
        if times and last < promised - max(1.0, 0.02 * promised):
            logger.warning("warning: %s: the file is cut off, last good time %.1f s of %.1f s", path, last, promised)
        self.total, self.fps = len(times), float(rate)
        # Presentation times tell which frame a decoded one is, even where others are lost. Some
        # containers (avi) have none, or not for all frames: then frames are counted.
        known = sorted(t for t in times if t is not None)
        self._numbers = {t: i for i, t in enumerate(known)} if len(set(known)) == len(times) else {}
        # Numbers and presentation times of the frames that decoding can begin at.
        self._keys = sorted((self._numbers[t], t) for t in keys) if self._numbers else []
        self._key_numbers = np.asarray([n for n, _ in self._keys], np.int64)

    def _key_before(self, number: int) -> int:
        """Which key frame decoding up to `number` can begin at, -1 for none."""
        return int(np.searchsorted(self._key_numbers, number, side="right")) - 1

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        """Runs of frames, each begun by the first one wanted behind a key frame: no frame is decoded twice."""
        keys = np.searchsorted(self._key_numbers, indices, side="right")
        cuts, first = [], 0
        for i in np.flatnonzero(np.diff(keys)) + 1:
            if i - first >= _SPAN_FRAMES:
                cuts.append(int(i))
                first = int(i)
        return np.split(indices, cuts)

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Reads through, or jumps to a key frame where that leaves enough frames undecoded."""
        import av

        wanted = indices.tolist()
        done = 0
        with av.open(str(self._path)) as container:
            stream = _video_stream(container)
            assert stream is not None  # __init__ found it
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = self._threads
            seek = bool(self._keys)
            at = sent = -1  # the last frame decoded, the last key frame that was jumped to
            while done < len(wanted):
                key = self._key_before(wanted[done]) if seek else -1
                jumped = key > sent and self._keys[key][0] > max(at, 0) + _WORTH_A_SEEK
                if jumped:
                    sent = key
                    container.seek(self._keys[key][1], stream=stream)
                elif at >= 0:
                    return  # the file ended
                for count, frame in enumerate(_decoded(container, stream)):
                    number = count if not self._numbers or frame.pts is None else self._numbers.get(frame.pts, -1)
                    if jumped and number > self._keys[key][0]:
                        break  # the container did not go where it was sent
                    jumped, at = False, max(at, number)
                    while done < len(wanted) and wanted[done] <= number:
                        if wanted[done] < number:
                            logger.warning(
                                "warning: %s: frame %d is damaged, the next good one stands in",
                                self._path,
                                wanted[done],
                            )
                        yield _upright(frame.to_ndarray(format="rgb24"), frame.rotation)
                        done += 1
                    if done == len(wanted):
                        return
                    if seek and wanted[done] > at + _WORTH_A_SEEK:
                        ahead = self._key_before(wanted[done])
                        if ahead > sent and self._keys[ahead][0] > at + _WORTH_A_SEEK:
                            break  # (a container may land before the key frame it was sent to: then read on)
                else:
                    if not jumped:
                        return  # the file ended
                if jumped:  # from here on the file is read through from its beginning
                    seek, at = False, -1
                    container.seek(0)


def _video_stream(container: Any) -> Any:
    """The first video stream that is not a cover picture, or None."""
    from av.stream import Disposition

    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of all packets that decode, the buffered ones last."""
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


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return text.splitlines()[0]


def _upright(frame: np.ndarray, degrees: int) -> np.ndarray:
    """Turns by the display rotation, which FFmpeg counts counter-clockwise."""
    return np.ascontiguousarray(np.rot90(frame, (degrees // 90) % 4)) if degrees else frame


class DecordReader:
    """Reads with decord: upstream's own reader. Its memory grows on long files. One thread reads at a time."""

    _BATCH = 8

    def __init__(self, path: Path):
        import decord

        self._path = path
        # decord raises its own error, or RuntimeError for a file it cannot open.
        try:
            self._reader = decord.VideoReader(str(path), num_threads=1)
            self.total, self.fps = len(self._reader), float(self._reader.get_avg_fps())
        except Exception as e:
            raise UserError(f"{path}: not a video that decord can read ({_reason(e)}); pyav reads more") from None

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
        """The good frames of a batch that failed, up to the first bad one."""
        for i in indices:
            try:
                frame = self._reader[int(i)].asnumpy()
            except Exception as e:
                logger.info("decord stopped: %s", _reason(e))
                return
            yield frame


class ImageReader:
    """Image files, one a frame."""

    def __init__(self, files: Sequence[Path], fps: float):
        self._files = files
        self.total, self.fps = len(files), fps

    def spans(self, indices: np.ndarray) -> list[np.ndarray]:
        return np.split(indices, range(_SPAN_FRAMES, len(indices), _SPAN_FRAMES))

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        for i in indices:
            try:
                with Image.open(self._files[i]) as image:
                    frame = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
                raise UserError(f"{self._files[i]}: not an image that can be read ({_reason(e)})") from None
            yield frame


def images_in(folder: Path) -> list[Path]:
    """The images of a folder in the natural order of their names ("2" before "10")."""

    def natural(p: Path) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", p.name)
        return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in parts]

    try:
        return sorted((p for p in folder.iterdir() if p.suffix.lower() in _IMAGES), key=natural)
    except OSError as e:
        raise UserError(f"{folder}: cannot be read ({_reason(e)})") from None


def open_reader(path: Path, backend: Backend = "auto", folder_fps: float = 1.0, threads: int = 0) -> Reader:
    """Opens a file with the backend named; `auto` takes PyAV, or decord where PyAV is missing."""
    if not path.exists():
        raise UserError(f"{path}: no such video")
    if path.is_dir():
        return ImageReader(images_in(path), folder_fps)
    chosen = backend
    if backend == "auto":
        chosen = "pyav" if _available("av") else "decord"
        _say_once(chosen)
    if not _available({"pyav": "av"}.get(chosen, chosen)):
        raise UserError(f"video backend {chosen} is not installed")
    return PyAVReader(path, threads) if chosen == "pyav" else DecordReader(path)


@functools.cache
def _say_once(chosen: str) -> None:
    logger.info("video backend: %s (auto)", chosen)


def _available(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


@dataclasses.dataclass(frozen=True)
class Clip:
    """The chosen frames of an open video. `times[i]` is the time of frame i in seconds.

    `len(indices)` is a multiple of 4: shorter clips repeat their last frame.
    """

    path: Path
    reader: Reader
    indices: np.ndarray
    times: list[float]

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.reader.total / self.reader.fps

    def batches(self, frames: int, size: int, *, workers: int = 0) -> Iterator[np.ndarray]:
        """uint8 [frames, size, size, 3] at a time (a multiple of 4 frames), the last maybe shorter.

        `workers` threads read and resize ahead of the caller; 0: as it asks.
        A file that ends early gives the whole groups that could be read, and a warning that names
        the last good time. Raises UserError if not one frame could be read.
        """
        out: list[np.ndarray] = []
        count = 0
        for frame in read_resized(self.reader, self.indices, size, workers, str(self.path)):
            out.append(frame)
            count += 1
            if len(out) == frames:
                yield np.stack(out)
                out = []
        if count == 0:
            raise UserError(f"{self.path}: no frame could be decoded")
        if count < len(self.indices):
            logger.warning(
                "warning: %s: the file is damaged or cut off, last good frame at %.1f s of %.1f s",
                self.path, self.times[count - 1], self.times[-1],
            )  # fmt: skip
            out = out[: len(out) // FRAMES_PER_GROUP * FRAMES_PER_GROUP] if count >= FRAMES_PER_GROUP else out
        if out:
            out += [out[-1]] * (-len(out) % FRAMES_PER_GROUP)
            yield np.stack(out)


def open_video(
    path: str | Path, config: SampleConfig | None = None, *, backend: Backend = "auto", folder_fps: float = 1.0,
    threads: int = 0,
) -> Clip:  # fmt: skip
    """Opens a video and chooses its frames.

    Args:
      path: mp4, mkv, webm, mov, avi, whatever FFmpeg reads, or a folder of images.
      config: which frames; see `sample_indices`.
      backend: `pyav`, `decord` or `auto`.
      folder_fps: frames a second of a folder of images.
      threads: of the pyav decoder; 0 leaves it to FFmpeg. Where many files are read at once, 1 is fastest.

    Raises:
      UserError: missing, unreadable, without video or without frames.
    """
    path, config = Path(path), config or SampleConfig()
    if not 0 < folder_fps < math.inf:
        raise UserError(f"folder fps must be above 0, not {folder_fps}")
    reader = open_reader(path, backend, folder_fps, threads)
    if reader.total == 0:
        raise UserError(f"{path}: holds no frames")
    if reader.fps <= 0:
        raise UserError(f"{path}: reports no frame rate")
    indices = _candidates(reader.total, reader.fps, config.fps, config.max_fps, config.max_frames)
    if len(indices) >= FRAMES_PER_GROUP:
        indices = indices[: len(indices) // FRAMES_PER_GROUP * FRAMES_PER_GROUP]
    else:
        indices = np.concatenate([indices, np.repeat(indices[-1:], FRAMES_PER_GROUP - len(indices))])
    return Clip(path, reader, indices, frame_times(indices, reader.fps))
