"""`bench read`: reading and resizing frames of a file, compared with decord, and its overlap with an encoder."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from xl2jax.arithmetic import ceil_div
from xl2jax.errors import UserError
from xl2jax.evaluation.scenes import make_scene
from xl2jax.inference import memory
from xl2jax.system.atomic import replacing_file
from xl2jax.video.clip import FrameSampling, open_video
from xl2jax.video.read_ahead import default_workers, resize
from xl2jax.video.writer import write_frames

MODES = ("decord", "sequential", "stream", "overlap")
_HEIGHTS = {"360p": (640, 360), "480p": (854, 480), "720p": (1280, 720), "1080p": (1920, 1080)}
_PIECE_SECONDS, _FPS = 20, 24


@dataclasses.dataclass(frozen=True)
class ReadArgs:
    """Times reading and resizing frames. Each row runs in a process of its own."""

    video: Path | None = None
    """A video file; by default one is made."""
    synthetic: str = "20m@720p"
    """Length and size of the video that is made and kept in build/: 90s, 20m or 1h @ 360p, 480p, 720p or 1080p."""
    frames: str = "400,1200"
    """Comma-separated numbers of frames."""
    modes: str = ",".join(MODES)
    """decord: one get_batch, then resizing. sequential: one frame at a time. stream: as infer.py reads. overlap: stream
    beside a stand-in for the encoder, which sleeps as long as reading takes."""
    size: int = 384
    """Height and width to which frames are resized, in pixels."""
    json: bool = False
    """Prints the rows as JSON."""


def parse_synthetic(text: str) -> tuple[int, int, int]:
    """`1h@720p` -> (seconds, width, height). Raises UserError."""
    match = re.fullmatch(r"(\d+)([smh])@(\d+p)", text)
    if match is None or match[3] not in _HEIGHTS or int(match[1]) < 1:
        raise UserError(f"--synthetic: such as 90s@360p or 1h@720p ({', '.join(_HEIGHTS)}), not {text!r}")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]], *_HEIGHTS[match[3]]


def write_long(path: Path, seconds: int, width: int, height: int) -> None:
    """Writes H.264 at 24 frames a second with the default key frames. 20 seconds are encoded and then repeated."""
    length = min(seconds, _PIECE_SECONDS)
    with tempfile.TemporaryDirectory() as scratch, replacing_file(path) as beside:
        piece = Path(scratch, "piece.mp4")
        _encode(piece, length, width, height)
        _repeat(piece, beside, length, ceil_div(seconds, length))


def _encode(path: Path, length: int, width: int, height: int) -> None:
    scene, count = make_scene(1, 5 * length), length * _FPS
    write_frames(path, (scene.frame(i * scene.frames // count, width, height) for i in range(count)), _FPS)


def _repeat(piece: Path, path: Path, length: int, times: int) -> None:
    """Writes the packets of `piece`, which lasts `length` seconds, `times` times."""
    import av

    with av.open(str(path), "w", format="mp4") as out:
        target = None
        for part in range(times):
            with av.open(str(piece)) as source:
                stream = source.streams.video[0]
                target = target or out.add_stream_from_template(stream)
                assert stream.time_base is not None
                offset = int(part * length / stream.time_base)
                for packet in source.demux(stream):
                    if packet.pts is not None and packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, target
                        out.mux(packet)


def ensure_video(video: Path | None, synthetic: str) -> Path:
    """The video to read, which is made first where it does not exist."""
    if video is not None:
        return Path(video)
    seconds, width, height = parse_synthetic(synthetic)
    path = Path("build") / f"synthetic-{synthetic.replace('@', '-')}.mp4"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_long(path, seconds, width, height)
    return path


class _NoCopy:
    """Lets numpy view an array of decord without copying it, as its `asnumpy` does."""

    def __init__(self, array: Any):
        self._array = array

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # CPU


def read_row(args: ReadArgs, mode: str, frames: int) -> dict[str, Any]:
    """Times reading `frames` evenly spread frames, and measures how far it raises the peak memory."""
    before = memory.peak_bytes()
    started = time.perf_counter()
    clip = open_video(ensure_video(args.video, args.synthetic), FrameSampling(fps=1.0, max_fps=_FPS, max_frames=frames))
    opened = time.perf_counter() - started
    count = len(clip.indices)
    alone: float | None = None
    if mode == "decord":
        import decord

        batch = np.from_dlpack(_NoCopy(decord.VideoReader(str(clip.path)).get_batch(clip.indices.tolist())))
        kept = np.stack([resize(frame, args.size) for frame in batch])
        assert len(kept) == count
    else:
        workers = 0 if mode == "sequential" else default_workers()
        pause = 0.0
        if mode == "overlap":
            reading = time.perf_counter()
            for _ in clip.batches(16, args.size, workers=workers):
                pass
            alone = time.perf_counter() - reading
            pause = alone * 16 / count
            started = time.perf_counter()
        received = 0
        for batch in clip.batches(16, args.size, workers=workers):
            received += len(batch)
            time.sleep(pause)
        assert received == count
    seconds = time.perf_counter() - started
    return {
        "mode": mode,
        "frames": count,
        "seconds": seconds,
        "open_s": opened,
        "frames_per_s": count / seconds,
        "peak_memory_bytes": memory.peak_bytes() - before,
        "x alone": seconds / (alone or seconds),
    }
