"""How much a live video keeps, the arrays that it needs for that, and whether they fit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from xl2jax.arithmetic import round_up
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import NotEnoughMemory, UserError, require_number
from xl2jax.inference.bilevel import BilevelConfig, mixed_slots
from xl2jax.inference.layout import PrefillConfig, VideoLayout, bucket
from xl2jax.inference.live_arena import group_capacity, live_plan
from xl2jax.inference.live_ledger import Ledger
from xl2jax.inference.memory import available_bytes, memory_need, slot_bytes
from xl2jax.inference.network import Network
from xl2jax.inference.prefill import PrefillPlan, default_steps
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.prompt import PromptTokenizer, time_text
from xl2jax.video.frame_sampling import FrameSampling

MAX_SECONDS = 9_999_999.9
"""The longest time that a live video's times have room for, 115 days."""

UNKNOWN_FPS = 4.0
"""The rate at which minutes of `LiveMemory` are counted where all frames of a source are seen."""

LEAST_FPS = 0.001
"""The lowest rate at which a live video is seen. Times and minutes of one far below are no numbers."""


def check_rate(fps: float) -> None:
    """Raises UserError for a rate at which no live video is seen."""
    FrameSampling(fps=fps)
    if fps < LEAST_FPS:
        raise UserError(f"fps of a live video must be at least {LEAST_FPS:g}, not {fps:g}")


@dataclasses.dataclass(frozen=True)
class LiveMemory:
    """How much of a live video is kept, and where. Minutes are those of the video, at the rate of `fps`.

    Where `fps` is None, so that all frames are seen, a minute stands for 240 frames (`UNKNOWN_FPS`).

    dense_minutes: the newest part, whose KV is dense on the device.
    minutes: what is remembered at all. What is older than the dense part is pooled on the device.
    host_gib, disk_gib: budgets for the dense KV of the older part, which questions bring back. Host memory comes first,
      then files in `folder`, then it is dropped.
    pooled_dtype: int8 keeps the pooled KV in 8 bits.
    renumber: positions of the kept part begin anew where old parts leave; otherwise they count on for ever.
    """

    dense_minutes: float = 10.0
    minutes: float = 60.0
    host_gib: float = 2.0
    disk_gib: float = 0.0
    folder: Path | None = None
    pooled_dtype: Literal["int8"] | None = None
    renumber: bool = True

    def __post_init__(self) -> None:
        for name in ("dense_minutes", "minutes", "host_gib", "disk_gib"):
            value = getattr(self, name)
            require_number(name.replace("_", " "), value)
            low, high = (0.0, 2.0**20) if name.endswith("gib") else (1e-3, MAX_SECONDS / 60)
            if not low <= value <= high:
                raise UserError(f"{name.replace('_', ' ')} must be from {low:g} to {high:.6g}, not {value}")
        if self.minutes < self.dense_minutes:
            raise UserError(f"minutes ({self.minutes:g}) must not be below dense minutes ({self.dense_minutes:g})")
        if (self.disk_gib > 0) != (self.folder is not None):
            raise UserError("a disk budget and a folder for it go together")


@dataclasses.dataclass(frozen=True)
class LiveSizes:
    """The sizes of a live video's arrays.

    Attributes:
      ledger: the limits of the groups. `ledger.dense_limit` and `ledger.group_limit` are those of `memory`, raised where
        they were too small.
      plan: the sizes of the arena.
      kept: bytes that the arrays hold on the device all the time.
      needed: the same with what the longest question needs at least beside them.
      pieces: how many groups a question may score by their dense KV at a time, most first, and what is then needed.
      dense_minutes, minutes: what holds.
    """

    ledger: Ledger
    plan: PrefillPlan
    kept: int
    needed: int
    pieces: dict[int, int]
    dense_minutes: float
    minutes: float

    @classmethod
    def of(
        cls,
        network: Network,
        tokenizer: PromptTokenizer,
        prefix: int,
        *,
        fps: float | None,
        config: PrefillConfig,
        bilevel: BilevelConfig,
        cache: CacheConfig,
        memory: LiveMemory,
    ) -> LiveSizes:
        """`prefix`: tokens before the video."""
        step = default_steps(network.platform)[0]
        unit = math.lcm(config.chunk_groups, bilevel.select_chunk_groups)
        keep = (0 if config.window_chunks is None else config.window_chunks + 1) * config.chunk_groups
        rate = 60 * (fps or UNKNOWN_FPS) / FRAMES_PER_GROUP
        ledger = Ledger.of_limits(
            math.ceil(memory.dense_minutes * rate), math.ceil(memory.minutes * rate), unit, keep, step
        )
        time_cap = len(tokenizer.encode(time_text(MAX_SECONDS)))
        plan = live_plan(prefix, time_cap, network.config.visual_tokens, config, ledger, step)
        channels = network.exact_key_channels() if cache.quantized or memory.pooled_dtype else None
        key_channels = 0 if channels is None else channels.shape[-1]
        # The plan is that of all groups, so that what a question needs is that of the longest one.
        capacity = group_capacity(plan, ledger)
        layout = VideoLayout(plan.prefix_cap, (plan.time_cap,) * capacity, plan.visual_tokens)
        need = memory_need(
            network.config,
            plan,
            layout,
            bilevel,
            network.dtype,
            network.platform,
            quantized=cache.quantized,
            key_channels=key_channels,
        )
        slot = slot_bytes(network.config, network.dtype, quantized=cache.quantized, key_channels=key_channels)
        pooled_slot = slot_bytes(
            network.config, network.dtype, quantized=memory.pooled_dtype == "int8", key_channels=key_channels
        )
        kept = need.cache + pooled_slot * capacity * (plan.visual_tokens // bilevel.pool)
        # No more dense KV than this exists anywhere.
        stored = int((memory.host_gib + memory.disk_gib) * 2**30) // (plan.visual_tokens * slot)
        most_dense = round_up(ledger.dense_limit + stored, ledger.unit)
        pieces = {}
        for parts in (1, 2, 4, 8, 16):
            piece = min(ledger.piece(parts), most_dense)
            most = max((bilevel.top(layout) + 2) * bilevel.select_chunk_groups, piece)
            # It is gathered and then mixed with all others.
            question = mixed_slots(layout, most, bilevel) + plan.visual_start + bucket(most) * plan.visual_tokens
            pieces[piece] = kept + question * slot + need.workspace
        needed = min(pieces.values())
        return cls(ledger, plan, kept, needed, pieces, ledger.dense_limit / rate, ledger.group_limit / rate)

    def piece_groups(self, network: Network, memory: LiveMemory) -> int:
        """How many groups a question scores by their dense KV at a time: as many as half of the free memory allows.

        Raises NotEnoughMemory where the arrays and one question do not fit into the memory of the device.
        """
        self.check(network, memory)
        half = available_bytes(network.mesh) // 2
        return next((piece for piece, needed in self.pieces.items() if needed <= half), min(self.pieces))

    def check(self, network: Network, memory: LiveMemory) -> None:
        """Raises NotEnoughMemory where the arrays and one question do not fit into the memory of the device."""
        free = available_bytes(network.mesh)
        if self.needed > free:
            raise NotEnoughMemory(
                f"a live video with {memory.dense_minutes:g} minutes dense and {memory.minutes:g} remembered needs "
                f"{self.needed / 2**30:.2f} GiB beside the model, {free / 2**30:.2f} GiB are free: keep fewer minutes, or "
                "KV in 8 bits"
            )
