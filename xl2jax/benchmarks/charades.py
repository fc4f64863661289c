"""Charades-STA, temporal grounding: the start and the end of an event that a sentence describes.

Upstream published numbers, but neither prompt nor code for it. The prompt, the times that are read in free text, and
the scores are those of lmms-eval 0.7.3.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Sequence
from typing import Any

from xl2jax.benchmarks.task import Reading, Task
from xl2jax.system.schema import Schema

_BEFORE = (
    "Please find the visual event described by a sentence in the video, determining its starting and ending times. The "
    "format should be: 'The event happens in the start time - end time'. For example, The event 'person turn a light "
    "on' happens in the 24.3 - 30.4 seonds. Now I will give you the textual sentence: "
)
_AFTER = "Please return its start time and end time."
THRESHOLDS = (0.3, 0.5, 0.7)

_KEYWORDS = ("start", "end", "happen")
# Possessive quantifiers keep the search linear. None of them changes what is found.
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2})?"
_NUMBER = r"\d++(?:\.\d++)?+"
_CLOCK_SPAN = re.compile(rf"\b({_CLOCK})\s*+[\u2013-]\s*+({_CLOCK})\b")
_NUMBER_SPAN = re.compile(rf"(?<!\d)({_NUMBER})\s*+[\u2013-]\s*+({_NUMBER})")
_CLOCKS = re.compile(rf"\b({_CLOCK})\b")
_NUMBERS = re.compile(r"\b(\d+(?:\.\d+)?)\b")
_SECONDS_SPAN = re.compile(rf"(?<!\d)({_NUMBER})\s*+(?:s\s*+)?+[\u2013-]\s*+({_NUMBER})")


class CharadesRow(Schema):
    video: str
    caption: str
    timestamp: list[Any] | str


def read_span(text: str) -> tuple[float, float] | None:
    """The first span of times in a text, in seconds and in order; None where there is none.

    Looked for, in this order: two clock times with a dash or "to" between, two numbers so, clock times anywhere, the
    first number of each sentence, two numbers with the unit s. Sentences that speak of a start, an end or of happening
    go first.
    """
    text = text.lower().replace("a specific example is : 20.8 - 30.0 seconds", "").replace("to", "-")
    sentences = re.split(r"[!?\n]", text)
    sentences = [s for s in sentences if any(word in s for word in _KEYWORDS)] or sentences
    for pattern in (_CLOCK_SPAN, _NUMBER_SPAN):
        for sentence in sentences:
            if match := pattern.search(sentence):
                return _ordered(match[1], match[2])
    for times in (
        [time for sentence in sentences for time in _CLOCKS.findall(sentence)],
        [match[1] for sentence in sentences if (match := _NUMBERS.search(sentence))],
    ):
        if len(times) >= 2:
            return _ordered(times[0], times[1])
    for sentence in sentences:
        if match := _SECONDS_SPAN.search(sentence):
            return _ordered(match[1], match[2])
    return None


def _ordered(one: str, other: str) -> tuple[float, float]:
    first, last = sorted((_seconds(one), _seconds(other)))
    return first, last


def _seconds(time: str) -> float:
    total = 0.0
    for part in time.split(":"):
        total = 60 * total + float(part)
    return total


def overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Intersection over union of two spans."""
    union = max(one[1], other[1]) - min(one[0], other[0])
    return max(min(one[1], other[1]) - max(one[0], other[0]), 0) / union if union > 0 else 0.0


class Charades(Task):
    Row = CharadesRow
    folder, dataset, split = "charades_sta", "lmms-eval/charades_sta", "test"
    metric = "charades_sta_mIOU"
    max_new_tokens = 50

    def __init__(self) -> None:
        super().__init__("temporal_grounding_charades", "lmms-eval")

    @property
    def files(self) -> tuple[str, ...]:
        return (self.name, "charades_sta_test", "charades_sta", self.split)

    def prompt(self, row: CharadesRow, subtitles: str | None = None) -> str:
        return f"{_BEFORE}{row.caption}. {_AFTER}"

    def video(self, row: CharadesRow) -> str:
        return row.video

    def video_path(self, row: CharadesRow) -> str:
        return f"{self.folder}/Charades_v1_480/{row.video}"

    def target(self, row: CharadesRow) -> str:
        return str(row.timestamp)

    def read(self, row: CharadesRow, text: str) -> Reading:
        span = read_span(text)
        return Reading(None if span is None else f"{span[0]:g} - {span[1]:g}", None)

    def parsed(self, reading: Reading) -> bool:
        return reading.extracted is not None

    def sample(self, row: CharadesRow, text: str, rng: random.Random) -> dict[str, str]:
        return {f"{row.video}>>>{row.caption}>>>{row.timestamp}": text}

    def score(self, sample: Any) -> float:
        """The overlap with the right span; 0 where the answer has no span."""
        ((key, text),) = sample.items()
        start, end = ast.literal_eval(key.rsplit(">>>", 1)[-1])
        span = read_span(text)
        return 0.0 if span is None else overlap((float(start), float(end)), span)

    def _scores(self, samples: Sequence[dict[str, str]]) -> list[float]:
        """Rows with the same video, sentence and span count once, with the last answer."""
        together = {key: text for sample in samples for key, text in sample.items()}
        return [self.score({key: text}) for key, text in together.items()]

    def aggregate(self, samples: Sequence[dict[str, str]]) -> float:
        scores = self._scores(samples)
        return sum(scores) * 100 / len(scores) if scores else 0

    def further_metrics(self, samples: Sequence[dict[str, str]]) -> dict[str, float]:
        scores = self._scores(samples)
        return {
            f"charades_sta_IOU@{round(10 * least)}": sum(s >= least for s in scores) * 100 / len(scores)
            if scores
            else 0
            for least in THRESHOLDS
        }
