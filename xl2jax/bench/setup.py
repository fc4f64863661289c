"""A random model and a video of random embeddings: what the benchmarks run on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xl2jax.config import VideoXL2Config
from xl2jax.inference import compiled, prefill
from xl2jax.inference.bilevel import BilevelConfig, GroupTable, PooledKV, group_table, mixed_slots
from xl2jax.inference.cache import KVCache
from xl2jax.inference.generate import TokenSampling
from xl2jax.inference.layout import PrefillConfig, VideoLayout
from xl2jax.inference.prefill import Step
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.models.video_xl2 import VideoXL2

PREFIX, SUFFIX = 14, 20
TIMES = 9
"""Time tokens of a group: the mean of 2,048 frames a second apart is 9.4."""
DECODE_TOKENS = 32


def random_params(config: VideoXL2Config, dtype: str) -> nnx.State:
    """Random parameters, made on the device in one compiled call."""

    @jax.jit
    def init(key: jax.Array) -> nnx.State:
        return nnx.state(VideoXL2(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(key)))

    return init(jax.random.key(0))


def machine() -> str:
    """Device, processor and versions, for the head of a table."""
    device = jax.devices()[0]
    versions = ", ".join(f"{p} {version(p)}" for p in ("jax", "flax"))
    return f"{device.platform} {device.device_kind} x{jax.device_count()}, {platform.machine()}, {versions}"


class Setup:
    """Random parameters and a video of random embeddings."""

    def __init__(
        self, config: VideoXL2Config, params: nnx.State, groups: int, prefill_config: PrefillConfig,
        step_groups: int | None, attention: str,
    ):  # fmt: skip
        self.config, self.params, self.attention, self.groups = config, params, attention, groups
        self.dtype = dtype = str(jax.tree.leaves(params)[0].dtype)
        self.layout = VideoLayout(PREFIX, (TIMES,) * groups, self.config.visual_tokens)
        self.plan = prefill.make_plan(self.layout, prefill_config, step_groups=step_groups)
        rng = np.random.default_rng(0)
        vocab = self.config.llm.vocab
        self.time_ids = rng.integers(0, vocab, (groups, TIMES)).tolist()
        self.ids = np.zeros(32, np.int32)
        self.ids[:SUFFIX] = rng.integers(0, vocab, SUFFIX)
        self.segments = list(prefill.segments(prefill.steps(self.layout, self.plan, self.time_ids), self.plan))
        shape = (self.plan.segment_groups, self.config.visual_tokens, self.config.llm.width)
        self.visual = jax.random.normal(jax.random.key(1), shape, jnp.dtype(dtype)) * 0.02

    def prefill(self, segments: int | None = None) -> KVCache:
        """The whole video, or its first `segments` segments."""
        cache = self.start()
        for segment in self.segments[:segments]:
            cache = self.extend(cache, self.visual, segment)
        return cache

    def start(self) -> KVCache:
        """A cache that holds the prefix."""
        cache = compiled.new_cache(self.config.llm, self.plan.slots, self.dtype, self.plan.visual_start)
        ids, length = np.zeros(self.plan.prefix_cap, np.int32), np.int32(PREFIX)
        return compiled.prefill_prefix(self.config, self.params, cache, ids, length, implementation=self.attention)

    def extend(self, cache: KVCache, visual: jax.Array, segment: Step) -> KVCache:
        """`cache`, which is given up, with one more segment."""
        return compiled.prefill_segment(self.config, self.params, cache, visual, segment, implementation=self.attention)

    def pool(self, cache: KVCache, config: BilevelConfig) -> tuple[GroupTable, PooledKV]:
        capacity = (self.plan.slots - self.plan.visual_start) // self.plan.visual_tokens
        table = group_table(self.layout, capacity)
        llm, v = self.config.llm, self.plan.visual_tokens
        return table, compiled.pool_cache(llm, cache, table, visual_tokens=v, pool=config.pool)

    def bilevel(self, cache: KVCache, table: GroupTable, pooled: PooledKV, config: BilevelConfig) -> KVCache:
        """Scores every chunk for the question as infer.py does by default, picks the best and mixes."""
        llm, v, size = self.config.llm, self.plan.visual_tokens, config.select_chunk_groups
        groups, top = len(table.time_lengths), config.top(self.layout)

        group = compiled.slot_groups(table, cache, visual_tokens=v)
        scores = compiled.attention_scores(
            self.config, self.params, cache, group, compiled.new_cache(llm, 128, self.dtype), self.ids, np.int32(0),
            np.int32(SUFFIX // 2), np.int32(SUFFIX), scorer=AttentionScorer(), groups=groups,
            implementation=self.attention,
        )  # fmt: skip
        _, _, dense = compiled.choose(scores, table.groups, select_chunk_groups=size, top=top)
        slots = mixed_slots(self.layout, (top + 2) * size, config)
        return compiled.mix(llm, cache, pooled, table, dense, visual_tokens=v, pool=config.pool, slots=slots)[0]

    def first_token(self, context: KVCache) -> Any:
        """Suffix and first token: the state that decoding goes on from."""
        text = compiled.new_cache(self.config.llm, 256, self.dtype)
        return compiled.ask(
            self.config, self.params, context, text, self.ids, np.int32(SUFFIX), jax.random.key(0), NEVER,
            TokenSampling().traced(), implementation=self.attention,
        )  # fmt: skip

    def decode(self, context: KVCache, state: Any) -> Any:
        return compiled.decode(
            self.config, self.params, context, state, np.int32(DECODE_TOKENS), NEVER,
            TokenSampling().traced(), size=DECODE_TOKENS, implementation=self.attention,
        )  # fmt: skip


NEVER = np.array([-1], np.int32)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    out = jax.block_until_ready(run())
    return time.perf_counter() - started, out
