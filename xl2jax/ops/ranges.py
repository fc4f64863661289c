"""The slots of the arena that each query sees, as three integers, and the merging of results over parts of it.

Query t of batch row b sees exactly the slots `[0, g_end) U [v_lo, v_hi)`. An interval whose end is not past its start
is empty. With keys in arena order (see xl2jax.inference.layout) this is enough for dense causal, chunked and bi-level
attention alike.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NEGATIVE = -1e30
"""Finite stand-in for minus infinity."""


class Ranges(NamedTuple):
    """The slots that each query sees: int32 arrays of one shape, [T] or [B, T], in jax or numpy."""

    g_end: Any
    """A query sees the global slots `[0, g_end)`."""
    v_lo: Any
    """The first visual slot that it sees."""
    v_hi: Any
    """The end of the visual slots that it sees, `[v_lo, v_hi)`."""

    def mask(self, slots: Any) -> Any:
        """Boolean [..., T, S]: whether a query sees a slot. This is the definition of the ranges."""
        g_end, v_lo, v_hi = (x[..., None] for x in self)
        return (slots < g_end) | ((slots >= v_lo) & (slots < v_hi))

    def select(self, index: Any) -> Ranges:
        """The ranges of the queries that `index` selects along the last axis."""
        return Ranges(*(x[..., index] for x in self))

    def only(self, queries: Any) -> Ranges:
        """The same ranges for `queries` (boolean), and nothing at all for the others."""
        return Ranges(*(jnp.where(queries, x, 0) for x in self))

    def batched(self) -> Ranges:
        """[T] as [1, T]."""
        return Ranges(*(x[None] for x in self))


def first_slots(ends: jax.Array) -> Ranges:
    """Ranges of queries that see the slots `[0, ends)` and nothing else."""
    nothing = jnp.zeros_like(ends)
    return Ranges(ends, nothing, nothing)


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Combines attention over disjoint sets of slots, (out, lse) each, to attention over their union."""
    outs, lses = zip(*parts, strict=True)
    lse = functools.reduce(jnp.logaddexp, lses)
    out = sum(o.astype(x.dtype) * jnp.exp(x - lse)[..., None] for o, x in zip(outs, lses, strict=True))
    return jnp.asarray(out).astype(outs[0].dtype), lse
