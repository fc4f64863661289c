"""Which frames of a video are read, and which times the model is told. Upstream's rule; no file is opened here."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError

type FrameTimes = Literal["auto", "upstream"]

MAX_FRAMES = 1 << 20
"""Most frames that can be asked for."""

TIMES_MAY_DIFFER = 0.5
"""Seconds by which index / rate may differ from a frame's own time before the own times are told."""


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """Which frames are read.

    fps: frames a second. None takes exactly `max_frames` frames, evenly spread over the video (a shorter video repeats
      frames); `max_fps` plays no part then.
    max_fps: the rate to rise to while `max_frames` is not reached; None stays at `fps`.
    max_frames: most frames. Beyond it they are spread evenly over the video.
    times: `auto` tells the model a frame's index / rate, as upstream does, or the frames' own presentation times where
      the two differ by more than half a second; `upstream` always tells index / rate.
    """

    fps: float | None = 1.0
    max_fps: int | None = 4
    max_frames: int = 256
    times: FrameTimes = "auto"

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps <= 1000:  # and not nan
            raise UserError(f"fps must be above 0 (at most 1000), not {self.fps}")
        if self.max_fps is not None and self.max_fps < 1:
            raise UserError(f"max fps must be 1 or more, not {self.max_fps}")
        if not FRAMES_PER_GROUP <= self.max_frames <= MAX_FRAMES:
            raise UserError(f"max frames must be from {FRAMES_PER_GROUP} to {MAX_FRAMES:,}, not {self.max_frames}")
        if self.times not in ("auto", "upstream"):
            raise UserError(f"frame times must be auto or upstream, not {self.times}")


def sample_indices(
    total_frames: int, video_fps: float, fps: float | None = 1.0, max_fps: int | None = 4, max_frames: int = 256
) -> tuple[np.ndarray, list[float]]:
    """Frame indices (a multiple of 4 of them) and their times in seconds, as upstream chooses them.

    Args:
      total_frames: frames in the file.
      video_fps: its average frame rate.
      fps, max_fps, max_frames: see `FrameSampling`.

    Fewer than 4 frames leave nothing, as upstream does; `chosen_frames` repeats the last one instead.
    """
    indices = _candidates(total_frames, video_fps, fps, max_fps, max_frames)
    indices = indices[: len(indices) // FRAMES_PER_GROUP * FRAMES_PER_GROUP]
    return indices, frame_times(indices, video_fps)


def chosen_frames(total_frames: int, video_fps: float, config: FrameSampling) -> np.ndarray:
    """Ascending frame indices, a multiple of 4 and at least 4 of them: a shorter clip repeats its last frame."""
    indices = _candidates(total_frames, video_fps, config.fps, config.max_fps, config.max_frames)
    if len(indices) >= FRAMES_PER_GROUP:
        return indices[: len(indices) // FRAMES_PER_GROUP * FRAMES_PER_GROUP]
    return np.concatenate([indices, np.repeat(indices[-1:], FRAMES_PER_GROUP - len(indices))])


def frame_times(indices: np.ndarray, video_fps: float) -> list[float]:
    """Index / rate in seconds, rounded to a tenth: the times that upstream tells the model."""
    return [round(int(i) / video_fps, 1) for i in indices]


def _candidates(total: int, video_fps: float, fps: float | None, max_fps: int | None, max_frames: int) -> np.ndarray:
    """Indices before the tail is cut to whole groups."""

    def spread() -> np.ndarray:
        return np.linspace(0, total - 1, max_frames).astype(np.int64)

    def every(rate: float) -> np.ndarray:
        return np.arange(0, total, max(round(video_fps / rate), 1))

    if fps is None:
        return spread()
    indices = every(fps)
    if max_fps is not None and len(indices):
        higher = min(max_frames // len(indices), max_fps)
        if higher > fps:
            indices = every(higher)
    return spread() if len(indices) > max_frames else indices
