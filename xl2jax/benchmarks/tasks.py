"""The tasks by name, for both code bases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xl2jax.benchmarks.charades import Charades
from xl2jax.benchmarks.longvideobench import GROUPS, LongVideoBench
from xl2jax.benchmarks.lvbench import TYPES, LMMsLVBench, UpstreamLVBench
from xl2jax.benchmarks.mlvu import MLVU
from xl2jax.benchmarks.synthetic import Synthetic
from xl2jax.benchmarks.task import Task, Variant
from xl2jax.benchmarks.videomme import VideoMME
from xl2jax.errors import UserError

_LENGTHS = {
    "videomme_short": ("short",),
    "videomme_mid": ("medium",),
    "videomme_long": ("long",),
    "videomme_short_mid": ("short", "medium"),
    "videomme_short_long": ("short", "long"),
}
"""Upstream's parts of Video-MME. (Its bi-level copy compares the first letter of the length, and so keeps no row.)"""


def _lasts(durations: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda row: row.duration in durations


def _in_group(group: int) -> Callable[[Any], bool]:
    return lambda row: row.duration_group == group


def _upstream() -> dict[str, Task]:
    tasks: list[Task] = [
        VideoMME("videomme", "upstream"),
        VideoMME("videomme_w_subtitle", "upstream", subtitles=True),
        *(VideoMME(name, "upstream", _lasts(durations)) for name, durations in _LENGTHS.items()),
        MLVU("mlvu", "upstream", test=False),
        MLVU("mlvu_test", "upstream", test=True),
        UpstreamLVBench("lvbench"),
        *(UpstreamLVBench(f"lvbench_{kind}") for kind in TYPES),
        LongVideoBench("longvideobench_val_v", "upstream"),
        *(LongVideoBench(f"longvideobench_val_v_{g}", "upstream", _in_group(g)) for g in GROUPS),
        Synthetic("synthetic", "upstream"),
    ]
    return {task.name: task for task in tasks}


def _lmms_eval() -> dict[str, Task]:
    tasks: list[Task] = [
        VideoMME("videomme", "lmms-eval"),
        VideoMME("videomme_w_subtitle", "lmms-eval", subtitles=True),
        VideoMME("videomme_long", "lmms-eval", _lasts(("long",)), subtitles=True),
        VideoMME("videomme_long_w_subtitle", "lmms-eval", _lasts(("long",)), subtitles=True),
        MLVU("mlvu_dev", "lmms-eval", test=False),
        MLVU("mlvu_test", "lmms-eval", test=True),
        LMMsLVBench("lvbench", "lmms-eval"),
        LongVideoBench("longvideobench_val_v", "lmms-eval"),
        Charades(),
        Synthetic("synthetic", "lmms-eval"),
    ]
    return {task.name: task for task in tasks}


TASKS: dict[Variant, dict[str, Task]] = {"upstream": _upstream(), "lmms-eval": _lmms_eval()}
_SAME = {"mlvu_dev": "mlvu", "mlvu": "mlvu_dev"}
"""The development set of MLVU has another name in each code base; either is taken for both."""


def find_task(name: str, variant: Variant) -> Task:
    """Raises UserError for a name that the code base does not have."""
    tasks = TASKS[variant]
    task = tasks.get(name) or tasks.get(_SAME.get(name, ""))
    if task is None:
        others = [other for other in TASKS if name in TASKS[other]]
        if others:
            raise UserError(f"--task: {variant} has no task {name!r}: it belongs to --variant {others[0]}")
        raise UserError(f"--task: {variant} has no task {name!r}: choose from {', '.join(tasks)}")
    return task
