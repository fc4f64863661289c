"""Keys and values as attention reads them: plain or in 8 bits, and the part of them that queries see."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.ops.ranges import Ranges


class QuantizedKV(NamedTuple):
    """Keys or values in 8 bits: `values * scale`, with a scale for each token and head."""

    values: jax.Array
    """int8 [..., K, S, H]"""
    scale: jax.Array
    """[..., K, S]; unpacked keys and values have its dtype."""


type KVArray = jax.Array | QuantizedKV


def quantize(x: jax.Array) -> QuantizedKV:
    """Quantises symmetrically: the largest magnitude along H becomes 127. The error is at most half a scale.

    In float16 that holds for magnitudes from 0.01 on: the scales of smaller ones are subnormal and so less exact.
    """
    scale = (jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1) / 127).astype(x.dtype)
    # Unpacking multiplies by the rounded scale, so the division uses the rounded scale too.
    steps = x.astype(jnp.float32) / jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
    return QuantizedKV(jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8), scale)


def unpack(x: KVArray) -> jax.Array:
    """Keys or values in the dtype of the computation."""
    if isinstance(x, QuantizedKV):
        return (x.values.astype(jnp.float32) * x.scale.astype(jnp.float32)[..., None]).astype(x.scale.dtype)
    return x


def kv_shape(x: KVArray) -> tuple[int, ...]:
    """The shape of keys or values, [..., K, S, H]."""
    return (x.values if isinstance(x, QuantizedKV) else x).shape


def kv_dtype(x: KVArray) -> np.dtype:
    """The dtype of keys or values once they are unpacked."""
    return np.dtype((x.scale if isinstance(x, QuantizedKV) else x).dtype)


class Source(NamedTuple):
    """Slots of keys and values, and what the queries see of them."""

    k: KVArray
    """[R, K, S, H]: rows of slots, which are cache layers or batch rows."""
    v: KVArray
    """[R, K, S, H]"""
    rows: Any
    """int32 [B]: the row of k and v that each batch row reads, in place unless it has to be unpacked. None where every
    batch row has its own, in order (R is B)."""
    ranges: Ranges
    """int32 [B, T] each."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """R, K, S, H."""
        rows, kv_heads, slots, h = kv_shape(self.k)
        return rows, kv_heads, slots, h

    @property
    def dtype(self) -> np.dtype:
        """The dtype of keys and values once they are unpacked."""
        return kv_dtype(self.k)

    @property
    def quantized(self) -> bool:
        return isinstance(self.k, QuantizedKV)


def unpack_row(source: Source) -> Source:
    """A quantised source with only the rows that are read, unpacked. Other sources are returned as they are.

    Not for a source whose `rows` are None.
    """
    if not source.quantized:
        return source
    k, v = (unpack(jax.tree.map(lambda a: a[source.rows], x)) for x in (source.k, source.v))
    return Source(k, v, jnp.arange(k.shape[0], dtype=jnp.int32), source.ranges)
