"""The KV cache: one pytree, in arena order, carried through scans and updated in place."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xl2jax.config import LLMConfig
from xl2jax.ops.arena import arena_attention, merge


class KVCache(NamedTuple):
    """Rotated keys and values of all layers, and how much of them is filled.

    Slots `[0, global_length)` hold globals, `[visual_start, visual_start + visual_length)` visual
    tokens. Caches without visual tokens (text, bi-level) keep every slot equal to its position.
    """

    k: jax.Array
    """[L, K, S, H]"""
    v: jax.Array
    """[L, K, S, H]"""
    global_length: jax.Array
    visual_start: jax.Array
    visual_length: jax.Array

    @property
    def length(self) -> jax.Array:
        """Tokens cached; the position of the next one."""
        return self.global_length + self.visual_length

    @property
    def slots(self) -> int:
        return self.k.shape[2]


def empty_cache(config: LLMConfig, slots: int, dtype: jax.typing.DTypeLike, visual_start: int | None = None) -> KVCache:
    """Zeros. The visual region starts at `visual_start`, by default behind the last slot."""
    shape = (config.layers, config.kv_heads, slots, config.head_width)
    zero = jnp.int32(0)
    start = jnp.int32(slots if visual_start is None else visual_start)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zero, start, zero)


def write(
    cache: tuple[jax.Array, jax.Array], layer: jax.Array, k: jax.Array, v: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts k, v [T, K, H] into slots `slot ...` of one layer. The slots must exist."""
    at = (layer, 0, slot, 0)
    keys, values = (
        jax.lax.dynamic_update_slice(old, new.transpose(1, 0, 2)[None].astype(old.dtype), at)
        for old, new in zip(cache, (k, v), strict=True)
    )
    return keys, values


def attend_all(q: jax.Array, cache: KVCache, layer: jax.Array, implementation: str) -> tuple[jax.Array, jax.Array]:
    """q [T, N, H] over everything in the cache: (out [T, N, H], lse [T, N])."""

    def per_query(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (1, q.shape[0]))

    out, lse = arena_attention(
        q[None], cache.k, cache.v, layer[None],
        per_query(cache.global_length), per_query(cache.visual_start),
        per_query(cache.visual_start + cache.visual_length),
        implementation=implementation,
    )  # fmt: skip
    return out[0], lse[0]


def attend_text(
    q: jax.Array, k: jax.Array, v: jax.Array, context: KVCache, text: tuple[jax.Array, jax.Array],
    text_length: jax.Array, layer: jax.Array, implementation: str,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:  # fmt: skip
    """Tokens behind the video: they see all of `context`, the text before them, and each other causally.

    q [T, N, H], k and v [T, K, H] rotated; `text` is the (k, v) of a cache holding `text_length` tokens.
    Returns (text with the new tokens written, out [T, N, H], lse [T, N]).
    """
    text = write(text, layer, k, v, text_length)
    ends = text_length + jnp.arange(1, q.shape[0] + 1, dtype=jnp.int32)
    nothing = jnp.zeros_like(ends)
    own, own_lse = arena_attention(
        q[None], *text, layer[None], ends[None], nothing[None], nothing[None], implementation=implementation
    )
    out, lse = merge([attend_all(q, context, layer, implementation), (own[0], own_lse[0])])
    return text, out, lse
