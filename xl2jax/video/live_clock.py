"""The time of a live video, and which of its frames are kept.

Times that sources give are wrong in many ways. Here they become seconds that only rise: what is missing is a gap.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Literal

logger = logging.getLogger(__name__)

LATE_SECONDS = 1.0
"""A frame that is behind the last one by no more than this is out of order, and is left out."""

JUMP_SECONDS = 3600.0
"""A clock that goes back by more than `LATE_SECONDS`, or forward by more than this, is believed when two frames in a row
agree."""

LARGEST_SECONDS = 1e11
"""A time beyond this, which is the year 5138 if it counts from 1970, is no time."""

type ClockMode = Literal["stream", "wall"]


class LiveClock:
    """Gives each frame its seconds, counted from the first frame, or leaves it out.

    Attributes:
      mode: stream takes the times of the source. wall takes those of this machine, when a frame came.
      seconds: of the last frame that was in order, whether or not it was kept.
      late: frames that were left out because they were out of order.
      jumps: how often the source's clock went back or leapt forward.
    """

    def __init__(self, fps: float | None, mode: ClockMode = "stream", *, now: Callable[[], float] = time.monotonic):
        """`fps`: how many frames a second are kept; None keeps all. `now` reads this machine's clock in seconds."""
        self._fps, self.mode, self._now = fps, mode, now
        self.seconds: float | None = None
        self.late = self.jumps = 0
        self._last: float | None = None  # the source's time of the last frame
        self._suspect: float | None = None
        self._offset = self._came = 0.0
        self._place = self._place_before = -1
        self._interrupted = False

    def interrupted(self) -> None:
        """Says that the source was opened anew. The time between is counted by this machine's clock."""
        self._interrupted = self._last is not None

    def lost(self) -> None:
        """Says that the frame that was just accepted is damaged. The next one of its interval is kept in its place."""
        self._place = self._place_before

    def accept(self, given: float | None) -> float | None:
        """The seconds of a frame that the source dates `given`, or None for a frame that is left out.

        A frame without a time, or with one that cannot be one, follows the last frame by as much as it came after it.
        """
        now = self._now()
        if self.mode == "wall" or given is None or not abs(given) <= LARGEST_SECONDS:  # NaN is not
            given = now if self._last is None else self._last + (now - self._came)
        if self._last is None or self.seconds is None:
            self._offset = -given
        elif self._interrupted:
            self._offset = self.seconds + max(now - self._came, 0.0) - given
        else:
            step = given - self._last
            if -LATE_SECONDS <= step <= 0:
                self.late += 1
                return None
            if step < 0 or step > JUMP_SECONDS:
                agrees = self._suspect is not None and 0 < given - self._suspect <= JUMP_SECONDS
                if not agrees:
                    self._suspect = given
                    self.late += 1
                    return None
                self.jumps += 1
                if step < 0:
                    self._offset = self.seconds + (1 / self._fps if self._fps else 0.04) - given
                    logger.warning("the video's clock went back by %.1f s: the video's time goes on", -step)
                else:
                    logger.warning("the video's clock leapt forward by %.1f s: this is a gap in its time", step)
        seconds = given + self._offset
        if self.seconds is not None and seconds <= self.seconds:  # by rounding
            self.late += 1
            return None
        self._interrupted, self._suspect = False, None
        self._last, self._came, self.seconds = given, now, seconds
        if self._fps is None:
            return self.seconds
        place = math.floor(self.seconds * self._fps + 1e-6)
        if place <= self._place:
            return None
        self._place_before, self._place = self._place, place
        return self.seconds
