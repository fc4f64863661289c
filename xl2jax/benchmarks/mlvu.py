"""MLVU: the development set with four options, and the test set with six."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from xl2jax.benchmarks.extraction import before_bracket, option_letter
from xl2jax.benchmarks.task import Reading, Tally, Task, Variant, percent
from xl2jax.system.schema import Schema

DEV_TYPES = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
TEST_TYPES = (
    "anomaly_reco", "count", "ego", "needleQA", "order", "plotQA", "sportsQA", "topic_reasoning", "tutorialQA",
)  # fmt: skip
_OTHER_NAMES = ("TR", "AR", "VS", "NQA", "ER", "PQA", "SSC", "AO", "AC")
"""Types that upstream prints for the development set. The data set spells its types differently."""


class MLVURow(Schema):
    video_name: str
    question: str
    answer: str
    task_type: str


class MLVU(Task):
    """`test` is the test set."""

    Row = MLVURow
    split = "test"

    def __init__(self, name: str, variant: Variant, *, test: bool):
        super().__init__(name, variant)
        self._upstream, self._test = variant == "upstream", test
        self.folder = "mlvu_test" if test else "mlvu"
        if self._upstream:
            self.dataset = "mlvu_test_dataset (a local folder)" if test else "sy1998/temp"
        else:
            self.dataset = "sy1998/MLVU_Test" if test else "sy1998/MLVU_dev"
        self.metric = "mlvu_perception_score" if test and self._upstream else "mlvu_percetion_score"
        self._types = TEST_TYPES if test else DEV_TYPES

    @property
    def files(self) -> tuple[str, ...]:
        return (self.name, self.folder, self.split)

    def prompt(self, row: MLVURow, subtitles: str | None = None) -> str:
        if self._upstream:
            return f"\n{row.question}\nOnly give the best option.\n\nBest option: ("
        return row.question if self._test else f"{row.question}\nOnly give the best option.\nBest option: ("

    def video(self, row: MLVURow) -> str:
        return row.video_name

    def target(self, row: MLVURow) -> str:
        return row.answer

    def category(self, row: MLVURow) -> str:
        return row.task_type

    def _extract(self, text: str) -> str:
        return before_bracket(text) if self._upstream else option_letter(text)

    def read(self, row: MLVURow, text: str) -> Reading:
        extracted = self._extract(text)
        return Reading(extracted, extracted == row.answer)

    def sample(self, row: MLVURow, text: str, rng: random.Random) -> dict[str, Any]:
        return {
            "question_id": row.question,
            "task_type": row.task_type,
            "pred_answer": self._extract(text),
            "answer": row.answer,
        }

    def score(self, sample: Any) -> float:
        return float(sample["pred_answer"] == sample["answer"])

    def _tally(self, samples: Sequence[dict[str, Any]]) -> Tally:
        any_type = self._upstream and not self._test
        tally = Tally([s["task_type"] for s in samples] if any_type else self._types)
        for s in samples:
            tally.add(s["task_type"], s["pred_answer"] == s["answer"])
        return tally

    def _macro(self, tally: Tally) -> float:
        """The mean over types. Upstream divides by zero where a type has no question."""
        counts = [tally.containing(kind) for kind in self._types]
        shares = [100 * c / n if self._upstream else percent(c, n) for c, n in counts]
        return sum(shares) / len(shares)

    def aggregate(self, samples: Sequence[dict[str, Any]]) -> float:
        tally = self._tally(samples)
        macro = self._macro(tally) if self._test or not self._upstream else None  # it may raise
        return percent(*tally.all) if self._upstream or macro is None else macro

    def printed(self, samples: Sequence[dict[str, Any]]) -> list[str]:
        tally = self._tally(samples)
        if not self._upstream:
            lines = [f"{kind}: {percent(*tally.containing(kind)):.1f}%" for kind in self._types]
            last = [f"Average Performance Across All Task Categories: {self._macro(tally):.1f}%"]
        elif self._test:
            lines = [f"{kind}: {percent(*tally.containing(kind)): .2f}%" for kind in self._types]
            both = self._macro(tally), percent(*tally.all)
            last = [f"Overall Performance: {value: .2f}%" for value in both]
        else:
            lines = [f"{name}: {percent(*tally.containing(name)): .1f}%" for name in _OTHER_NAMES]
            last = [f"Overall Performance: {percent(*tally.all): .1f}%"]
        return [*(f"Evaluation on Task Categories: {line}" for line in lines), *last]
