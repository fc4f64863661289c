"""LVBench: upstream's form with the options in a column of their own, and lmms-eval's with options in the question."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from typing import Any

from xl2jax.benchmarks.extraction import lvbench_answer, option_letter
from xl2jax.benchmarks.task import Reading, Task, percent
from xl2jax.system.schema import Schema

TYPES = ("cartoon", "documentary", "live", "selfmedia", "sport", "tv")


def _first(kinds: list[str] | str) -> str:
    return kinds if isinstance(kinds, str) else next(iter(kinds), "")


class UpstreamRow(Schema):
    video: str
    question: str
    candidates: list[str]
    answer: str
    question_type: list[str] | str = ""
    type: str = ""
    start: Any = None
    end: Any = None


class UpstreamLVBench(Task):
    """One of upstream's six tasks, or all of them together."""

    Row = UpstreamRow
    folder, dataset, split = "lvbench", "LVBench (a local folder)", "train"
    metric = "lvbench_mc_accuracy"

    def __init__(self, name: str, keep: Callable[[UpstreamRow], bool] | None = None):
        super().__init__(name, "upstream", keep)

    @property
    def files(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        return tuple((f"lvbench_{kind}",) for kind in TYPES) if self.name == "lvbench" else (self.files,)

    def prompt(self, row: UpstreamRow, subtitles: str | None = None) -> str:
        options = "".join(f"{letter}. {text}\n" for letter, text in zip(string.ascii_uppercase, row.candidates))  # noqa: B905
        return f"{row.question}\n{options}Answer with the option's letter from the given choices directly."

    @property
    def home(self) -> str:
        return "ALL_LVBENCH_VIDEOS_DIR"

    def video(self, row: UpstreamRow) -> str:
        return f"{row.video}.mp4"

    def video_path(self, row: UpstreamRow) -> str:
        return self.video(row)

    def media_options(self, row: UpstreamRow) -> dict[str, Any]:
        span = {"start": row.start, "end": row.end} if "start" in row.model_fields_set else {}
        return {**span, "video_read_type": "img"}

    def letter(self, row: UpstreamRow) -> str | None:
        letters = zip(string.ascii_uppercase, row.candidates)  # noqa: B905 (further options have no letter)
        return next((letter for letter, text in letters if text == row.answer), None)

    def target(self, row: UpstreamRow) -> str:
        return row.answer

    def category(self, row: UpstreamRow) -> str:
        return _first(row.question_type)

    def read(self, row: UpstreamRow, text: str) -> Reading:
        found, letter = lvbench_answer(text), self.letter(row)
        extracted = found.upper() if found.upper() in tuple(string.ascii_uppercase) else None
        return Reading(extracted, letter is not None and found == lvbench_answer(letter))

    def sample(self, row: UpstreamRow, text: str, rng: random.Random) -> dict[str, Any]:
        return {"pred_answer": text, "gt_answer": self.letter(row), "score": int(bool(self.read(row, text).correct))}

    def score(self, sample: Any) -> float:
        return float(sample["score"])

    def aggregate(self, samples: Sequence[dict[str, Any]]) -> float:
        answered = [s for s in samples if s["pred_answer"] != ""]
        return percent(sum(s["score"] for s in answered), len(answered))


class LMMsRow(Schema):
    video_path: str
    question: str
    answer: str
    options: list[str] | None = None
    question_type: list[str] | str = ""
    type: str = ""


class LMMsLVBench(Task):
    """lmms-eval's task."""

    Row = LMMsRow
    folder, dataset, split = "lvbench", "lmms-eval/LVBench", "train"
    metric, unit = "lvbench_score", 1.0
    greedy = {}  # noqa: RUF012

    @property
    def files(self) -> tuple[str, ...]:
        return (self.name, self.split)

    def prompt(self, row: LMMsRow, subtitles: str | None = None) -> str:
        lines = [f"({letter}) {text}" for letter, text in zip(string.ascii_uppercase, row.options or [])]  # noqa: B905
        return "\n".join([row.question, *lines, "Answer the question with the option letter"])

    def video(self, row: LMMsRow) -> str:
        return row.video_path

    def target(self, row: LMMsRow) -> str:
        return row.answer

    def category(self, row: LMMsRow) -> str:
        return _first(row.question_type)

    def read(self, row: LMMsRow, text: str) -> Reading:
        extracted = option_letter(text)
        return Reading(extracted, extracted == row.answer)

    def sample(self, row: LMMsRow, text: str, rng: random.Random) -> bool:
        return option_letter(text) == row.answer

    def score(self, sample: Any) -> float:
        return float(sample)

    def aggregate(self, samples: Sequence[bool]) -> float:
        return sum(samples) / len(samples)
