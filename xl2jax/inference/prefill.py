"""Prefill: the video goes through the LLM step by step, and only its KV cache stays.

A step is a few groups: their visual tokens, then their time tokens padded to a fixed count. What a token sees follows
from its ranges alone, so that steps need not be chunks: a step may hold several chunks, or a part of one. A segment is
`segment_steps` steps, which one `lax.scan` runs. Segments are fed one after the other, so that activations do not grow
with the video or its chunks. Shapes depend on buckets of lengths only, so another video of about the same length
compiles nothing.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.arithmetic import ceil_div, round_up
from xl2jax.inference.cache import KV, KVCache, source, write
from xl2jax.inference.layout import PrefillConfig, VideoLayout, bucket, token_ranges
from xl2jax.models.qwen2 import Qwen2
from xl2jax.ops.attention import Attention, arena_attention
from xl2jax.ops.ranges import Ranges

_PREFIX_UNIT, _TIME_UNIT, _SLOT_UNIT = 32, 4, 128


class Stretch(NamedTuple):
    """Text, and pictures among it, before or behind a video: int32 [T] each."""

    ids: Any
    """Token ids. Those at the places of visual tokens are not used."""
    visual: Any
    """Index into the visual tokens of all pictures; -1 for text."""

    @classmethod
    def of_text(cls, ids: Sequence[int]) -> Stretch:
        return cls(np.asarray(ids, np.int32), np.full(len(ids), -1, np.int32))


class Step(NamedTuple):
    """Tokens of one step: first `step_groups * V` visual tokens, then `step_groups * time_cap` time tokens.

    Padding sees nothing. Its keys and values are overwritten by the next step or lie behind the filled slots.
    """

    time_ids: jax.Array
    position: jax.Array
    ranges: Ranges
    global_slot: jax.Array
    visual_slot: jax.Array
    times: jax.Array
    visuals: jax.Array


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """The static sizes that compilation depends on, rounded up to buckets."""

    config: PrefillConfig
    visual_tokens: int
    prefix_cap: int
    time_cap: int
    """The most time tokens that a group may have."""
    step_groups: int
    segment_steps: int
    visual_start: int
    slots: int

    @property
    def segment_groups(self) -> int:
        return self.step_groups * self.segment_steps

    @property
    def group_capacity(self) -> int:
        """Gcap, the number of groups that the visual region has room for."""
        return (self.slots - self.visual_start) // self.visual_tokens


def default_steps(platform: str) -> tuple[int, int]:
    """(groups that go through the networks together, steps of a segment) on "cpu" or "gpu"."""
    return (4, 4) if platform == "cpu" else (32, 2)


def make_plan(
    layout: VideoLayout,
    config: PrefillConfig,
    platform: str,
    *,
    step_groups: int | None = None,
    segment_steps: int | None = None,
) -> PrefillPlan:
    """The plan of a video. Steps are `default_steps` unless given; short videos have smaller steps."""
    prefix_cap = bucket(layout.prefix, _PREFIX_UNIT)
    tail_cap = bucket(layout.tail, _PREFIX_UNIT) if layout.tail else 0
    if not layout.groups:
        start = round_up(prefix_cap, _SLOT_UNIT)
        return PrefillPlan(config, layout.visual_tokens, prefix_cap, 0, 1, 1, visual_start=start, slots=start)
    default_groups, default_count = default_steps(platform)
    step_groups = min(step_groups or default_groups, bucket(layout.groups))
    segment_steps = min(segment_steps or default_count, ceil_div(layout.groups, step_groups))
    segment = step_groups * segment_steps
    time_cap = round_up(max(layout.time_lengths), _TIME_UNIT)
    groups = bucket(layout.groups, segment)

    # A padded step needs room behind the last time token.
    visual_start = round_up(prefix_cap + (groups + step_groups) * time_cap + tail_cap, _SLOT_UNIT)
    return PrefillPlan(
        config=config,
        visual_tokens=layout.visual_tokens,
        prefix_cap=prefix_cap,
        time_cap=time_cap,
        step_groups=step_groups,
        segment_steps=segment_steps,
        visual_start=visual_start,
        slots=round_up(visual_start + groups * layout.visual_tokens, _SLOT_UNIT),
    )


def steps(layout: VideoLayout, plan: PrefillPlan, time_ids: list[list[int]], first: int = 0, shift: int = 0) -> Step:
    """All steps of a video as numpy arrays with a leading axis. Empty steps fill up the last segment.

    `first`: the group that the first step begins with. `shift` is added to all positions. `time_ids` are those of the
    groups from `first` on.
    """
    g_step, v, cap = plan.step_groups, plan.visual_tokens, plan.time_cap
    count = ceil_div(layout.groups - first, plan.segment_groups) * plan.segment_steps
    lengths = np.zeros(first + count * g_step, np.int64)
    lengths[: layout.groups] = layout.time_lengths
    valid = np.arange(first + count * g_step) < layout.groups
    groups = first + np.arange(count * g_step).reshape(count, g_step)

    # Visual tokens are [count, g_step * V]. Time tokens are [count, g_step * cap], with the real ones first.
    visual_group = np.repeat(groups, v, axis=1)
    visual_offset = np.tile(np.arange(v), (count, g_step))
    time_group = np.zeros((count, g_step * cap), np.int64)
    time_offset, time_valid, ids = (np.zeros_like(time_group) for _ in range(3))
    for i in range(count):
        real = [(g, o) for g in groups[i] for o in range(lengths[g])]
        for n, (g, o) in enumerate(real):
            time_group[i, n], time_offset[i, n], time_valid[i, n], ids[i, n] = g, o, 1, time_ids[g - first][o]
    group = np.concatenate([visual_group, time_group], axis=1)
    offset = np.concatenate([visual_offset, time_offset], axis=1)
    is_time = np.arange(group.shape[1]) >= g_step * v
    is_time = np.broadcast_to(is_time, group.shape)
    seen = np.concatenate([valid[visual_group], time_valid.astype(bool)], axis=1)
    tokens = token_ranges(layout.prefix, lengths, v, plan.visual_start, plan.config, group, offset, is_time)
    tokens = tokens._replace(position=tokens.position + shift)
    tokens = jax.tree.map(lambda x: np.where(seen, x, 0).astype(np.int32), tokens)
    before = layout.prefix + np.cumsum(lengths) - lengths
    columns: dict[str, Any] = {
        "time_ids": ids.astype(np.int32),
        "position": tokens.position,
        "ranges": tokens.ranges,
        "global_slot": before[groups[:, 0]].astype(np.int32),
        "visual_slot": (plan.visual_start + groups[:, 0] * v).astype(np.int32),
        "times": lengths[first:].reshape(count, g_step).sum(1).astype(np.int32),
        "visuals": (valid[first:].reshape(count, g_step).sum(1) * v).astype(np.int32),
    }
    return Step(**columns)


def segments(all_steps: Step, plan: PrefillPlan) -> Iterator[Step]:
    """The steps of each segment in turn."""
    for first in range(0, len(all_steps.times), plan.segment_steps):
        part = slice(first, first + plan.segment_steps)
        yield jax.tree.map(operator.itemgetter(part), all_steps)


def global_tokens_at_once(platform: str) -> int:
    """How many tokens of a stretch go through the LLM together on "cpu" or "gpu". A power of two."""
    return 512 if platform == "cpu" else 4096


def blocks(stretch: Stretch, platform: str) -> Iterator[tuple[Stretch, int]]:
    """The parts of a stretch that go through the LLM together, padded to one of few sizes, and their lengths.

    Together they are no longer than `bucket` of the whole stretch, for which the plan has room.
    """
    most = global_tokens_at_once(platform)
    for first in range(0, len(stretch.ids), most):
        part = Stretch(*(x[first : first + most] for x in stretch))
        length = len(part.ids)
        padding = bucket(length, _PREFIX_UNIT) - length
        yield Stretch(np.pad(part.ids, (0, padding)), np.pad(part.visual, (0, padding), constant_values=-1)), length


def prefill_globals(
    llm: Qwen2, cache: KVCache, block: Stretch, pictures: jax.Array | None, length: jax.Array, *, attention: Attention
) -> tuple[KVCache, jax.Array]:
    """Appends a block of a stretch to the cache, of which `length` tokens are real. They see everything before them.

    `pictures` [N, D] are the visual tokens that `block.visual` counts; None where the block holds none.
    Returns (cache, hidden states [T, D]).
    """
    at = jnp.arange(block.ids.shape[0], dtype=jnp.int32)
    start, visual_end = cache.global_length, cache.visual_start + cache.visual_length
    visual = (jnp.broadcast_to(x, at.shape) for x in (cache.visual_start, visual_end))
    ranges = Ranges(start + at + 1, *visual).only(at < length)

    def attend(kv: KV, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[KV, jax.Array]:
        kv = write(kv, layer, k, v, start)
        out, _ = arena_attention(q[None], source(kv, layer, ranges), attention=attention)
        return kv, out[0]

    x = llm.embed_tokens(block.ids)
    if pictures is not None:
        seen = jnp.take(pictures, jnp.maximum(block.visual, 0), axis=0)
        x = jnp.where((block.visual >= 0)[:, None], seen.astype(x.dtype), x)
    hidden, kv = llm.forward(x, cache.length + at, attend, (cache.k, cache.v))
    return cache._replace(k=kv[0], v=kv[1], global_length=start + jnp.int32(length)), hidden


def prefill_segment(
    llm: Qwen2, cache: KVCache, visual: jax.Array, segment: Step, *, attention: Attention
) -> tuple[KVCache, jax.Array]:
    """Scans over the steps of a segment.

    `visual` [segment_groups, V, D] -> the cache, and hidden states [steps, tokens of a step, D].
    """
    count = segment.time_ids.shape[0]
    visual = visual.reshape(count, -1, visual.shape[-1])
    visuals = visual.shape[1]

    def step(cache: KVCache, xs: tuple[jax.Array, Step]) -> tuple[KVCache, jax.Array]:
        embeddings, s = xs

        def skip(cache: KVCache) -> tuple[KVCache, jax.Array]:
            shape = (visuals + s.time_ids.shape[0], embeddings.shape[-1])
            return cache, jnp.zeros(shape, llm.dtype)

        # Steps that pad the last segment are skipped.
        return jax.lax.cond(s.visuals > 0, lambda c: run(c, xs), skip, cache)

    def run(cache: KVCache, xs: tuple[jax.Array, Step]) -> tuple[KVCache, jax.Array]:
        embeddings, s = xs

        def attend(kv: KV, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[KV, jax.Array]:
            kv = write(kv, layer, k[:visuals], v[:visuals], s.visual_slot)
            kv = write(kv, layer, k[visuals:], v[visuals:], s.global_slot)

            def part(a: int | None, b: int | None) -> jax.Array:
                # Visual and time tokens see very different slots. Separate calls keep the tiles' ranges narrow.
                seen = source(kv, layer, s.ranges.select(slice(a, b)))
                out, _ = arena_attention(q[None, a:b], seen, attention=attention)
                return out[0]

            return kv, jnp.concatenate([part(None, visuals), part(visuals, None)])

        x = jnp.concatenate([embeddings.astype(llm.dtype), llm.embed_tokens(s.time_ids)])
        hidden, (k, v) = llm.forward(x, s.position, attend, (cache.k, cache.v))
        cache = KVCache(k, v, cache.global_length + s.times, cache.visual_start, cache.visual_length + s.visuals)
        return cache, hidden

    return jax.lax.scan(step, cache, (visual, segment))
