"""Writes answers in OpenAI's format, whole or in pieces."""

from __future__ import annotations

import dataclasses
import secrets
import time
from typing import Any

from xl2jax.inference.selection import Chunk
from xl2jax.serving.protocol import Asked


@dataclasses.dataclass(frozen=True)
class VideoUse:
    """What an answer read of its video.

    frames, video_tokens: of the watched video; without frames, the tokens are those of pictures. prompt_tokens: with prefix, question and history. cached: whether it was
    watched for an earlier question. seconds_seen: the time up to which a live video was seen.
    """

    frames: int
    video_tokens: int
    prompt_tokens: int
    cached: bool
    chunks: list[Chunk]
    seconds_seen: float | None = None


class Reply:
    """The JSON of one answer, whole or in pieces."""

    def __init__(self, model: str, asked: Asked):
        self._asked = asked
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, use: VideoUse, new_tokens: int) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        usage = _usage(use, new_tokens)
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage, **self._extra(use)}

    def piece(self, text: str, *, first: bool = False) -> dict[str, Any]:
        """A `chat.completion.chunk` with text."""
        return self._chunk({"role": "assistant", "content": text} if first else {"content": text}, None)

    def last(self, reason: str, use: VideoUse) -> dict[str, Any]:
        """The chunk that ends the answer."""
        return {**self._chunk({}, reason), **self._extra(use)}

    def usage(self, use: VideoUse, new_tokens: int) -> dict[str, Any]:
        """The chunk behind the last one, where usage was asked for."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(use, new_tokens)}

    def _chunk(self, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return chunk | ({"usage": None} if self._asked.include_usage else {})

    def _extra(self, use: VideoUse) -> dict[str, Any]:
        if not self._asked.include_chunks:
            return {}
        return {"xl2jax": {"chunks": [dataclasses.asdict(chunk) for chunk in use.chunks]}}


def _usage(use: VideoUse, new_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": use.prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": use.prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": use.video_tokens if use.cached else 0},
        "frames": use.frames,
        "video_tokens": use.video_tokens,
        "video_cached": use.cached,
        **({} if use.seconds_seen is None else {"seconds_seen": use.seconds_seen}),
    }
