"""Attention over the arena: `[globals | visual tokens]`, three integers a query.

Query t of batch row b sees exactly the slots `[0, g_end) U [v_lo, v_hi)`; an interval whose end is not
past its start is empty, and a query that sees nothing gets zeros. With keys in arena order this is
enough for dense causal, chunked and bi-level attention alike (see xl2jax.layout).

Shapes of the op, whatever the implementation:

    q             [B, T, N, H]   rotated queries
    k, v          [R, K, S, H]   rows of key and value slots: cache layers, or batch rows; N = K * groups
    rows          [B]   int32    the row of k and v that each batch row reads (nothing is copied)
    g_end, v_lo, v_hi  [B, T]  int32
    -> out        [B, T, N, H]   q's dtype, float32 accumulation
    -> lse        [B, T, N]      float32 log-sum-exp of the scaled scores, NEGATIVE where nothing is seen

Slots that no query sees may hold any finite value; the XLA implementations bear NaN there too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.errors import UserError

NEGATIVE = -1e30
"""Finite stand-in for minus infinity."""

logger = logging.getLogger(__name__)


def arena_mask(g_end: Any, v_lo: Any, v_hi: Any, slots: Any) -> Any:
    """Boolean [..., T, S]: whether a query sees a slot, in jax or numpy. The definition of the ranges."""
    g_end, v_lo, v_hi = (x[..., None] for x in (g_end, v_lo, v_hi))
    return (slots < g_end) | ((slots >= v_lo) & (slots < v_hi))


def attend_reference(
    q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, g_end: jax.Array, v_lo: jax.Array, v_hi: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The oracle: float32, one dense mask."""
    k, v = k[rows].astype(jnp.float32), v[rows].astype(jnp.float32)
    groups = q.shape[2] // k.shape[1]
    mask = arena_mask(g_end, v_lo, v_hi, np.arange(k.shape[2]))[:, None, None]
    v = jnp.where(jnp.any(mask, axis=(1, 2, 3))[:, None, :, None], v, 0.0)
    queries = q.astype(jnp.float32).reshape(*q.shape[:2], k.shape[1], groups, q.shape[3])
    scores = jnp.einsum("btkgh,bksh->bkgts", queries, k, precision="highest") * q.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, NEGATIVE)
    top = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    seen = total > 0
    p = p / jnp.where(seen, total, 1.0)
    out = jnp.einsum("bkgts,bksh->btkgh", p, v, precision="highest").reshape(q.shape)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), NEGATIVE)[..., 0]
    return out.astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(q.shape[:3])


def _tile_sizes(queries: int, slots: int) -> tuple[int, int]:
    """(queries, key slots) of a tile: equal tiles of at most 640 queries, a chunk as released is 576."""
    tile = -(-queries // -(-queries // 640))
    return tile, min(slots, 512 if tile >= 64 else 2048)


def attend_blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, g_end: jax.Array, v_lo: jax.Array, v_hi: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """XLA: online softmax over the key blocks that some query of the tile sees; no [T, S] array."""
    b, t, n, h = q.shape
    tile, block = _tile_sizes(t, k.shape[2])
    tiles = -(-t // tile)

    def to_tiles(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B * tiles, tile, ...]
        x = jnp.pad(x, ((0, 0), (0, tiles * tile - t)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(b * tiles, tile, *x.shape[2:])

    def one(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        return _attend_tile(*xs, k=k, v=v, block=block)

    xs = (to_tiles(q), jnp.repeat(rows, tiles), to_tiles(g_end), to_tiles(v_lo), to_tiles(v_hi))
    if b * tiles == 1:
        out, lse = (y[None] for y in one(tuple(x[0] for x in xs)))
    else:
        out, lse = jax.lax.map(one, xs)
    return out.reshape(b, tiles * tile, n, h)[:, :t], lse.reshape(b, tiles * tile, n)[:, :t]


def live_blocks(
    g_end: jax.Array, v_lo: jax.Array, v_hi: jax.Array, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Key blocks that some query of a tile sees: `[0, a)` and `[b, c)` with b >= a."""
    seen = v_hi > v_lo
    a = (jnp.max(g_end) + block - 1) // block
    first = jnp.min(jnp.where(seen, v_lo, jnp.iinfo(jnp.int32).max)) // block
    c = jnp.max(jnp.where(seen, v_hi + block - 1, 0)) // block
    b = jnp.maximum(first, a)
    return a, b, jnp.maximum(c, b)


def _attend_tile(
    q: jax.Array, row: jax.Array, g_end: jax.Array, v_lo: jax.Array, v_hi: jax.Array,
    *, k: jax.Array, v: jax.Array, block: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """q [T, N, H] against row `row` of k and v: (out [T, N, H], lse [T, N])."""
    t, n, h = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    groups = n // kv_heads
    queries = q.reshape(t, kv_heads, groups, h).transpose(1, 0, 2, 3).reshape(kv_heads, t * groups, h)
    g_blocks, v_first, v_last = live_blocks(g_end, v_lo, v_hi, block)

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, top, total = carry
        start = jnp.where(i < g_blocks, i, i - g_blocks + v_first) * block
        # The last block may hang over the end: read it further left, and mask what was read before.
        read_at = jnp.minimum(start, slots - block)
        kb, vb = (jax.lax.dynamic_slice(x, (row, 0, read_at, 0), (1, kv_heads, block, h))[0] for x in (k, v))
        columns = read_at + jnp.arange(block, dtype=jnp.int32)
        mask = arena_mask(g_end, v_lo, v_hi, columns) & (columns >= start)  # [T, block]
        vb = jnp.where(jnp.any(mask, axis=0)[:, None], vb, 0)
        scores = jnp.einsum("kqh,ksh->kqs", queries, kb, preferred_element_type=jnp.float32) * h**-0.5
        scores = jnp.where(mask[:, None], scores.reshape(kv_heads, t, groups, block), NEGATIVE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # A masked score is NEGATIVE: its exponential is 0 once the row has seen a slot. Until then
        # new_top is NEGATIVE too, and what is summed is wiped by the first real score.
        p = jnp.exp(scores - new_top[..., None])
        decay = jnp.exp(top - new_top)
        total = total * decay + jnp.sum(p, axis=-1)
        p = p.reshape(kv_heads, t * groups, block).astype(vb.dtype)
        update = jnp.einsum("kqs,ksh->kqh", p, vb, preferred_element_type=jnp.float32)
        acc = acc * decay[..., None] + update.reshape(kv_heads, t, groups, h)
        return acc, new_top, total

    shape = (kv_heads, t, groups)
    init = (jnp.zeros((*shape, h)), jnp.full(shape, NEGATIVE), jnp.zeros(shape))
    acc, top, total = jax.lax.fori_loop(0, g_blocks + v_last - v_first, body, init)
    seen = top > NEGATIVE / 2
    total = jnp.where(seen, total, 1.0)
    out = jnp.where(seen[..., None], acc / total[..., None], 0.0)
    lse = jnp.where(seen, top + jnp.log(total), NEGATIVE)
    return out.transpose(1, 0, 2, 3).reshape(t, n, h).astype(q.dtype), lse.transpose(1, 0, 2).reshape(t, n)


def _attend_mosaic(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
    from xl2jax.ops import mosaic  # Pallas is slow to import: only where it is used

    return mosaic.attend_mosaic(*args)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": attend_reference,
    "blockwise": attend_blockwise,
    "mosaic": _attend_mosaic,
}


@functools.cache
def _log_choice(name: str, why: str) -> None:
    logger.info("arena attention: %s (auto on %s)", name, why)


def _choose(q: jax.Array, k: jax.Array) -> str:
    """The implementation that `auto` means here; logged once for each reason."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        _log_choice("blockwise", device.platform)
        return "blockwise"
    from xl2jax.ops import mosaic

    capability = str(getattr(device, "compute_capability", "0.0"))
    # The kernel's wgmma instructions are Hopper's own.
    reason = mosaic.unsupported(q, k) if capability == "9.0" else "only compute capability 9.0 has the kernel"
    name = "blockwise" if reason else "mosaic"
    _log_choice(name, f"{device.device_kind}" + (f": {reason}" if reason else ""))
    return name


def arena_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, g_end: jax.Array, v_lo: jax.Array, v_hi: jax.Array,
    *, implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The op of this module, by the implementation named; `auto` chooses, and logs its choice once.

    Raises:
      UserError: no such implementation, or the one named does not serve these shapes or dtypes. A
        named one never falls back to another.
    """
    if implementation == "auto":
        implementation = _choose(q, k)
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention {implementation!r}: choose auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](q, k, v, rows, g_end, v_lo, v_hi)


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over disjoint sets of slots, (out, lse) each, to attention over their union."""
    outs, lses = zip(*parts, strict=True)
    lse = functools.reduce(jnp.logaddexp, lses)
    out = sum(o.astype(jnp.float32) * jnp.exp(x - lse)[..., None] for o, x in zip(outs, lses, strict=True))
    return jnp.asarray(out).astype(outs[0].dtype), lse
