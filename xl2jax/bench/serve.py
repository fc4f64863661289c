"""`bench serve`: how long questions about a watched video wait while the server watches another client's long video."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from xl2jax.commands.flags import DEFAULT_CHECKPOINT, PrefillFlags
from xl2jax.commands.service import MediaArgs, ServiceArgs, build_service, check_service
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.evaluation.scenes import make_scene, write_scene

_SHORT = 32  # groups of the video that is asked about
_IDLE = 20  # questions while nothing else runs
_LONG = 4  # videos that are watched beside questions: one alone gives a dozen, too few for a percentile


@dataclasses.dataclass(frozen=True)
class ServeBenchArgs:
    """Times the first token of questions about a watched video, alone and while hour-long videos are watched."""

    checkpoint: str = str(DEFAULT_CHECKPOINT)
    """The model: a folder or a hub id."""
    minutes: int = 60
    """Length of the other client's videos, of each of which 1024 frames are read at most."""
    json: bool = False
    """Prints the row as JSON."""

    def check(self) -> None:
        """Raises UserError for flags that are out of range, and for what the server lacks."""
        if not 1 <= self.minutes <= 300:
            raise UserError(f"--minutes must be from 1 to 300, not {self.minutes}")
        check_service(ServiceArgs(checkpoint=self.checkpoint))


def serve_rows(args: ServeBenchArgs) -> Iterator[dict[str, Any]]:
    """Yields one row. Answers have one token, so that the time of a request is that of its first token.

    `limit_ms` is the time of one segment and twice the idle figure. `watch_fps` counts the time of watching only,
    `busy_watch_fps` all of the time in which questions were asked beside it.
    """
    with tempfile.TemporaryDirectory(prefix="xl2jax-bench-") as folder:
        media = Path(folder, "media")
        media.mkdir()
        long = args.minutes * 60 // FRAMES_PER_GROUP
        videos = {"short": _SHORT, "first": long, **{f"long{i}": long for i in range(_LONG)}}
        for seed, (name, groups) in enumerate(videos.items()):
            write_scene(media / f"{name}.mp4", make_scene(seed, groups), width=320, height=180)
        service = build_service(
            ServiceArgs(checkpoint=args.checkpoint, media=MediaArgs(media_root=(media,))), Path(folder)
        )
        service.engine.start()
        try:
            idle, busy, frame_ms, busy_fps = asyncio.run(_ask(service, media))
        finally:
            service.engine.stop()
        layout = service.engine.model.layout([[0] * 9] * (service.limits.frames // FRAMES_PER_GROUP))
        segment = service.engine.model.plan(layout, PrefillFlags().config()).segment_groups * FRAMES_PER_GROUP
    segment_ms = frame_ms * segment
    idle_ms, busy_ms = (1e3 * float(np.percentile(times, 95)) for times in (idle, busy))
    yield {
        "idle_questions": len(idle),
        "idle_p95_ms": idle_ms,
        "busy_questions": len(busy),
        "busy_p95_ms": busy_ms,
        "segment_ms": segment_ms,
        "watch_fps": 1e3 / frame_ms,
        "busy_watch_fps": busy_fps,
        "limit_ms": segment_ms + 2 * idle_ms,
        "busy/limit": busy_ms / (segment_ms + 2 * idle_ms),
    }


async def _ask(service: Any, media: Path) -> tuple[list[float], list[float], float, float]:
    """Seconds of questions about the short video, alone and while long ones are watched, one after the other; ms of
    watching a frame, and frames a second beside the questions.

    Another long video is watched before, so that no compilation is timed.
    """
    from xl2jax.serving.app import make_app

    transport = httpx2.ASGITransport(app=make_app(service))
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client:

        async def ask(name: str, number: int) -> float:
            content = [
                {"type": "video_url", "video_url": {"url": (media / f"{name}.mp4").as_uri()}},
                {"type": "text", "text": f"What is shape {number}?"},
            ]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            started = time.monotonic()
            answer = await client.post("/v1/chat/completions", json=body)
            if answer.status_code != 200:
                raise UserError(f"a request failed: {answer.text[:300]}")
            return time.monotonic() - started

        for name in ("short", "short", "first"):  # watches the videos and compiles
            await ask(name, 0)
        idle = [await ask("short", number) for number in range(_IDLE)]
        before, started = _watched(service), time.monotonic()
        busy = list[float]()
        for number in range(_LONG):
            watching = asyncio.create_task(ask(f"long{number}", 0))
            while not watching.done():
                busy.append(await ask("short", len(busy)))
            await watching
        elapsed = time.monotonic() - started
    frames, seconds = (b - a for a, b in zip(before, _watched(service), strict=True))
    return idle, busy, 1e3 * seconds / frames, frames / elapsed


def _watched(service: Any) -> tuple[float, float]:
    """Frames that were watched, and the seconds that it took."""
    return tuple(service.metrics.value(f"xl2jax_{name}_total") for name in ("watched_frames", "watch_seconds"))
