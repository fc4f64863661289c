"""How a run reads videos and answers questions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xl2jax.benchmarks.released import DEFAULTS, Released, Setting, released
from xl2jax.benchmarks.task import Task
from xl2jax.errors import UserError
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.system.schema import read_bytes
from xl2jax.video.clip import Backend, FrameSampling
from xl2jax.video.frame_sampling import LastGroup


@dataclasses.dataclass(frozen=True)
class View:
    """How a video is read. Tasks with the same view share what is watched."""

    sampling: FrameSampling
    last_group: LastGroup
    prefill: PrefillConfig
    bilevel: BilevelConfig | None
    """None for dense decoding. With a selection file its entries are followed instead."""
    cache: CacheConfig
    backend: Backend


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Flags in place of the released values; None keeps those."""

    max_frames: int | None = None
    chunk_groups: int | None = None
    window_chunks: int | None = None


_FRAMES, _CHUNKS = ("--max-frames",), ("--chunk-groups", "--window-chunks")
_BILEVEL = ("--top-chunks", "--select-chunk-groups", "--pool")
_OF_BILEVEL = (*_BILEVEL, "--selection", "--offload")
_UNREAD: Mapping[Setting, tuple[str, tuple[str, ...]]] = {
    "pure": ("has neither chunks nor bi-level decoding", (*_CHUNKS, *_OF_BILEVEL)),
    "chunked": ("has no bi-level decoding", _OF_BILEVEL),
    "paper": ("has the released values", (*_FRAMES, *_CHUNKS, *_BILEVEL)),
}


def refuse_unread(setting: Setting, given: Iterable[str], *, by_file: bool) -> None:
    """Raises UserError for flags that the setting does not read.

    Args:
      given: the flags whose value is not the default.
      by_file: whether selection files say which chunks stay dense.
    """
    why, unread = _UNREAD.get(setting, ("", ()))
    reason = f"--setting {setting} {why}"
    found = [flag for flag in given if flag in unread]
    if not found and by_file:
        reason = "--selection says which chunks stay dense"
        found = [flag for flag in given if flag in _BILEVEL]
    if found:
        raise UserError(f"{reason}: leave out {', '.join(found)}")


def make_view(
    task: Task,
    setting: Setting,
    overrides: Overrides,
    bilevel: BilevelConfig,
    cache: CacheConfig,
    backend: Backend,
) -> View:
    """The view of a task. Without a script of upstream's, the values are those of `xl2jax infer`.

    Raises UserError for values that are out of range, and where `paper` is nothing that upstream released.
    """
    given = {name: value for name, value in dataclasses.asdict(overrides).items() if value is not None}
    values = released(task, setting)
    if values is None and setting == "paper":
        values = released(task, "chunked")
        if values is None:
            raise UserError(f"--setting paper: upstream released no script for {task.name}: choose another setting")
        setting = "chunked"  # the test set of MLVU
        if cache.offload:
            raise UserError(f"--setting paper has no bi-level decoding for {task.name}: leave out --offload")
    values = dataclasses.replace(values or DEFAULTS["bilevel" if setting == "paper" else setting], **given)
    return view_of(values, setting, bilevel, cache, backend)


def view_of(
    values: Released,
    setting: Setting,
    bilevel: BilevelConfig = BilevelConfig(),  # noqa: B008 (frozen)
    cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
    backend: Backend = "auto",
) -> View:
    """The view with these frames, chunks and window. Raises UserError for values out of range."""
    dense = values.chunk_groups is None or values.window_chunks is None
    prefill = (
        PrefillConfig(window_chunks=None) if dense else PrefillConfig(values.chunk_groups or 0, values.window_chunks)
    )
    return View(
        sampling=FrameSampling(max_frames=values.max_frames, times="upstream"),
        last_group="drop" if setting == "pure" else "fill",
        prefill=prefill,
        bilevel=bilevel if setting in ("bilevel", "paper") else None,
        cache=cache,
        backend=backend,
    )


def describe(view: View, files: list[Path]) -> dict[str, Any]:
    """A view for `run.json`. Selection files count by their content."""
    described = dataclasses.asdict(view)
    if view.bilevel is not None and files:
        described["bilevel"] = {"selection": [hashlib.sha256(read_bytes(file)).hexdigest()[:16] for file in files]}
    return described
