"""Frames, chunks and windows of the scripts that upstream released, for its three settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from xl2jax.benchmarks.task import Task

type Setting = Literal["pure", "chunked", "bilevel", "paper"]
"""pure: dense prefill and dense decoding. chunked: chunked prefill and dense decoding. bilevel: chunked prefill and
bi-level decoding. paper: the released values of bilevel, which no flag changes."""

SCRIPTS: Mapping[str, Literal["pure", "chunked", "bilevel"]] = {
    "pure": "pure", "w_chunk": "chunked", "w_chunk_bilevel": "bilevel",
}  # fmt: skip
"""Upstream's folders of scripts, and the settings that they are."""


@dataclasses.dataclass(frozen=True)
class Released:
    """How a script reads a video. `chunk_groups` and `window_chunks` are None where prefill is dense."""

    max_frames: int
    chunk_groups: int | None = None
    window_chunks: int | None = None


RELEASED: Mapping[str, Mapping[str, Released]] = {
    "videomme": {"pure": Released(400), "chunked": Released(300, 4, 3), "bilevel": Released(400, 4, 3)},
    "mlvu": {"pure": Released(256), "chunked": Released(256, 4, 3), "bilevel": Released(256, 4, 3)},
    "mlvu_test": {"pure": Released(256), "chunked": Released(256, 4, 3)},
    "lvbench": {"pure": Released(600), "chunked": Released(600, 4, 11), "bilevel": Released(600, 4, 11)},
    "longvideobench": {"pure": Released(400), "chunked": Released(400, 6, 5), "bilevel": Released(400, 4, 3)},
}
"""By the data set's folder and the setting. Upstream has no bi-level script for the test set of MLVU."""

DEFAULTS: Mapping[str, Released] = {
    "pure": Released(256), "chunked": Released(256, 4, 3), "bilevel": Released(256, 4, 3),
}  # fmt: skip
"""Values for tasks that upstream released no script for: those of `xl2jax infer`."""


def released(task: Task, setting: Setting) -> Released | None:
    """The released values of a task; None where there is no script."""
    values = RELEASED.get(task.folder, {}) if task.dataset != "synthetic" else {}
    return values.get("bilevel" if setting == "paper" else setting)
