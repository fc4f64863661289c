"""The index of a video, read from its packets without decoding: frame count, frame times, and key frames.

A container states an average frame rate and a length, but both may be wrong: some recorders state 1,000 frames a
second, or nothing. The packets carry a presentation time for every frame, so all times in this project come from them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from xl2jax.video.containers import opened, video_stream

logger = logging.getLogger(__name__)

_RATE_TOLERANCE = 0.05  # the stated frame rate is used if it is within this share of the rate of the packets
_BACKWARD_SECONDS = 1.0  # where decoding times jump back by more than this, a new recording begins in the same file
_COUNTED_FROM_ZERO = ("matroska", "asf", "nut")  # formats whose length includes the gap before a late first frame
_NO_SEEK = ("mpeg", "ogg")  # formats in which FFmpeg changes the times of frames after a seek
_NO_LENGTH = ("mpegts", "mpeg")  # formats that state no length: FFmpeg derives it from the last packets


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """The video stream of a file.

    stream: index of the stream in the container.
    container: FFmpeg's name of the format.
    total: number of frames that are shown.
    rate: average frames a second: the container's if it is within 5 % of the packets', else the packets'.
    duration: seconds from the first frame to the end of the last.
    seconds: float64 [total], presentation time of each frame relative to the first; None if the file has no times.
    numbers: presentation time in stream units -> frame number. Empty if times do not identify frames (AVI with
      B-frames, raw streams, repeated times); decoded frames must then be counted.
    keys: (number, presentation time) of the key frames, ascending. Empty if `numbers` is, and for formats whose times
      change after a seek.
    """

    stream: int
    container: str
    total: int
    rate: float
    duration: float
    seconds: np.ndarray | None
    numbers: dict[int, int]
    keys: list[tuple[int, int]]


@dataclasses.dataclass
class _Packets:
    """Times of the packets of shown frames in file order, in stream units."""

    pts: list[int | None] = dataclasses.field(default_factory=list)
    dts: list[int | None] = dataclasses.field(default_factory=list)
    durations: list[int] = dataclasses.field(default_factory=list)
    keys: list[int] = dataclasses.field(default_factory=list)
    first: float = 0.0
    """Earliest time in any stream, in seconds."""
    last: float = 0.0
    """Latest time in any stream, in seconds."""


def read_index(path: Path, max_pixels: int | None = None) -> VideoIndex:
    """Reads all packets of a video file. Warns if the file is cut off, and if the stated frame rate is not used.

    Raises:
      UserError: the file is unreadable, holds no video or has an unknown codec.
    """
    import av

    with opened(path) as container:
        stream = video_stream(path, container, max_pixels)
        packets = _read_packets(container, stream)
        name = container.format.name
        stated = float(stream.average_rate or stream.guessed_rate or 0)
        _warn_if_cut_off(path, name, packets, (container.duration or 0) / av.time_base)
        # AVI stores no presentation times. With B-frames FFmpeg can only guess them.
        trusted = name != "avi" or not stream.codec_context.has_b_frames
        base = stream.time_base or Fraction(1, av.time_base)
        base = Fraction(base.numerator, base.denominator)
        return _index(path, packets, stream.index, name, stated, base, trusted)


def _read_packets(container: Any, stream: Any) -> _Packets:
    import av

    packets = _Packets()
    shown = _SHOWN.get(stream.codec_context.name)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    try:
        for packet in container.demux():
            if packet.size == 0 or packet.is_discard:
                continue
            number, pts, length = packet.stream_index, packet.pts, packet.duration or 0
            if pts is not None:
                first[number] = min(pts, first.get(number, pts))
                last[number] = max(pts + length, last.get(number, pts))
            if number == stream.index and (shown is None or shown(memoryview(packet))):
                packets.pts.append(pts)
                packets.dts.append(packet.dts)
                packets.durations.append(length)
                if packet.is_keyframe and pts is not None:
                    packets.keys.append(pts)
    except av.FFmpegError:
        pass  # the file is cut off: the packets so far can be read
    bases = {s.index: float(s.time_base) for s in container.streams if s.time_base is not None}
    packets.first = min((t * bases[s] for s, t in first.items() if s in bases), default=0.0)
    packets.last = max((t * bases[s] for s, t in last.items() if s in bases), default=0.0)
    return packets


def _warn_if_cut_off(path: Path, container: str, packets: _Packets, promised: float) -> None:
    if not packets.pts or container in _NO_LENGTH:
        return
    reached = packets.last - packets.first
    if container.startswith(_COUNTED_FROM_ZERO):
        reached = max(reached, packets.last)
    if reached < promised - max(1.0, 0.02 * promised):
        logger.warning("warning: %s: the file is cut off, last good time %.1f s of %.1f s", path, reached, promised)


def _index(
    path: Path, packets: _Packets, stream: int, container: str, stated: float, time_base: Fraction, trusted: bool
) -> VideoIndex:
    total = len(packets.pts)
    pts, restarts = _continued(packets.pts, packets, time_base) if trusted else (None, False)
    ticks = pts or _continued(packets.dts, packets, time_base)[0]
    span, last = 0, 0
    if ticks:
        span = max(ticks) - min(ticks)
        last = packets.durations[ticks.index(max(ticks))] or (round(span / (total - 1)) if total > 1 else 0)
    if not ticks or (total > 1 and span == 0):
        # A single frame needs no rate.
        rate = stated or (1.0 if total == 1 else 0.0)
        return VideoIndex(stream, container, total, rate, total / rate if rate else 0.0, None, {}, [])
    duration = float((span + last) * time_base) or 1 / (stated or 1.0)
    rate = _rate(path, packets, stated, total, duration, float(span * time_base), time_base)
    seconds = (np.sort(np.asarray(ticks, np.float64)) - min(ticks)) * float(time_base)
    numbers: dict[int, int] = {}
    if pts and not restarts and len(set(pts)) == total:
        numbers = {t: i for i, t in enumerate(sorted(pts))}
    keys = sorted((numbers[t], t) for t in packets.keys) if numbers and container not in _NO_SEEK else []
    return VideoIndex(stream, container, total, rate, duration, seconds, numbers, keys)


def _continued(times: list[int | None], packets: _Packets, time_base: Fraction) -> tuple[list[int] | None, bool]:
    """Times in file order with backward jumps removed, and whether there were any jumps.

    Concatenated MPEG-TS recordings restart their times. The result is None if a time is unknown.
    """
    if not times or any(t is None for t in times):
        return None, False
    out: list[int] = []
    shift, previous, step = 0, None, 0
    backward = round(_BACKWARD_SECONDS / time_base)
    for time, dts, duration in zip(times, packets.dts, packets.durations, strict=True):
        if dts is not None:
            if previous is not None and dts < previous - backward:
                shift += previous + step - dts
            elif previous is not None:
                step = duration or dts - previous
            previous = dts
        assert time is not None
        out.append(time + shift)
    return out, shift != 0


def _rate(
    path: Path, packets: _Packets, stated: float, total: int, duration: float, span: float, time_base: Fraction
) -> float:
    """The container's rate if it agrees with the packets, else the rate of the packets, with a warning.

    Presentation times and decoding times both count: mp4 states the average of the latter.
    """
    if total == 1:
        return stated or 1 / duration
    measured = [total / duration, (total - 1) / span]
    decoded = [t for t in packets.dts if t is not None]
    if len(decoded) == total and max(decoded) > min(decoded):
        last = packets.durations[decoded.index(max(decoded))]
        measured.append(total / float((max(decoded) - min(decoded) + last) * time_base))
    if any(abs(stated / m - 1) <= _RATE_TOLERANCE for m in measured):
        return stated
    logger.warning(
        "warning: %s: the container states %s, but its %d frames last %.1f s: %.4g frames a second is used instead",
        path,
        f"{stated:g} frames a second" if stated else "no frame rate",
        total,
        duration,
        measured[0],
    )
    return measured[0]


def _vp8_shown(data: memoryview) -> bool:
    return bool(data[0] & 0x10)


def _vp9_shown(data: memoryview) -> bool:
    """Whether a packet shows a frame. A superframe holds several frames, whose sizes are stored at its end."""
    starts, last = [0], data[-1]
    if last & 0xE0 == 0xC0:
        frames, width = (last & 7) + 1, ((last >> 3) & 3) + 1
        index = data[-2 - frames * width :]
        if len(index) == 2 + frames * width and index[0] == last:
            sizes = [int.from_bytes(index[1 + i * width : 1 + (i + 1) * width], "little") for i in range(frames - 1)]
            starts = np.cumsum([0, *sizes]).tolist()
    return any(_vp9_frame_shown(data[start]) for start in starts if start < len(data))


def _vp9_frame_shown(first: int) -> bool:
    shift = 1 if first & 0x30 == 0x30 else 0  # profile 3 has one bit more
    shows_earlier_frame, shown = first & (0x08 >> shift), first & (0x02 >> shift)
    return bool(shows_earlier_frame or shown)


# Codecs whose packets may hold a frame that is never shown but that other frames refer to.
_SHOWN: dict[str, Callable[[memoryview], bool]] = {
    "vp8": _vp8_shown,
    "libvpx": _vp8_shown,
    "vp9": _vp9_shown,
    "libvpx-vp9": _vp9_shown,
}
