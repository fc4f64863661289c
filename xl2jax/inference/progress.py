"""What `Model` reports while it works: seconds by stage, and the pieces of an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from xl2jax.prompt import PromptTokenizer


class Stages:
    """Measures the seconds of vision and prefill. Without `measured` no stage is waited for."""

    def __init__(self, measured: bool):
        self.measured = measured
        self.seconds = {"vision": 0.0, "prefill": 0.0}
        self._since = 0.0

    def begin(self) -> None:
        self._since = time.perf_counter()

    def end(self, stage: str, result: Any) -> None:
        if self.measured:
            jax.block_until_ready(result)
            self.seconds[stage] += time.perf_counter() - self._since
            self.begin()


def timed[T](items: Iterator[T], timings: dict[str, float], name: str) -> Iterator[T]:
    """Adds the time spent waiting for each item to `timings[name]`."""
    while True:
        started = time.perf_counter()
        item = next(items, None)
        timings[name] += time.perf_counter() - started
        if item is None:
            return
        yield item


class AnswerStream:
    """Turns growing id lists into pieces of text, holding back an incomplete multi-byte character."""

    def __init__(self, tokenizer: PromptTokenizer, stop: set[int], on_text: Callable[[str], None] | None):
        self._tokenizer, self._stop, self._on_text = tokenizer, stop, on_text
        self._sent = ""

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self._stop else ids)

    def __call__(self, ids: list[int], final: bool = False) -> None:
        if self._on_text is None:
            return
        text = self._text(ids)
        if text.endswith("\ufffd") and not final:
            return
        if text[len(self._sent) :]:
            self._on_text(text[len(self._sent) :])
            self._sent = text

    def finish(self, ids: list[int]) -> str:
        self(ids, final=True)
        return self._text(ids)
