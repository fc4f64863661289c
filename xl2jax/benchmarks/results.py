"""The scores of a run, from its records alone."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xl2jax.benchmarks.extraction import strip_reasoning
from xl2jax.benchmarks.lvbench import UpstreamLVBench
from xl2jax.benchmarks.question_types import by_question_type
from xl2jax.benchmarks.records import Record, RunInfo, count_by_task, read_info, read_records
from xl2jax.benchmarks.statistics import mean_interval, wilson
from xl2jax.benchmarks.task import AGGREGATE_ERRORS, Sample, Task
from xl2jax.benchmarks.tasks import find_task
from xl2jax.benchmarks.videomme import VideoMME
from xl2jax.errors import UserError, listing

_LENGTHS = ((120, "below 2 min"), (900, "2 to 15 min"), (3600, "15 to 60 min"))
_LONGEST = "60 min and more"


@dataclasses.dataclass(frozen=True)
class Scored:
    """An answered question. `text` is what was scored; `score` is 1, 0, or a share."""

    record: Record
    row: Any
    text: str
    sample: Sample
    score: float
    parsed: bool


@dataclasses.dataclass(frozen=True)
class Part:
    """The answers of a category or of videos of some length: their number, mean score and 95 % interval."""

    count: int
    score: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task of a run. `unanswered` are questions that could not be asked. `view` says how videos were read.

    `without_subtitles` is the number of questions whose prompt lacks the subtitles that the task has.
    """

    task: Task
    setting: str
    view: Mapping[str, Any]
    scored: list[Scored]
    unanswered: list[Record]
    questions: int
    without_subtitles: int = 0

    @functools.cached_property
    def value(self) -> float | None:
        """The number of the code base; None where its code raises an error (`problem`)."""
        return None if self.problem else self.task.aggregate([s.sample for s in self.scored])

    @functools.cached_property
    def problem(self) -> str | None:
        if not self.scored:
            return "no question was answered"
        try:
            self.task.aggregate([s.sample for s in self.scored])
        except AGGREGATE_ERRORS as e:
            return f"the code of {self.task.variant} raises {type(e).__name__} here: a type of question is missing or unknown"
        return None

    @property
    def printed(self) -> list[str]:
        return [] if self.problem else self.task.printed([s.sample for s in self.scored])

    @property
    def further(self) -> dict[str, float]:
        return {} if self.problem else self.task.further_metrics([s.sample for s in self.scored])

    @property
    def micro(self) -> Part | None:
        """All answers alike."""
        return part(self.scored) if self.scored else None

    @property
    def macro(self) -> float | None:
        """The mean over categories."""
        parts = self.by_category.values()
        return sum(p.score for p in parts) / len(parts) if parts else None

    @property
    def as_wrong(self) -> float | None:
        """The mean score if questions that could not be asked count as wrong."""
        count = len(self.scored) + len(self.unanswered)
        return sum(s.score for s in self.scored) / count if count else None

    @property
    def by_category(self) -> dict[str, Part]:
        return _parts(self.scored, lambda s: self.task.category(s.row) or "all")

    @property
    def by_duration(self) -> dict[str, Part]:
        order = [*(name for _, name in _LENGTHS), _LONGEST, "short", "medium", "long"]
        parts = _parts(self.scored, self._duration)
        return dict(sorted(parts.items(), key=lambda p: order.index(p[0]) if p[0] in order else _first_number(p[0])))

    def _duration(self, scored: Scored) -> str:
        given = self.task.duration(scored.row)
        if given is not None:
            return given
        seconds = scored.record.duration or 0.0
        return next((name for limit, name in _LENGTHS if seconds < limit), _LONGEST)

    @property
    def unparsed(self) -> list[Scored]:
        """Answers in which no letter or time was found."""
        return [s for s in self.scored if not s.parsed]

    @property
    def by_upstreams_script(self) -> dict[str, dict[str, float]]:
        """What upstream's script for bi-level runs would report; empty for other tasks."""
        if self.task.variant != "upstream" or not isinstance(self.task, VideoMME | UpstreamLVBench):
            return {}
        return by_question_type(self.task, [(s.row, s.text) for s in self.scored])


def _first_number(name: str) -> int:
    digits = name.split()[0]
    return int(digits) if digits.isdigit() else 1 << 30


def part(scored: Sequence[Scored]) -> Part:
    scores = [s.score for s in scored]
    right = sum(scores)
    low, high = wilson(right, len(scores)) if set(scores) <= {0.0, 1.0} else mean_interval(scores)
    return Part(len(scores), right / len(scores), low, high)


def _parts(scored: Sequence[Scored], group: Callable[[Scored], str]) -> dict[str, Part]:
    groups: dict[str, list[Scored]] = {}
    for s in scored:
        groups.setdefault(group(s), []).append(s)
    return {name: part(groups[name]) for name in sorted(groups)}


@dataclasses.dataclass(frozen=True)
class Results:
    """A run with its scores."""

    info: RunInfo
    tasks: list[TaskResult]

    @property
    def complete(self) -> bool:
        return all(len(t.scored) + len(t.unanswered) == t.questions for t in self.tasks)


def score(info: RunInfo, records: Mapping[tuple[str, int], Record]) -> Results:
    """Scores the records of a run. The same answers give the same scores, in whatever order they were given."""
    tasks = []
    for name, count in count_by_task(info).items():
        task = find_task(name, info.asked["variant"])
        mine = sorted((r for r in records.values() if r.task == name), key=lambda r: r.doc_id)
        rng = random.Random(0)  # the seed that both code bases set
        scored = [_scored(task, record, rng) for record in mine if record.text is not None]
        unanswered = [record for record in mine if record.text is None]
        asked = info.asked["tasks"][name]
        view, bare = asked.get("view", {}), asked.get("without_subtitles", 0)
        tasks.append(TaskResult(task, info.asked["setting"], view, scored, unanswered, count, bare))
    return Results(info, tasks)


def _scored(task: Task, record: Record, rng: random.Random) -> Scored:
    row = task.row(record.row, f"question {record.doc_id} of {task.name}")
    assert record.text is not None
    text = strip_reasoning(record.text) if task.variant == "lmms-eval" else record.text
    sample = task.sample(row, text, rng)
    return Scored(record, row, text, sample, task.score(sample), parsed=task.parsed(task.read(row, text)))


def read_results(folders: Sequence[Path]) -> Results:
    """Reads one run, which may be spread over several folders.

    Raises UserError where a folder holds no run, or the folders hold runs with different settings.
    """
    infos = []
    for folder in folders:
        info = read_info(folder)
        if info is None:
            raise UserError(f"{folder}: holds no run (run.json is missing)")
        infos.append(info)
        difference = infos[0].difference(info)
        if difference is not None:
            raise UserError(f"{folders[0]} and {folder} are runs with different settings ({difference})")
    records = read_records(folders)
    counts = count_by_task(infos[0])
    for task, doc_id in records:
        if not 0 <= doc_id < counts.get(task, 0):
            raise UserError(
                f"{listing(map(str, folders))}: an answer to question {doc_id} of {task}, which the run lacks"
            )
    return score(infos[0], records)


def require_complete(results: Results, folders: Sequence[Path]) -> None:
    """Raises UserError where questions have not been asked yet."""
    left = [
        f"{t.questions - len(t.scored) - len(t.unanswered)} of {t.questions} questions of {t.task.name}"
        for t in results.tasks
        if len(t.scored) + len(t.unanswered) < t.questions
    ]
    if left:
        raise UserError(
            f"{listing(map(str, folders))}: {listing(left)} have not been asked yet: start the same command again, or the "
            "missing shards"
        )
