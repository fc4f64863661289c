"""Bi-level KV: selection blocks that matter to a question keep their dense KV, and all others get pooled KV.

A selection block is `select_chunk_groups` consecutive groups. Blocks are numbered 1..B, and block 0 is the prefix.
Blocks 0, 1 and B and the selected blocks are dense. In every other block the time tokens stay whole, and the visual
keys and values of each group are averaged over `pool` consecutive tokens (a remainder is dropped). Keys are averaged
un-rotated, and the mixed cache gets new positions 0..M-1, so that its keys are rotated anew. Upstream stores keys
before rotation. Here they are stored after rotation, as prefill and dense decoding read them, and this module undoes
the rotation first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.arithmetic import ceil_div
from xl2jax.errors import require_whole
from xl2jax.inference.cache import KVCache
from xl2jax.inference.layout import VideoLayout, bucket
from xl2jax.models.layers import rope_tables, rotate
from xl2jax.ops.kv import KVArray, QuantizedKV, exact_channels, kv_dtype, quantize, unpack
from xl2jax.ops.precision import accumulator

UNIT_GROUPS = 2
"""Groups of one selectable unit in upstream's selection files."""


@dataclasses.dataclass(frozen=True)
class BilevelConfig:
    """How the video is read at decode time."""

    select_chunk_groups: int = 4
    pool: int = 4
    top_chunks: int | None = None
    """How many blocks relevance chooses. None chooses 2, or all blocks of a video that has fewer."""

    def __post_init__(self) -> None:
        require_whole("select chunk groups", self.select_chunk_groups, 1)
        require_whole("pool", self.pool, 1)
        if self.top_chunks is not None:
            require_whole("top chunks", self.top_chunks, 0)

    def blocks(self, layout: VideoLayout) -> int:
        """B, the number of selection blocks of a video."""
        return ceil_div(layout.groups, self.select_chunk_groups)

    def top(self, layout: VideoLayout) -> int:
        return min(2, self.blocks(layout)) if self.top_chunks is None else self.top_chunks


class GroupTable(NamedTuple):
    """The lengths of a video on the device: `time_lengths` [Gcap], of which the first `groups` are real."""

    prefix: jax.Array
    time_lengths: jax.Array
    groups: jax.Array
    tail: jax.Array
    time_position: jax.Array
    """Position to which the key of each group's first time token is rotated [Gcap]."""
    visual_position: jax.Array
    """That of its first visual token [Gcap]."""


def group_table(layout: VideoLayout, capacity: int) -> GroupTable:
    times = np.zeros(capacity, np.int32)
    times[: layout.groups] = layout.time_lengths
    ends = layout.prefix + np.cumsum(times, dtype=np.int32)
    visual = ends + np.arange(capacity, dtype=np.int32) * layout.visual_tokens
    return table_of(layout, times, visual - times, visual)


def table_of(layout: VideoLayout, lengths: np.ndarray, times: np.ndarray, visuals: np.ndarray) -> GroupTable:
    """The table of groups whose time tokens and visual tokens begin at positions `times` and `visuals` [Gcap]."""
    rows = (jnp.asarray(x, jnp.int32) for x in (lengths, times, visuals))
    lengths_of, time_position, visual_position = rows
    groups, tail = jnp.int32(layout.groups), jnp.int32(layout.tail)
    return GroupTable(jnp.int32(layout.prefix), lengths_of, groups, tail, time_position, visual_position)


def slot_groups(table: GroupTable, cache: KVCache, visual_tokens: int) -> jax.Array:
    """The group of each slot of a video's dense cache, int32 [S]; -1 for slots that belong to no group."""
    slot = jnp.arange(cache.slots, dtype=jnp.int32)
    ends = table.prefix + jnp.cumsum(table.time_lengths, dtype=jnp.int32)
    time = jnp.searchsorted(ends, slot, side="right").astype(jnp.int32)
    group = jnp.where(slot < cache.visual_start, time, (slot - cache.visual_start) // visual_tokens)
    return jnp.where((slot >= table.prefix) & (group < table.groups), group, -1)


class PooledKV(NamedTuple):
    """Averaged visual keys (un-rotated) and values of every group, [L, K, Gcap * (V // pool), H]."""

    k: KVArray
    v: KVArray


def blocks_of_units(units: Iterable[int], groups: int, select_chunk_groups: int) -> np.ndarray:
    """Dense blocks of upstream's selected units: boolean [B], entry b for block b + 1.

    Unit u is groups 2u and 2u + 1; its block is u // (select_chunk_groups / 2) + 1. Without any unit every block is
    dense, as upstream has it.
    """
    blocks = ceil_div(groups, select_chunk_groups)
    dense = np.zeros(blocks, bool)
    dense[[0, -1]] = True
    units = list(units)
    for unit in units:
        block = UNIT_GROUPS * unit // select_chunk_groups
        if block < blocks:
            dense[block] = True
    return dense if units else np.ones(blocks, bool)


def choose_blocks(scores: jax.Array, blocks: jax.Array, top: int) -> jax.Array:
    """Boolean [Bcap]: blocks 1 and B (of `blocks`), and the `top` best-scored of the others."""
    index = jnp.arange(scores.shape[0])
    fixed = (index == 0) | (index == blocks - 1)
    candidate = ~fixed & (index < blocks)
    _, best = jax.lax.top_k(jnp.where(candidate, scores, -jnp.inf), min(top, scores.shape[0]))
    return fixed | (jnp.zeros_like(fixed).at[best].set(True) & candidate)


def pool_cache(cache: KVCache, table: GroupTable, *, visual_tokens: int, pool: int, theta: float) -> PooledKV:
    """Pools every group of the video, one layer at a time."""
    return pool_groups(
        cache, cache.visual_start, table.visual_position, visual_tokens=visual_tokens, pool=pool, theta=theta
    )


def pool_groups(
    cache: KVCache, start: jax.Array, position: jax.Array, *, visual_tokens: int, pool: int, theta: float
) -> PooledKV:
    """Pools G groups that lie one behind the other from slot `start` on, one layer at a time.

    `position` [G] is that to which the key of each group's first visual token is rotated.
    """
    groups, v = position.shape[0], visual_tokens
    _, kv_heads, _, h = cache.shape
    kept = v // pool
    positions = position[:, None] + jnp.arange(v, dtype=jnp.int32)
    dtype = accumulator(cache.dtype)
    cos, sin = rope_tables(positions.reshape(-1), h, theta, dtype)

    def windows(x: jax.Array) -> jax.Array:  # [K, G * V, H] -> [K, G * kept, H]
        x = x.reshape(kv_heads, groups, v, h)[:, :, : kept * pool]
        return x.reshape(kv_heads, groups * kept, pool, h).mean(2)

    def visual(x: KVArray) -> jax.Array:
        return unpack(jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, groups * v, axis=1), x))

    def layer(kv: tuple[KVArray, KVArray]) -> tuple[jax.Array, jax.Array]:
        k, values = map(visual, kv)
        pooled_k = windows(rotate(k.astype(dtype), cos, -sin))
        return pooled_k.astype(k.dtype), windows(values.astype(dtype)).astype(values.dtype)

    return PooledKV(*jax.lax.map(layer, (cache.k, cache.v)))


def mixed_slots(layout: VideoLayout, dense_groups: int, config: BilevelConfig) -> int:
    """Capacity of a mixed cache with at most `dense_groups` dense groups, bucketed."""
    dense = min(dense_groups, layout.groups)
    visual = dense * layout.visual_tokens + (layout.groups - dense) * (layout.visual_tokens // config.pool)
    return bucket(layout.global_tokens + visual, 128)


class MixedSource(NamedTuple):
    """The source of each slot [M] of a mixed cache."""

    valid: jax.Array
    group: jax.Array
    """Group of the slot, -1 in the prefix and in the tail."""
    pooled: jax.Array
    """Whether the slot is a pooled token."""
    slot: jax.Array
    """Slot in the video cache, or index in the pooled arrays."""
    position: jax.Array
    """Position that the source key is rotated to (0 for pooled keys)."""
    length: jax.Array
    """M, slots filled."""


def mixed_source(
    table: GroupTable,
    dense: jax.Array,
    visual_start: jax.Array,
    *,
    visual_tokens: int,
    pool: int,
    slots: int,
    compact: bool = False,
) -> MixedSource:
    """The source of each slot of a mixed cache in natural order, whose groups `dense` [Gcap] are whole.

    `compact`: the video cache holds the visual tokens of the dense groups only, one group behind the other.
    """
    v, kept = visual_tokens, visual_tokens // pool
    groups = table.time_lengths.shape[0]
    exists = jnp.arange(groups) < table.groups
    times = table.time_lengths
    times_before = jnp.cumsum(times, dtype=jnp.int32) - times
    lengths = jnp.where(exists, times + jnp.where(dense, v, kept), 0)
    starts = table.prefix + jnp.cumsum(lengths, dtype=jnp.int32) - lengths
    slot = jnp.arange(slots, dtype=jnp.int32)
    group = jnp.searchsorted(starts, slot, side="right").astype(jnp.int32) - 1
    in_prefix = slot < table.prefix
    # Groups of length 0 (padding) share the start of their successor; the last real group is wanted.
    group = jnp.clip(jnp.minimum(group, table.groups - 1), 0)
    offset = slot - starts[group]
    is_time = offset < times[group]
    visual = offset - times[group]
    is_pooled = ~in_prefix & ~is_time & ~dense[group]
    first = table.prefix + times_before[group]
    place = jnp.cumsum(dense, dtype=jnp.int32)[group] - 1 if compact else group
    source = jnp.where(is_time, first + offset, visual_start + place * v + visual)
    source = jnp.where(is_pooled, group * kept + visual, source)
    position = jnp.where(is_time, table.time_position[group] + offset, table.visual_position[group] + visual)
    video_end = table.prefix + lengths.sum(dtype=jnp.int32)
    in_tail = slot >= video_end
    behind_times = table.prefix + times.sum(dtype=jnp.int32) + slot - video_end
    source = jnp.where(in_tail, behind_times, source)
    position = jnp.where(in_tail, behind_times + table.groups * v, jnp.where(is_pooled, 0, position))
    length = video_end + table.tail
    return MixedSource(
        valid=slot < length,
        group=jnp.where(in_prefix | in_tail, -1, group),
        pooled=is_pooled & ~in_tail,
        slot=jnp.where(in_prefix, slot, source),
        position=jnp.where(in_prefix, slot, position),
        length=length,
    )


def mix(cache: KVCache, pooled: PooledKV, source: MixedSource, *, theta: float) -> KVCache:
    """Gathers a mixed cache. Each slot is its position, to which the key is rotated. The video cache stays as it is.

    The mixed cache has 8 bits where the video cache has.
    """
    h = cache.shape[3]
    slots = source.slot.shape[0]
    kept_dtype = kv_dtype(pooled.k)
    dtype = accumulator(kept_dtype)
    old_cos, old_sin = rope_tables(source.position, h, theta, dtype)
    new_cos, new_sin = rope_tables(jnp.arange(slots), h, theta, dtype)
    whole = jnp.where(source.valid & ~source.pooled, source.slot, 0)
    part = jnp.where(source.valid & source.pooled, source.slot, 0)

    quantized = isinstance(cache.k, QuantizedKV)

    def layer(xs: tuple[KVArray, KVArray, KVArray, KVArray]) -> tuple[KVArray, KVArray]:
        k, v, pooled_k, pooled_v = xs

        def pick(dense: KVArray, reduced: KVArray) -> jax.Array:
            dense = unpack(jax.tree.map(lambda a: a[:, whole], dense))
            reduced = unpack(jax.tree.map(lambda a: a[:, part], reduced))
            picked = jnp.where(source.pooled[:, None], reduced, dense)
            return jnp.where(source.valid[:, None], picked, 0)

        keys = rotate(pick(k, pooled_k).astype(dtype), old_cos, -old_sin)
        keys, values = rotate(keys, new_cos, new_sin).astype(kept_dtype), pick(v, pooled_v)
        return (quantize(keys, exact_channels(k)), quantize(values)) if quantized else (keys, values)

    k, v = jax.lax.map(layer, (cache.k, cache.v, *pooled))
    return KVCache(k, v, source.length, jnp.int32(slots), jnp.int32(0))
