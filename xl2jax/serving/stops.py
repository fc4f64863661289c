"""Cuts an answer at the first stop text."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Passes pieces of text on up to the first of `stops`, which is not passed on.

    What may be the beginning of a stop text is held back until more text decides it.

    Attributes:
      found: whether a stop text was met. No text is passed on from then on.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, piece: str, *, final: bool = False) -> str:
        """The text that can be passed on. `final`: no more follows."""
        if self.found:
            return ""
        text = self._held + piece
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
