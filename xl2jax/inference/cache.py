"""The KV cache: one pytree, in arena order, carried through scans and updated in place."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.config import LLMConfig
from xl2jax.ops.attention import Attention, arena_attention
from xl2jax.ops.kv import (
    KVArray,
    QuantizedKV,
    Source,
    TurnedKeys,
    exact_channels,
    kv_dtype,
    kv_shape,
    quantize,
    quantized_zeros,
)
from xl2jax.ops.ranges import Ranges, first_slots


class KVCache(NamedTuple):
    """Rotated keys and values of all layers, and how much of them is filled.

    Slots `[0, global_length)` hold globals, `[visual_start, visual_start + visual_length)` visual
    tokens. Caches without visual tokens (text, bi-level) keep every slot equal to its position.
    """

    k: KVArray
    """[L, K, S, H]"""
    v: KVArray
    """[L, K, S, H]"""
    global_length: jax.Array
    visual_start: jax.Array
    visual_length: jax.Array

    @property
    def length(self) -> jax.Array:
        """The number of tokens in the cache, and the position of the next one."""
        return self.global_length + self.visual_length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """L, K, S, H."""
        layers, kv_heads, slots, h = kv_shape(self.k)
        return layers, kv_heads, slots, h

    @property
    def dtype(self) -> np.dtype:
        """The dtype of keys and values once they are unpacked."""
        return kv_dtype(self.k)

    @property
    def slots(self) -> int:
        return self.shape[2]


type KV = tuple[KVArray, KVArray]

type RowArray = KVArray | tuple[KVArray | TurnedKeys, ...]
"""Keys or values of the caches of B answers: `[L * B, K, S, H]`, or `[B, K, S, H]` for each layer.

GPU kernels read their rows of the first form in place. XLA on CPUs would copy them out of it for every product. Keys that
are copied there anyway are turned.
"""


class RowCache(NamedTuple):
    """The caches of B answers, with lengths int32 [B] that mean what those of `KVCache` do."""

    k: RowArray
    v: RowArray
    global_length: jax.Array
    visual_start: jax.Array
    visual_length: jax.Array

    @property
    def length(self) -> jax.Array:
        """The position of each answer's next token."""
        return self.global_length + self.visual_length


def empty_cache(
    config: LLMConfig,
    slots: int,
    dtype: jax.typing.DTypeLike,
    visual_start: int | None = None,
    *,
    quantized: bool = False,
    key_channels: jax.Array | np.ndarray | None = None,
) -> KVCache:
    """A cache of zeros. The visual region starts at `visual_start`, by default behind the last slot.

    `quantized` stores 8 bits, which are unpacked to `dtype`. Of its keys, `key_channels` (int32 [L, K, C], ascending)
    keep `dtype`.
    """
    shape = (config.layers, config.kv_heads, slots, config.head_width)
    zero = jnp.int32(0)
    start = jnp.int32(slots if visual_start is None else visual_start)

    def zeros(channels: jax.Array | np.ndarray | None = None) -> KVArray:
        return quantized_zeros(shape, dtype, channels) if quantized else jnp.zeros(shape, dtype)

    return KVCache(zeros(key_channels), zeros(), zero, start, zero)


def write(cache: KV, layer: jax.Array, k: jax.Array, v: jax.Array, slot: jax.Array) -> KV:
    """Writes k, v [T, K, H] into one layer, from slot `slot` on. The slots must exist."""

    zero = jnp.int32(0)  # indices must have one dtype, and with 64-bit JAX a Python integer is int64
    place = (layer, zero, slot, zero)

    def put(old: KVArray, new: jax.Array) -> KVArray:
        new = new.transpose(1, 0, 2)[None]
        if isinstance(old, QuantizedKV):
            channels = exact_channels(jax.tree.map(lambda a: a[layer, :, :1][None], old))
            packed = quantize(new.astype(old.scale.dtype), channels)
            return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, place[: a.ndim]), old, packed)
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), place)

    return put(cache[0], k), put(cache[1], v)


def source(cache: KV, layer: jax.Array, ranges: Ranges) -> Source:
    """One layer of a cache for `arena_attention`, which reads it in place. `ranges` [T] become those of one batch row."""
    return Source(*cache, layer[None], ranges.batched())


def row_source(k: RowArray, v: RowArray, layer: jax.Array, ranges: Ranges) -> Source:
    """One layer of the caches of B answers, of which each has one token. `ranges` [B] become those of B batch rows."""
    own = Ranges(*(x[:, None] for x in ranges))
    if isinstance(k, tuple) and not isinstance(k, QuantizedKV):
        return Source(k[layer], v[layer], None, own)  # type: ignore[arg-type]
    return Source(k, v, _rows(layer, own.g_end.shape[0]), own)  # type: ignore[arg-type]


def _rows(layer: jax.Array, count: int) -> jax.Array:
    return layer * jnp.int32(count) + jnp.arange(count, dtype=jnp.int32)


def write_row_tokens(x: RowArray, layer: jax.Array, new: jax.Array, slots: jax.Array) -> RowArray:
    """Writes one token of each of B answers, new [B, K, H], into one layer of their caches, each to its own slot."""
    count, zero = new.shape[0], jnp.int32(0)
    if isinstance(x, tuple):
        old = x[layer]
        turned = isinstance(old, TurnedKeys)
        written = old.values if isinstance(old, TurnedKeys) else old
        assert isinstance(written, jax.Array)
        for row in range(count):
            token = new[row, None, :, :, None] if turned else new[row, None, :, None]
            at = (jnp.int32(row), zero, *((zero, slots[row]) if turned else (slots[row], zero)))
            written = jax.lax.dynamic_update_slice(written, token.astype(written.dtype), at)
        # Otherwise XLA writes twice, for the product and for the next token, to copies of the cache.
        written = jax.lax.optimization_barrier(written)
        changed = TurnedKeys(written) if turned else written
        return tuple(changed if i == layer else each for i, each in enumerate(x))  # type: ignore[misc]
    if count == 1:
        return jax.lax.dynamic_update_slice(x, new[:, :, None].astype(x.dtype), (layer, zero, slots[0], zero))
    return x.at[_rows(layer, count), :, slots].set(new.astype(x.dtype), unique_indices=True)


def attend_text(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: KVCache,
    text: KV,
    text_length: jax.Array,
    count: jax.Array,
    layer: jax.Array,
    attention: Attention,
) -> tuple[KV, jax.Array, jax.Array]:
    """Attention of `count` tokens behind the video. They see `context`, the text before them, and each other causally.

    q [T, N, H], k and v [T, K, H] rotated; tokens behind `count` are padding, which sees nothing and so costs little.
    `text` is the (k, v) of a cache holding `text_length` tokens.
    Returns (text with the new tokens written, out [T, N, H], lse [T, N]).
    """
    text = write(text, layer, k, v, text_length)
    at = jnp.arange(q.shape[0], dtype=jnp.int32)
    visual_end = context.visual_start + context.visual_length
    whole = Ranges(*(jnp.broadcast_to(x, at.shape) for x in (context.global_length, context.visual_start, visual_end)))
    video = source((context.k, context.v), layer, whole.only(at < count))
    written = source(text, layer, first_slots(text_length + at + 1).only(at < count))
    out, lse = arena_attention(q[None], video, written, attention=attention)
    return text, out[0], lse[0]
