"""Writes frames as a video file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np


def write_frames(
    path: Path,
    frames: Iterable[np.ndarray],
    fps: float | Fraction,
    *,
    codec: str = "libx264",
    container: str | None = None,
) -> None:
    """Writes RGB frames, uint8 [height, width, 3] each, with even width and height.

    H.264 has a constant quantiser: libx264's rate control does not give the same bytes each time.

    Args:
      codec: FFmpeg's name of the encoder.
      container: FFmpeg's name of the file format; by default it follows from the suffix of `path`.

    Raises:
      ValueError: there is no frame.
      OSError: the file cannot be written.
    """
    import av  # here, because most uses of the package write no video

    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise ValueError(f"{path}: a video needs at least one frame")
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"qp": "22", "preset": "veryfast"} if codec == "libx264" else {}
        for frame in itertools.chain([first], remaining):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
