"""Arena attention in XLA: online softmax over the key blocks that a tile of queries sees, and its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xl2jax.arithmetic import ceil_div, round_up
from xl2jax.ops.kv import Source, TurnedKeys, unpack
from xl2jax.ops.precision import accumulator, product
from xl2jax.ops.ranges import NEGATIVE, Ranges


def _tile_sizes(queries: int, slots: int) -> tuple[int, int]:
    """(queries of a tile, slots of a key block). Tiles are equal, of at most 640 queries; a released chunk has 576."""
    tile = ceil_div(queries, ceil_div(queries, 640))
    return tile, min(slots, 512 if tile >= 64 else 2048)


def attend_blockwise(q: jax.Array, source: Source) -> tuple[jax.Array, jax.Array]:
    """The op in XLA. It reads the key blocks that some query of a tile sees, and never makes a [T, S] array."""
    b, t, n, h = q.shape
    if source.rows is None:
        if t == 1:
            return _attend_rows(q, source)
        source = source._replace(rows=jnp.arange(b, dtype=jnp.int32))
    tile, block = _tile_sizes(t, source.shape[2])
    tiles = ceil_div(t, tile)

    def attend(xs: tuple[jax.Array, jax.Array, Ranges]) -> tuple[jax.Array, jax.Array]:
        return _attend_tile(*xs, source, block)

    q_tiles, range_tiles = jax.tree.map(lambda x: _to_tiles(x, tile), (q, source.ranges))
    xs = (q_tiles, jnp.repeat(source.rows, tiles), range_tiles)
    if b * tiles == 1:
        out, lse = (y[None] for y in attend(jax.tree.map(lambda x: x[0], xs)))
    else:
        out, lse = jax.lax.map(attend, xs)
    return out.reshape(b, tiles * tile, n, h)[:, :t], lse.reshape(b, tiles * tile, n)[:, :t]


def _attend_rows(q: jax.Array, source: Source) -> tuple[jax.Array, jax.Array]:
    """A token for each row of keys and values, which are read whole: XLA on CPUs copies the blocks that a product reads."""
    b, _, n, h = q.shape
    _, kv_heads, slots, _ = source.shape
    queries, v = q.reshape(b, kv_heads, -1, h), unpack(source.v)
    if isinstance(source.k, TurnedKeys):
        scores = product("bkgh,bkhs->bkgs", queries, source.k.values) * h**-0.5
    else:
        scores = product("bkgh,bksh->bkgs", queries, unpack(source.k)) * h**-0.5
    scores = jnp.where(source.ranges.mask(jnp.arange(slots, dtype=jnp.int32))[:, None], scores, NEGATIVE)
    top = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp(scores - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    out = product("bkgs,bksh->bkgh", p.astype(v.dtype), v) / total
    seen = top > NEGATIVE / 2
    out, lse = jnp.where(seen, out, 0.0), jnp.where(seen, top + jnp.log(total), NEGATIVE)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(b, 1, n)


def _to_tiles(x: jax.Array, tile: int) -> jax.Array:
    """[B, T, ...] -> [B * tiles, tile, ...], with T padded to whole tiles."""
    padding = round_up(x.shape[1], tile) - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(-1, tile, *x.shape[2:])


def live_blocks(ranges: Ranges, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The key blocks that some query of a tile sees: `[0, a)` and `[b, c)` with b >= a."""
    g_end, v_lo, v_hi = ranges
    seen = v_hi > v_lo
    a = (jnp.max(g_end) + block - 1) // block
    first = jnp.min(jnp.where(seen, v_lo, jnp.iinfo(jnp.int32).max)) // block
    c = jnp.max(jnp.where(seen, v_hi + block - 1, 0)) // block
    b = jnp.maximum(first, a)
    return a, b, jnp.maximum(c, b)


class _Block(NamedTuple):
    """Keys and values [K, block, H] of one key block, and what a tile's queries see of it [T, block]."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    read_at: jax.Array


def _live_blocks_of_tile(
    source: Source, row: jax.Array, ranges: Ranges, block: int
) -> tuple[jax.Array, Callable[[jax.Array], _Block]]:
    """How many key blocks some query of the tile sees, and a function that reads the i-th of them."""
    _, kv_heads, slots, _ = source.shape
    g_blocks, v_first, v_last = live_blocks(ranges, block)
    zero = jnp.int32(0)

    def read(i: jax.Array) -> _Block:
        start = jnp.where(i < g_blocks, i, i - g_blocks + v_first) * block
        # The last block may reach past the end: it is read further left, and slots of earlier blocks are masked.
        read_at = jnp.minimum(start, slots - block)

        def slots_of(x: jax.Array) -> jax.Array:  # [R, K, S, ...] -> [K, block, ...]
            rest = x.shape[3:]
            at = (row, zero, read_at, *(zero for _ in rest))
            return jax.lax.dynamic_slice(x, at, (1, kv_heads, block, *rest))[0]

        kb, vb = (unpack(jax.tree.map(slots_of, x)) for x in (source.k, source.v))
        columns = read_at + jnp.arange(block, dtype=jnp.int32)
        mask = ranges.mask(columns) & (columns >= start)
        return _Block(kb, jnp.where(jnp.any(mask, axis=0)[:, None], vb, 0), mask, read_at)

    return g_blocks + v_last - v_first, read


def _fold(x: jax.Array, kv_heads: int) -> jax.Array:
    """[T, N, ...] -> [K, T * groups, ...]: the query heads of a KV head become rows."""
    t, n, *rest = x.shape
    return jnp.moveaxis(x.reshape(t, kv_heads, n // kv_heads, *rest), 1, 0).reshape(kv_heads, -1, *rest)


def _unfold(x: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_fold`."""
    kv_heads, _, *rest = x.shape
    return jnp.moveaxis(x.reshape(kv_heads, tokens, -1, *rest), 0, 1).reshape(tokens, -1, *rest)


def _scores(q: jax.Array, block: _Block) -> jax.Array:
    """Scaled, masked scores [K, T, groups, block] of folded queries [K, T * groups, H]."""
    scores = product("kqh,ksh->kqs", q, block.k) * q.shape[-1] ** -0.5
    t, width = block.mask.shape
    return jnp.where(block.mask[:, None], scores.reshape(q.shape[0], t, -1, width), NEGATIVE)


def _attend_tile(
    q: jax.Array, row: jax.Array, ranges: Ranges, source: Source, block: int
) -> tuple[jax.Array, jax.Array]:
    """q [T, N, H] against row `row` of k and v: (out [T, N, H], lse [T, N])."""
    t, n, h = q.shape
    kv_heads = source.shape[1]
    queries, dtype = _fold(q, kv_heads), accumulator(q.dtype)
    count, read = _live_blocks_of_tile(source, row, ranges, block)

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, top, total = carry
        keys = read(i)
        scores = _scores(queries, keys)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # A masked score is NEGATIVE: its exponential is 0 once the row has seen a slot. Until then new_top is
        # NEGATIVE too, and the first real score multiplies the sums so far by 0.
        p = jnp.exp(scores - new_top[..., None])
        decay = jnp.exp(top - new_top)
        total = total * decay + jnp.sum(p, axis=-1)
        p = p.reshape(kv_heads, -1, block).astype(keys.v.dtype)
        update = product("kqs,ksh->kqh", p, keys.v)
        return acc * decay[..., None] + update.reshape(acc.shape), new_top, total

    shape = (kv_heads, t, n // kv_heads)
    init = (jnp.zeros((*shape, h), dtype), jnp.full(shape, NEGATIVE, dtype), jnp.zeros(shape, dtype))
    acc, top, total = jax.lax.fori_loop(jnp.int32(0), count, body, init)
    seen = ~(top <= NEGATIVE / 2)  # also where it is NaN
    total = jnp.where(seen, total, 1.0)
    out = jnp.where(seen[..., None], acc / total[..., None], 0.0)
    lse = jnp.where(seen, top + jnp.log(total), NEGATIVE)
    return _unfold(out.reshape(kv_heads, -1, h), t).astype(q.dtype), _unfold(lse.reshape(kv_heads, -1), t)


def backward_blockwise(
    residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, blockwise in float32 (float64), which q's keeps. The scores are recomputed with lse.

    residuals: q, a source that is not quantised, and out and lse, which may be those of several sources.
    """
    q, source, out, lse = residuals
    k, v, rows, ranges = source
    b, t, n, h = q.shape
    kv_heads = k.shape[1]
    dtype = accumulator(q.dtype)
    d_out, d_lse = (x.astype(dtype) for x in cotangents)
    # This part of a score's gradient is the same for all slots.
    shared = d_lse - jnp.sum(d_out * out.astype(dtype), axis=-1)
    tile, block = _tile_sizes(t, k.shape[2])
    tiles = ceil_div(t, tile)

    def tile_gradients(
        grads: tuple[jax.Array, jax.Array], xs: tuple[Any, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        row, ranges, *folding = xs
        queries, d_outs, norm, part = (_fold(x, kv_heads) for x in folding)
        count, read = _live_blocks_of_tile(source, row, ranges, block)

        def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = carry
            keys = read(i)
            scores = _scores(queries, keys)
            seen = scores > NEGATIVE / 2
            p = jnp.exp(jnp.where(seen, scores - norm.reshape(scores.shape[:3])[..., None], NEGATIVE))
            p = p.reshape(kv_heads, -1, block)
            d_p = jnp.einsum("kqh,ksh->kqs", d_outs, keys.v.astype(dtype))
            d_scores = p * (d_p + part[..., None]) * h**-0.5
            at = (row, jnp.int32(0), keys.read_at, jnp.int32(0))

            def add(total: jax.Array, update: jax.Array) -> jax.Array:
                old = jax.lax.dynamic_slice(total, at, (1, *update.shape))
                return jax.lax.dynamic_update_slice(total, old + update[None], at)

            d_q = d_q + jnp.einsum("kqs,ksh->kqh", d_scores, keys.k.astype(dtype))
            d_k = add(d_k, jnp.einsum("kqs,kqh->ksh", d_scores, queries.astype(dtype)))
            d_v = add(d_v, jnp.einsum("kqs,kqh->ksh", p, d_outs))
            return d_q, d_k, d_v

        d_q, d_k, d_v = jax.lax.fori_loop(jnp.int32(0), count, body, (jnp.zeros(queries.shape, dtype), *grads))
        return (d_k, d_v), _unfold(d_q, tile)

    per_tile = (jnp.repeat(rows, tiles), *jax.tree.map(lambda x: _to_tiles(x, tile), (ranges, q, d_out, lse, shared)))
    (d_k, d_v), d_q = jax.lax.scan(tile_gradients, (jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)), per_tile)
    d_q = d_q.reshape(b, tiles * tile, n, h)[:, :t]
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)
