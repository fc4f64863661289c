"""Opens regular local video files with PyAV (FFmpeg) and finds the stream that holds the video."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xl2jax.errors import UserError, first_line
from xl2jax.system.schema import unreadable
from xl2jax.system.terminal import machine_fault

logger = logging.getLogger(__name__)

MAX_PIXELS = 1 << 27
"""Limit on the pixels of a frame or an image: a damaged header may state any number."""

# Demuxers that open other files or the network, or that treat the name as a pattern.
_PLAYLISTS = {
    "alias_pix", "brender_pix", "concat", "concatf", "dash", "hls", "image2", "image2pipe", "imf", "lavfi", "mlv",
    "rtp", "rtsp", "sap", "sdp", "tty", "vobsub", "webm_dash_manifest",
}  # fmt: skip
_PLAYLIST_STARTS = (b"#EXTM3U", b"ffconcat", b"<MPD")
_MAX_MOOV = 64 << 20  # limit on the bytes of an mp4 file's track index


def require_video_path(path: str | Path, kind: str = "video") -> None:
    """Raises UserError unless `path` is a regular file or a folder. A pipe, a device or a socket might block.

    `kind`: what the file should be, for messages.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if address := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)", str(path)):
            slashes = "//" if len(address[2]) == 1 else ""  # pathlib merges two slashes into one
            url = f"{address[1]}:{slashes}{str(path)[address.start(2) + bool(slashes) :]}"
            raise UserError(f"{url}: is an address; download the {kind} and give the file") from None
        raise UserError(f"{path}: no such {kind}") from None
    except OSError as e:
        raise unreadable(path, e) from None
    except ValueError as e:  # not a possible file name
        raise UserError(f"{str(path)!r}: no such {kind} ({e})") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a pipe, a device or a socket; write the {kind} to a file first")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a video file as a PyAV container.

    Raises:
      UserError: the file cannot be opened, or PyAV raised an error in the body of the `with` statement. On damaged
        files PyAV raises AttributeError, ValueError and others besides its own errors.
    """
    import av

    require_video_path(path)
    # "file:" and an absolute path keep FFmpeg from reading a name such as "x:y.mp4" as a protocol. The whitelists keep
    # playlists from opening other files.
    options = {"protocol_whitelist": "file", "format_whitelist": _formats()}
    try:
        with av.open(f"file:{path.absolute()}", options=options) as container:
            yield container
    except UserError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOENT, errno.EACCES):
            raise unreadable(path, OSError(e.errno, e.strerror)) from None  # Python's class replaces PyAV's
        if machine_fault(e) is not None:
            raise  # the machine ran short; the file may be good
        logger.debug("%s: %r", path, e, exc_info=True)
        raise UserError(f"{path}: not a video that can be read ({_playlist(path) or first_line(e)})") from None


@functools.cache
def _formats() -> str:
    """The demuxers that may open a file, as FFmpeg's `format_whitelist` expects them."""
    import av

    names = {name for names in av.formats_available for name in names.split(",")}
    return ",".join(sorted(names - _PLAYLISTS))


def _playlist(path: Path) -> str | None:
    """The advice to give if the file is a playlist, else None."""
    with contextlib.suppress(OSError), open(path, "rb") as f:
        if f.read(16).lstrip().startswith(_PLAYLIST_STARTS):
            return "a playlist: give a video file itself"
    return None


def video_stream(path: Path, container: Any, max_pixels: int | None = None) -> Any:
    """The best video stream that is not a cover picture, an alpha plane or a depth map.

    Streams are ranked as in decord's FFmpeg: by the number of frames (counted up to 5), then by bit rate. Among equals
    FFmpeg's own choice wins.

    Raises:
      UserError: the file has no such stream, FFmpeg does not know its codec, or its frames have more than `max_pixels`,
        by default `MAX_PIXELS`.
    """
    from av.stream import Disposition as D

    videos = list(container.streams.video)
    pictures = D.attached_pic | D.timed_thumbnails | D.dependent
    auxiliary = _auxiliary_tracks(path) if "mp4" in container.format.name and len(videos) > 1 else set()
    streams = [s for s in videos if not s.disposition & pictures and s.id not in auxiliary]
    if not streams:
        kinds = sorted({"a cover picture" if s.type == "video" else s.type for s in container.streams}) or ["nothing"]
        raise UserError(f"{path}: holds no video (only {', '.join(kinds)})")
    known = [s for s in streams if s.codec_context is not None]
    if not known:
        raise UserError(f"{path}: holds a video of a codec that FFmpeg does not know")
    ranks = {s.index: (min(s.frames or 5, 5), s.codec_context.bit_rate or 0) for s in known}
    best = container.streams.best("video")
    # max() returns the first of several equal streams, which the sort makes FFmpeg's choice.
    stream = max(sorted(known, key=lambda s: s.index != best.index), key=lambda s: ranks[s.index])
    if stream.codec_context.width * stream.codec_context.height > (max_pixels or MAX_PIXELS):
        size = f"{stream.codec_context.width} x {stream.codec_context.height}"
        raise UserError(f"{path}: claims frames of {size} pixels, more than can be read")
    return stream


def _auxiliary_tracks(path: Path) -> set[int]:
    """Track ids of alpha planes and depth maps in an ISO media file (mp4, mov, avif). FFmpeg does not mark them."""
    auxiliary = set()
    with contextlib.suppress(OSError, struct.error, IndexError), open(path, "rb") as f:  # damaged boxes are ignored
        for kind, start, end in _boxes_of_file(f):
            if kind != b"moov" or end - start > _MAX_MOOV:
                continue
            f.seek(start)
            moov = f.read(end - start)
            for track in _boxes(moov, 0, len(moov), b"trak"):
                headers = list(_boxes(moov, *track, b"tkhd"))
                media = [h for m in _boxes(moov, *track, b"mdia") for h in _boxes(moov, *m, b"hdlr")]
                if headers and any(moov[start + 8 : start + 12] == b"auxv" for start, _ in media):
                    at = headers[0][0]
                    (number,) = struct.unpack_from(">I", moov, at + (20 if moov[at] == 1 else 12))
                    auxiliary.add(number)
    return auxiliary


def _boxes_of_file(f: Any) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the content of each top-level box of an ISO media file."""
    at, total = 0, os.fstat(f.fileno()).st_size
    while at + 8 <= total:
        f.seek(at)
        head = f.read(16)
        size, kind = struct.unpack_from(">I4s", head)
        start = 8
        if size == 1 and len(head) == 16:
            (size,) = struct.unpack_from(">Q", head, 8)
            start = 16
        end = at + size if size else total
        if end < at + start:
            return
        yield kind, at + start, min(end, total)
        at = end


def _boxes(data: bytes, start: int, end: int, kind: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the content of each box of one kind."""
    while start + 8 <= end:
        size, name = struct.unpack_from(">I4s", data, start)
        if size < 8:
            return
        if name == kind:
            yield start + 8, min(start + size, end)
        start += size
