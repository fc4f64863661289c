"""Opens a video file or a folder of images, and gives the chosen RGB frames and their times."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from xl2jax.arithmetic import round_up
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.video.containers import require_video_path
from xl2jax.video.frame_sampling import (
    TIMES_MAY_DIFFER,
    FrameSampling,
    FrameTimes,
    LastGroup,
    chosen_frames,
    frame_times,
)
from xl2jax.video.image_files import ImageReader, images_in
from xl2jax.video.read_ahead import read_resized
from xl2jax.video.readers import DecordReader, PyAVReader, Reader

logger = logging.getLogger(__name__)

type Backend = Literal["auto", "decord", "pyav"]


@dataclasses.dataclass(frozen=True)
class Clip:
    """The chosen frames of an open video. `times[i]` is the time of frame i in seconds, as the model reads it.

    `len(indices)` is a multiple of 4: a shorter clip repeats its last frame.
    """

    path: Path
    reader: Reader
    indices: np.ndarray
    times: list[float]

    @property
    def duration(self) -> float:
        """Length of the whole video in seconds."""
        return self.reader.duration

    def check(self) -> None:
        """Decodes the first chosen frame. Called before a model is loaded, so that an unreadable video fails early.

        Raises:
          UserError: no frame can be read.
        """
        if next(iter(self.reader.frames(self.indices[:1])), None) is None:
            raise UserError(f"{self.path}: no frame could be decoded")

    def batches(self, frames: int, size: int, *, workers: int = 0) -> Iterator[np.ndarray]:
        """Yields uint8 arrays [frames, size, size, 3]; the last one may be shorter. `frames` is a multiple of 4.

        With `workers` threads, frames are read and resized ahead of the caller; with 0, only when they are asked for.
        If the file ends early, only whole groups of 4 frames are given. One warning names damaged and missing frames.

        Raises:
          UserError: no frame can be read.
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
        self._warn_of_damage(count)
        if count < len(self.indices) and count >= FRAMES_PER_GROUP:
            out = out[: len(out) // FRAMES_PER_GROUP * FRAMES_PER_GROUP]
        if out:
            out += [out[-1]] * (round_up(len(out), FRAMES_PER_GROUP) - len(out))
            yield np.stack(out)

    def _warn_of_damage(self, count: int) -> None:
        """Logs one warning if some of the chosen frames are damaged, or if only `count` of them were read."""
        problems = []
        damaged = np.isin(self.indices[:count], list(self.reader.damaged))
        if damaged.any():
            first = self.times[int(np.argmax(damaged))]
            problems.append(
                f"{damaged.sum()} of {len(self.indices)} frames are damaged (the first at {first:.1f} s); each is "
                "replaced by the next good one"
            )
        if count < len(self.indices):
            problems.append(
                f"the file is damaged or cut off, last good frame at {self.times[count - 1]:.1f} s of "
                f"{self.times[-1]:.1f} s"
            )
        if problems:
            logger.warning("warning: %s: %s", self.path, "; ".join(problems))


def open_reader(
    path: Path, backend: Backend = "auto", folder_fps: float = 1.0, threads: int = 0, max_pixels: int | None = None
) -> Reader:
    """Opens a file with PyAV (`pyav` or `auto`) or decord, and a folder as images at `folder_fps`."""
    require_video_path(path)
    if backend not in ("auto", "pyav", "decord"):
        raise UserError(f"video backend {backend!r}: choose auto, pyav or decord")
    if path.is_dir():
        return ImageReader(images_in(path), folder_fps, max_pixels)
    if backend != "decord":
        return PyAVReader(path, threads, max_pixels)
    if importlib.util.find_spec("decord") is None:
        raise UserError("the video backend decord is not installed; use pyav")
    return DecordReader(path)


def open_video(
    path: str | Path,
    config: FrameSampling | None = None,
    *,
    backend: Backend = "auto",
    folder_fps: float = 1.0,
    threads: int = 0,
    max_pixels: int | None = None,
    last_group: LastGroup = "drop",
) -> Clip:
    """Opens a video and chooses its frames. Decodes nothing; `Clip.check` decodes one frame.

    Args:
      path: a file of any format that FFmpeg reads (mp4, mkv, webm, mov, avi, gif, ...), or a folder of images.
      config: which frames to choose; see `FrameSampling`.
      backend: `pyav`, `decord` or `auto`, which means pyav.
      folder_fps: frame rate of a folder of images.
      threads: threads of the pyav decoder; 0 lets FFmpeg choose. 1 is fastest when many files are read at once.
      max_pixels: limit on the pixels of a frame, below the one that always holds; not with decord.
      last_group: what happens to chosen frames that do not fill a group of 4.

    Raises:
      UserError: the file is missing, not a regular file or unreadable, or it holds no video stream, no frames or an
        unknown codec.
    """
    if not str(path):
        raise UserError("no video is given")
    require_video_path(path)
    path, config = Path(path), config or FrameSampling()
    if not 0 < folder_fps < math.inf:
        raise UserError(f"folder fps must be above 0, not {folder_fps}")
    reader = open_reader(path, backend, folder_fps, threads, max_pixels)
    if reader.total == 0:
        raise UserError(f"{path}: holds no frames")
    if reader.fps <= 0:
        raise UserError(f"{path}: reports no frame rate")
    indices = chosen_frames(reader.total, reader.fps, config, last_group)
    return Clip(path, reader, indices, _model_times(path, reader, indices, config.times))


def pictures_as_frames(files: Sequence[str | Path], max_pixels: int | None = None) -> Clip:
    """Pictures as upstream's benchmark code shows them: frames of a video at one a second, padded to grey squares.

    The last one is repeated to fill a group of 4. `Model.see` shows pictures in tiles instead.

    Raises:
      UserError: there are no pictures.
    """
    if not files:
        raise UserError("no picture is given")
    paths = [Path(file) for file in files]
    reader = ImageReader(paths, 1.0, max_pixels, squares=True)
    indices = np.minimum(np.arange(round_up(len(paths), FRAMES_PER_GROUP)), len(paths) - 1)
    return Clip(paths[0].parent, reader, indices, frame_times(np.arange(len(indices)), 1.0))


def _model_times(path: Path, reader: Reader, indices: np.ndarray, times: FrameTimes) -> list[float]:
    """The times that the model reads: index / rate, or presentation times if the two differ by over half a second."""
    by_rate = frame_times(indices, reader.fps)
    if times == "upstream" or reader.seconds is None:
        return by_rate
    seconds = reader.seconds[indices]
    difference = float(np.abs(seconds - indices / reader.fps).max())
    if difference <= TIMES_MAY_DIFFER:
        return by_rate
    logger.warning(
        "warning: %s: the frame rate varies: the model is given presentation times, which differ by up to %.1f s from "
        "frame number / rate",
        path,
        difference,
    )
    return [round(float(s), 1) for s in seconds]
