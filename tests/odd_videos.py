"""Writes small videos of the kinds that recorders and editors produce, with PyAV."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


@dataclasses.dataclass(frozen=True)
class Kind:
    """A container with a codec. `ticks` is the encoder's number of time units a second; variable rates need 1,000."""

    suffix: str
    codec: str
    format: str
    pixels: str = "yuv420p"
    ticks: int = 1000
    size: tuple[int, int] = (64, 48)


KINDS = [
    Kind("mp4", "libx264", "mp4"), Kind("mov", "libx264", "mov"), Kind("webm", "libvpx", "webm"),
    Kind("vp9.webm", "libvpx-vp9", "webm"), Kind("mkv", "libx264", "matroska"),
    Kind("avi", "mpeg4", "avi", ticks=25), Kind("mjpeg.avi", "mjpeg", "avi", "yuvj420p", ticks=25),
    Kind("flv", "flv", "flv"), Kind("ts", "libx264", "mpegts"), Kind("m2ts", "mpeg2video", "mpegts", ticks=25),
    Kind("mpg", "mpeg1video", "mpeg", ticks=25), Kind("vob", "mpeg2video", "vob", ticks=25),
    Kind("3gp", "h263", "3gp", ticks=25, size=(176, 144)), Kind("gif", "gif", "gif", "rgb8", ticks=100),
    Kind("webp", "libwebp_anim", "webp"), Kind("ogv", "libvpx", "ogg"), Kind("asf", "msmpeg4v3", "asf"),
    Kind("wmv", "wmv2", "asf"),
]  # fmt: skip
BY_SUFFIX = {kind.suffix: kind for kind in KINDS}


def picture(i: int, size: tuple[int, int]) -> np.ndarray:
    """RGB uint8 [H, W, 3] with eight black or white stripes, which encode the frame number (up to 255)."""
    stripes = np.arange(size[0]) * 8 // size[0]
    return np.broadcast_to((i >> stripes & 1)[None, :, None] * 255, (size[1], size[0], 3)).astype(np.uint8)


def number_of(frame: np.ndarray) -> int:
    """The number of the `picture` in a decoded frame."""
    width = frame.shape[1]
    return sum(1 << bit for bit in range(8) if np.median(frame[:, (2 * bit + 1) * width // 16]) > 127)


def write_video(
    path: Path,
    times: Sequence[float],
    kind: Kind,
    *,
    streams: int = 1,
    muxer: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
) -> Path:
    """Writes frames at `times` (seconds). Each further stream is larger than the one before."""
    with av.open(str(path), "w", format=kind.format, options=muxer or {}) as container:
        outputs = []
        for n in range(1, streams + 1):
            stream = container.add_stream(kind.codec, rate=25)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = kind.size[0] * n, kind.size[1] * n, kind.pixels
            stream.options = encoder or {}
            stream.time_base = stream.codec_context.time_base = Fraction(1, kind.ticks)
            outputs.append(stream)
        for i, time in enumerate(times):
            for stream in outputs:
                frame = av.VideoFrame.from_ndarray(picture(i, (stream.width, stream.height)), format="rgb24")
                frame.pts, frame.time_base = round(time * kind.ticks), Fraction(1, kind.ticks)
                container.mux(stream.encode(frame))
        for stream in outputs:
            container.mux(stream.encode())
    return path


def constant(frames: int, start: float = 0.0) -> list[float]:
    return [start + i / 25 for i in range(frames)]


def recorded(frames: int) -> list[float]:
    """Frame times of a browser's recorder, at irregular distances of 31 to 250 ms."""
    steps = np.random.default_rng(1).choice([31, 33, 47, 66, 100, 250], frames - 1) / 1000
    return [0.0, *np.cumsum(steps).tolist()]


def write_recorder_webm(path: Path, frames: int = 125) -> Path:
    """Writes a file as a browser's recorder does, without length and frame rate."""
    write_video(path, recorded(frames), BY_SUFFIX["webm"], muxer={"live": "1"})
    raw = bytearray(path.read_bytes())
    at = raw.index(bytes.fromhex("23e383"))  # the element DefaultDuration becomes Void
    length = raw[at + 3] & 0x7F
    raw[at : at + 4 + length] = bytes([0xEC, 0x80 + 2 + length]) + bytes(2 + length)
    path.write_bytes(raw)
    return path


def write_edited(source: Path, path: Path, edit: dict[int, bytes], *, append: bytes | None = None) -> Path:
    """Copies packets and changes the bytes of some. `append` is a further packet at the end."""
    with av.open(str(source)) as old, av.open(str(path), "w", format=old.format.name.split(",")[0]) as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        step = last = 0
        for i, packet in enumerate(p for p in old.demux(stream) if p.size):
            assert packet.pts is not None
            step, last = packet.pts - last, packet.pts
            copy = av.Packet(edit.get(i, bytes(packet)))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, target
            new.mux(copy)
        if append is not None:
            copy = av.Packet(append)
            copy.pts = copy.dts = last + step
            copy.time_base, copy.stream = stream.time_base, target
            new.mux(copy)
    return path


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(p) for p in container.demux(video=0) if p.size]


def sequential(path: Path, stream: int = 0) -> list[np.ndarray]:
    """All frames of a video stream as FFmpeg decodes them, without code of this project."""
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=stream)]


def handlers(path: Path) -> list[int]:
    """Offsets of the track kinds in an mp4 file."""
    return [m.start() + 12 for m in re.finditer(rb"hdlr.{8}vide", path.read_bytes(), re.DOTALL)]
