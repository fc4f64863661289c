"""What `Model` reports while it works: seconds by stage, and the pieces of an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


class AnswerText:
    """Turns growing id lists into pieces of text, holding back an incomplete multi-byte character.

    Attributes:
      sent: all pieces so far.
    """

    def __init__(self, tokenizer: PromptTokenizer):
        self._tokenizer = tokenizer
        self.sent = ""

    def add(self, ids: list[int], *, final: bool = False) -> str:
        """The text of all `ids` that was not given before. `final` gives also what was held back."""
        text = self._tokenizer.decode(ids)
        if text.endswith("\ufffd") and not final:
            return ""
        piece, self.sent = text[len(self.sent) :], text
        return piece
