"""The compiled programs that move, pool and gather the KV of a live video. All arrays are on one device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from xl2jax.config import LLMConfig
from xl2jax.inference.bilevel import PooledKV, pool_groups
from xl2jax.inference.cache import KVCache
from xl2jax.models.layers import rope_tables, rotate
from xl2jax.ops.kv import KVArray, QuantizedKV, exact_channels, quantize, unpack
from xl2jax.ops.precision import accumulator


@functools.partial(jax.jit, static_argnames="size")
def slots(kv: Any, start: jax.Array, *, size: int) -> Any:
    """`size` slots of keys and values [L, K, S, ...]."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=2), kv)


@functools.partial(jax.jit, static_argnames=("config", "rotated"), donate_argnames="cache")
def move_slots(
    config: LLMConfig,
    cache: KVCache,
    source: jax.Array,
    turn: jax.Array,
    counts: tuple[jax.Array, jax.Array],
    *,
    rotated: bool,
) -> KVCache:
    """Slot s becomes slot `source[s]`, whose key is rotated by `turn[s]` positions. One layer is copied at a time.

    `counts`: globals and visual tokens after it.
    """
    dtype = accumulator(cache.dtype)
    cos, sin = rope_tables(turn, config.head_width, config.rope_theta, dtype)

    def turned(x: KVArray) -> KVArray:  # [K, S, H]
        if not isinstance(x, QuantizedKV):
            return rotate(x, cos, sin)
        packed = quantize(rotate(unpack(x), cos, sin), exact_channels(x))
        still = turn == 0  # these keep their bits
        return jax.tree.map(lambda new, old: jnp.where(still.reshape(-1, *(1,) * (old.ndim - 2)), old, new), packed, x)

    def layer(i: jax.Array, kv: tuple[KVArray, KVArray]) -> tuple[KVArray, KVArray]:
        k, v = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)[:, source], kv)
        moved = (turned(k) if rotated else k, v)
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), kv, moved)

    k, v = jax.lax.fori_loop(0, config.layers, layer, (cache.k, cache.v))
    return KVCache(k, v, counts[0], cache.visual_start, counts[1])


@functools.partial(jax.jit, donate_argnames="pooled")
def shift_pooled(pooled: PooledKV, by: jax.Array) -> PooledKV:
    """Moves pooled tokens `by` slots to the start. One layer is copied at a time."""

    def layer(i: jax.Array, pooled: PooledKV) -> PooledKV:
        def move(a: jax.Array) -> jax.Array:
            x = jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
            x = x[:, jnp.minimum(jnp.arange(x.shape[1]) + by, x.shape[1] - 1)]
            return jax.lax.dynamic_update_index_in_dim(a, x, i, 0)

        return jax.tree.map(move, pooled)

    return jax.lax.fori_loop(0, jax.tree.leaves(pooled)[0].shape[0], layer, pooled)


@functools.partial(jax.jit, static_argnames=("config", "visual_tokens", "pool"), donate_argnames="pooled")
def pool_new(
    config: LLMConfig,
    cache: KVCache,
    pooled: PooledKV,
    finite: jax.Array,
    start: jax.Array,
    positions: jax.Array,
    first: jax.Array,
    *,
    visual_tokens: int,
    pool: int,
) -> tuple[PooledKV, jax.Array]:
    """Writes the pooled KV of the groups from slot `start` on to the places of groups from `first` on.

    Also returns whether all of it is finite, and what came before it was (`finite`).
    """
    new = pool_groups(cache, start, positions, visual_tokens=visual_tokens, pool=pool, theta=config.rope_theta)
    finite &= jnp.all(jnp.stack([jnp.isfinite(unpack(x)).all() for x in new]))
    at = first * jnp.int32(visual_tokens // pool)

    def put(old: KVArray, x: KVArray) -> KVArray:
        if isinstance(old, QuantizedKV):
            x = quantize(unpack(x), exact_channels(old))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, at, axis=2), old, x)

    return PooledKV(*(put(old, x) for old, x in zip(pooled, new, strict=True))), finite


@functools.partial(jax.jit, static_argnames=("start", "visual_tokens"))
def gather_groups(
    cache: KVCache, index: jax.Array, host: Any, on_host: jax.Array, *, start: int, visual_tokens: int
) -> KVCache:
    """The globals, and behind them the groups at places `index` [n] of the arena, or those of `host` where `on_host`."""
    slots = (start + index[:, None] * visual_tokens + jnp.arange(visual_tokens)).reshape(-1)
    from_host = jnp.repeat(on_host, visual_tokens)

    def pick(a: jax.Array, other: jax.Array | None) -> jax.Array:
        picked = a[:, :, slots]
        if other is not None:
            picked = jnp.where(from_host.reshape(-1, *(1,) * (a.ndim - 3)), other, picked)
        return jnp.concatenate([a[:, :, :start], picked], axis=2)

    arrays = (cache.k, cache.v)
    k, v = jax.tree.map(lambda a: pick(a, None), arrays) if host is None else jax.tree.map(pick, arrays, host)
    return cache._replace(k=k, v=v)
