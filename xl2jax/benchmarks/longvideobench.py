"""LongVideoBench, validation set, video input without subtitles. Upstream and lmms-eval have the same code."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from xl2jax.benchmarks.extraction import LONGVIDEOBENCH_PREFIXES, first_letter
from xl2jax.benchmarks.task import Reading, Task, Variant
from xl2jax.system.schema import Schema

GROUPS = (15, 60, 600, 3600)
_LETTERS = "ABCDE"


class LongVideoBenchRow(Schema):
    id: str
    video_path: str
    question: str
    option0: str
    option1: str = "N/A"
    option2: str = "N/A"
    option3: str = "N/A"
    option4: str = "N/A"
    correct_choice: int
    duration_group: int
    question_category: str

    @property
    def options(self) -> list[str]:
        return [self.option0, self.option1, self.option2, self.option3, self.option4]


class LongVideoBench(Task):
    """An answer without a letter gets a random one. Scoring all answers in the order of the rows, from seed 0 on, gives
    upstream's numbers. (lmms-eval scores in four threads, so that its random letters differ from run to run.)"""

    Row = LongVideoBenchRow
    dataset, split = "longvideobench/LongVideoBench", "validation"
    metric, unit = "lvb_acc", 1.0
    max_new_tokens = 32
    greedy = {"temperature": 0, "do_sample": False}  # noqa: RUF012
    folder = "longvideobench"

    def __init__(self, name: str, variant: Variant, keep: Callable[[LongVideoBenchRow], bool] | None = None):
        super().__init__(name, variant, keep)

    @property
    def files(self) -> tuple[str, ...]:
        return (self.name, "longvideobench_val_v", "lvb_val", self.split)

    def prompt(self, row: LongVideoBenchRow, subtitles: str | None = None) -> str:
        options = [option for option in row.options if option != "N/A"]
        lines = [f"{letter}. {option}" for letter, option in zip(_LETTERS, options)]  # noqa: B905
        question = f"{row.question}\n" + "\n".join(lines)
        return f"{question}\nAnswer with the option's letter from the given choices directly.\n"

    @property
    def home(self) -> str:
        return "ALL_LONGVIDEOBENCH_VIDEOS_DIR" if self.variant == "upstream" else super().home

    def video(self, row: LongVideoBenchRow) -> str:
        return row.video_path

    def video_path(self, row: LongVideoBenchRow) -> str:
        return row.video_path if self.variant == "upstream" else f"datasets/longvideobench/videos/{row.video_path}"

    def target(self, row: LongVideoBenchRow) -> str:
        return str(row.correct_choice)

    def category(self, row: LongVideoBenchRow) -> str:
        return row.question_category

    def duration(self, row: LongVideoBenchRow) -> str:
        return f"{row.duration_group} s"

    def _choices(self, row: LongVideoBenchRow) -> tuple[str, ...]:
        count = row.options.index("N/A") if "N/A" in row.options else len(row.options)
        return tuple(_LETTERS[:count])

    def read(self, row: LongVideoBenchRow, text: str) -> Reading:
        letter = first_letter(text, _LETTERS, LONGVIDEOBENCH_PREFIXES)
        if not letter:
            return Reading(None, None, self._choices(row))
        return Reading(letter, letter == chr(ord("A") + row.correct_choice))

    def sample(self, row: LongVideoBenchRow, text: str, rng: random.Random) -> dict[str, Any]:
        reading = self.read(row, text)
        return {
            "id": row.id,
            "duration_group": row.duration_group,
            "question_category": row.question_category,
            "answer": chr(ord("A") + row.correct_choice),
            "parsed_pred": reading.extracted or rng.choice(reading.choices),
        }

    def submission(self, row: LongVideoBenchRow, text: str) -> dict[str, str]:
        return {row.id: text}

    def score(self, sample: Any) -> float:
        return float(sample["parsed_pred"] == sample["answer"])

    def _table(self, samples: Sequence[dict[str, Any]]) -> dict[Any, dict[str, float]]:
        groups: dict[Any, list[float]] = {}
        for s in samples:
            for key in (s["duration_group"], s["question_category"]):
                groups.setdefault(key, []).append(self.score(s))
        shares = {key: (len(scores), sum(scores) / len(scores)) for key, scores in groups.items()}
        count = sum(n for n, _ in shares.values())
        overall = sum(share * n for n, share in shares.values()) / count if count else 0
        table: dict[Any, dict[str, float]] = {k: {"num": n, "acc": round(a, 5)} for k, (n, a) in shares.items()}
        return {**table, "Overall": {"num": count, "acc": round(overall, 5)}}

    def aggregate(self, samples: Sequence[dict[str, Any]]) -> float:
        return self._table(samples)["Overall"]["acc"]

    def printed(self, samples: Sequence[dict[str, Any]]) -> list[str]:
        return [str(self._table(samples))]
