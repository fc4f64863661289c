"""Upstream's rule for choosing frames and their times. This module opens no files."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError, require_number, require_whole

type FrameTimes = Literal["auto", "upstream"]
type LastGroup = Literal["drop", "fill"]
"""What happens to chosen frames that do not fill a group of 4: they are left out, or the last one is repeated."""

MAX_FRAMES = 1 << 20
"""Upper limit on `max_frames`."""

TIMES_MAY_DIFFER = 0.5
"""Limit in seconds: if index / rate differs more from presentation times, the model gets presentation times."""


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """Which frames are read.

    fps: frames a second. None takes exactly `max_frames` frames, evenly spread over the video, and ignores `max_fps`;
      a shorter video then repeats frames.
    max_fps: for short videos the rate rises up to this one, as far as `max_frames` allows; None keeps `fps`.
    max_frames: limit on the number of frames. A longer video is sampled evenly over its whole length.
    times: `auto` gives the model a frame's index / rate, as upstream does, or presentation times if the two differ by
      more than half a second; `upstream` always gives index / rate.
    """

    fps: float | None = 1.0
    max_fps: int | None = 4
    max_frames: int = 256
    times: FrameTimes = "auto"

    def __post_init__(self) -> None:
        if self.fps is not None:
            require_number("fps", self.fps)
        if self.fps is not None and not 0 < self.fps <= 1000:  # and not nan
            raise UserError(f"fps must be above 0 (at most 1000), not {self.fps}")
        if self.max_fps is not None:
            require_whole("max fps", self.max_fps, 1)
        require_whole("max frames", self.max_frames, FRAMES_PER_GROUP, MAX_FRAMES)
        if self.times not in ("auto", "upstream"):
            raise UserError(f"frame times must be auto or upstream, not {self.times}")


def sample_indices(
    total_frames: int, video_fps: float, fps: float | None = 1.0, max_fps: int | None = 4, max_frames: int = 256
) -> tuple[np.ndarray, list[float]]:
    """Frame indices and their times in seconds, as upstream chooses them. Their number is a multiple of 4.

    With fewer than 4 frames the result is empty, as upstream's is; `chosen_frames` repeats the last frame instead.

    Args:
      total_frames: number of frames in the file.
      video_fps: average frame rate of the file.
      fps, max_fps, max_frames: see `FrameSampling`.
    """
    indices = _candidates(total_frames, video_fps, fps, max_fps, max_frames)
    indices = indices[: len(indices) // FRAMES_PER_GROUP * FRAMES_PER_GROUP]
    return indices, frame_times(indices, video_fps)


def chosen_frames(
    total_frames: int, video_fps: float, config: FrameSampling, last_group: LastGroup = "drop"
) -> np.ndarray:
    """Ascending frame indices. Their number is a multiple of 4, at least 4: a shorter clip repeats its last frame.

    Upstream's demo and its evaluation without chunks drop frames; its evaluation with chunks fills the last group.
    """
    indices = _candidates(total_frames, video_fps, config.fps, config.max_fps, config.max_frames)
    if len(indices) >= FRAMES_PER_GROUP and last_group == "drop":
        return indices[: len(indices) // FRAMES_PER_GROUP * FRAMES_PER_GROUP]
    return np.concatenate([indices, np.repeat(indices[-1:], -len(indices) % FRAMES_PER_GROUP)])


def frame_times(indices: np.ndarray, video_fps: float) -> list[float]:
    """Index / rate in seconds, rounded to a tenth: the times that upstream gives the model."""
    return [round(int(i) / video_fps, 1) for i in indices]


def _candidates(total: int, video_fps: float, fps: float | None, max_fps: int | None, max_frames: int) -> np.ndarray:
    """The chosen indices, before they are cut to whole groups."""

    def spread() -> np.ndarray:
        return np.linspace(0, total - 1, max_frames).astype(np.int64)

    def every(rate: float) -> np.ndarray:
        return np.arange(0, total, max(round(min(video_fps / rate, total)), 1))

    if fps is None:
        return spread()
    indices = every(fps)
    if max_fps is not None and len(indices):
        higher = min(max_frames // len(indices), max_fps)
        if higher > fps:
            indices = every(higher)
    return spread() if len(indices) > max_frames else indices
