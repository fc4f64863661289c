"""The ceilings that hold whatever a request asks for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LiveLimits:
    """Ceilings of live videos.

    sessions: those that are open at a time; 0 refuses them.
    fps: frames a second that are seen.
    minutes, dense_minutes, host_gib: what one of them keeps (`LiveMemory`), which is also what it keeps by default.
    idle_seconds: one ends when no frame and no question has come for so long.
    seconds: one ends so long after it was opened.
    frame_bytes: of a message over its WebSocket.
    """

    sessions: int = 2
    fps: float = 4.0
    minutes: float = 60.0
    dense_minutes: float = 10.0
    host_gib: float = 2.0
    idle_seconds: float = 300.0
    seconds: float = 24 * 3600.0
    frame_bytes: int = 8 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Ceilings of the server.

    queue: requests that are in the server at a time, from their first byte to their last.
    answers: answers that are decoded at a time.
    request_seconds: a request that is not answered by then ends with status 504.
    fetch_seconds: time for the download of a video, with all redirects, and for the body of a request but an upload.
    idle_seconds: an upload of which nothing comes for so long ends with status 408; a connection without a request, or on
      which nothing of an answer is taken, is closed.
    body_bytes: size of a request other than an upload.
    video_bytes: size of a video file, whether it is uploaded, downloaded, local or part of a request.
    video_seconds: length of a video.
    frames: frames that may be read from a video.
    pictures: pictures of a conversation that are seen in tiles.
    frame_pixels: pixels of a frame of the file, or of a picture.
    text_characters: characters of a question with the history before it.
    new_tokens: tokens of an answer.
    live: those of live videos.
    """

    queue: int = 64
    answers: int = 8
    request_seconds: float = 3600.0
    fetch_seconds: float = 300.0
    idle_seconds: float = 60.0
    body_bytes: int = 64 << 20
    video_bytes: int = 8 << 30
    video_seconds: float = 6 * 3600.0
    frames: int = 1024
    pictures: int = 16
    frame_pixels: int = 7680 * 4320
    text_characters: int = 65_536
    new_tokens: int = 4096
    live: LiveLimits = LiveLimits(sessions=0)
