"""Two runs on the same questions: how often they agree, and whether one is better by more than chance."""

from __future__ import annotations

import dataclasses
from typing import Any

from xl2jax.benchmarks.results import Results, Scored, TaskResult
from xl2jax.benchmarks.statistics import mcnemar
from xl2jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Change:
    """A question whose score differs."""

    task: str
    doc_id: int
    video: str
    first: str
    second: str
    first_score: float
    second_score: float


@dataclasses.dataclass(frozen=True)
class TaskComparison:
    """One task in both runs. A score of at least one half counts as right.

    same_text: how many answers have the same text. same_score: how many have the same score. p: of McNemar's test.
    """

    task: str
    questions: int
    only_in_one: int
    first: float
    second: float
    same_text: int
    same_score: int
    only_first_right: int
    only_second_right: int
    p: float
    changes: list[Change]

    def row(self) -> dict[str, Any]:
        """For a table."""
        row = dataclasses.asdict(self)
        del row["changes"]
        return row


def compare(first: Results, second: Results) -> list[TaskComparison]:
    """Compares the tasks that both runs have. Raises UserError where they have none, or their questions differ."""
    theirs = {r.task.name: r for r in second.tasks}
    shared = [(r, theirs[r.task.name]) for r in first.tasks if r.task.name in theirs]
    if not shared:
        raise UserError("the two runs have no task in common")
    return [_compare(one, other) for one, other in shared]


def _compare(one: TaskResult, other: TaskResult) -> TaskComparison:
    name = one.task.name
    mine = {s.record.doc_id: s for s in one.scored}
    theirs = {s.record.doc_id: s for s in other.scored}
    both = [(mine[i], theirs[i]) for i in sorted(mine.keys() & theirs.keys())]
    for a, b in both:
        if a.record.row != b.record.row:
            raise UserError(f"question {a.record.doc_id} of {name} is another one in each run: the data sets differ")
    if not both:
        raise UserError(f"no question of {name} was answered in both runs")
    only_first = sum(a.score >= 0.5 > b.score for a, b in both)
    only_second = sum(b.score >= 0.5 > a.score for a, b in both)
    return TaskComparison(
        task=name,
        questions=len(both),
        only_in_one=len(mine.keys() ^ theirs.keys()),
        first=sum(a.score for a, _ in both) / len(both),
        second=sum(b.score for _, b in both) / len(both),
        same_text=sum(a.text == b.text for a, b in both),
        same_score=sum(a.score == b.score for a, b in both),
        only_first_right=only_first,
        only_second_right=only_second,
        p=mcnemar(only_first, only_second),
        changes=[_change(name, a, b) for a, b in both if a.score != b.score],
    )


def _change(task: str, a: Scored, b: Scored) -> Change:
    return Change(task, a.record.doc_id, a.record.video, a.text, b.text, a.score, b.score)
