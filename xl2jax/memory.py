"""How much memory a video will take, and whether it is there."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys

import jax
import jax.numpy as jnp

from xl2jax.bilevel import BilevelConfig, mixed_slots
from xl2jax.config import FRAMES_PER_GROUP, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.layout import VideoLayout
from xl2jax.prefill import PrefillPlan

_WORKSPACE = 256 << 20  # activations of one segment and XLA's temporaries, at least


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes beyond the parameters."""

    cache: int
    pooled: int
    mixed: int
    workspace: int

    @property
    def total(self) -> int:
        return self.cache + self.pooled + self.mixed + self.workspace


def memory_need(
    config: VideoXL2Config, plan: PrefillPlan, layout: VideoLayout, bilevel: BilevelConfig | None, dtype: jax.typing.DTypeLike
) -> MemoryNeed:  # fmt: skip
    """What the video cache and, where `bilevel` is given, its pooled and mixed copies take."""
    c = config.llm
    itemsize = jnp.dtype(dtype).itemsize
    slot = 2 * c.layers * c.kv_heads * c.head_width * itemsize
    pooled = mixed = 0
    if bilevel is not None:
        groups = (plan.slots - plan.visual_start) // plan.visual_tokens
        pooled = groups * (plan.visual_tokens // bilevel.pool) * slot
        mixed = mixed_slots(layout, (bilevel.top(layout) + 2) * bilevel.select_chunk_groups, bilevel) * slot
    tokens = plan.step_groups * (plan.visual_tokens + plan.time_cap)
    activations = tokens * (4 * c.mlp_width + 8 * c.width) * itemsize
    # One layer of the cache in float32 while it is pooled or gathered.
    layer = 2 * plan.slots * c.kv_heads * c.head_width * 4 if bilevel is not None else 0
    return MemoryNeed(plan.slots * slot, pooled, mixed, max(_WORKSPACE, activations + layer))


def available_bytes() -> int:
    """Free memory of the default device: what XLA may still take there, or free host memory."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(need: MemoryNeed, groups: int) -> None:
    """Raises UserError if `need` is more than is free; says how many frames would fit."""
    free = available_bytes()
    if need.total > free:
        per_group = (need.total - need.workspace) / groups
        frames = int(max(free - need.workspace, 0) / per_group) * FRAMES_PER_GROUP
        advice = f"about {frames} frames would fit (--max-frames {frames})" if frames else "not even 4 frames fit"
        raise UserError(
            f"{groups * FRAMES_PER_GROUP} frames need {need.total / 2**30:.2f} GiB beside the model "
            f"(KV cache {need.cache / 2**30:.2f}), {free / 2**30:.2f} GiB are free: {advice}"
        )


def used_bytes() -> int:
    """Memory in use now: on the device if it counts, else by this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_in_use" in stats:
        return stats["bytes_in_use"]
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """Most memory used so far: on the device if it counts, else by this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
