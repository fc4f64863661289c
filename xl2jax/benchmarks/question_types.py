"""Scores by type of question, as upstream's script for bi-level runs counts them when it merges their logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xl2jax.benchmarks.lvbench import UpstreamLVBench
from xl2jax.benchmarks.task import Task


def by_question_type(task: Task, answers: Sequence[tuple[Any, str]]) -> dict[str, dict[str, float]]:
    """Right answers, answers and their share in percent by type of question, and for all of them (`global`).

    For LVBench the answer itself has to be the letter, and empty answers count. The task's own metric extracts a
    letter and leaves empty answers out, so that the two numbers may differ.
    """
    counts: dict[str, list[int]] = {}
    for row, text in answers:
        right = text == task.letter(row) if isinstance(task, UpstreamLVBench) else bool(task.read(row, text).correct)
        for kind in (task.category(row), "global"):
            tally = counts.setdefault(kind, [0, 0])
            tally[0] += right
            tally[1] += 1
    return {kind: {"correct": c, "total": n, "accuracy": c / n * 100} for kind, (c, n) in counts.items()}
