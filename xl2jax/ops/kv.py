"""Keys and values as attention reads them: plain or in 8 bits, and the part of them that queries see."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.ops.ranges import Ranges

EXACT = -128
"""The code of a channel whose numbers are kept in `QuantizedKV.exact`."""


class QuantizedKV(NamedTuple):
    """Keys or values in 8 bits: `values * scale`, with a scale for each token and head.

    A few channels of each head may be kept as they are. They have the code `EXACT` in every slot, written or not, so
    that any part of the slots tells which channels they are.
    """

    values: jax.Array
    """int8 [..., K, S, H]"""
    scale: jax.Array
    """[..., K, S]; unpacked keys and values have its dtype."""
    exact: jax.Array | None = None
    """[..., K, S, C] in the dtype of `scale`: the numbers of the C channels that are kept, in ascending order."""


class TurnedKeys(NamedTuple):
    """Keys whose slots come last: one token's scores are then sums over rows that lie in one piece.

    XLA on CPUs computes them in half the time that it takes for other keys, which it would first copy to that order.
    """

    values: jax.Array
    """[..., K, H, S]"""


type KVArray = jax.Array | QuantizedKV


def quantize(x: jax.Array, channels: jax.Array | np.ndarray | None = None) -> QuantizedKV:
    """Quantises [..., K, S, H] symmetrically: the largest magnitude along H becomes 127. The error is at most half a scale.

    `channels`, int32 [..., K, C] in ascending order, are kept exactly, and have no influence on the scales. In float16
    the bound holds for magnitudes from 0.01 on: the scales of smaller ones are subnormal and so less exact.
    """
    exact = marked = None
    rest = x.astype(jnp.float32)
    if channels is not None:
        channels = jnp.asarray(channels)
        exact = jnp.take_along_axis(x, channels[..., None, :], axis=-1)
        marked = channel_mask(channels, x.shape[-1])[..., None, :]
        rest = jnp.where(marked, 0, rest)
    scale = (jnp.max(jnp.abs(rest), axis=-1) / 127).astype(x.dtype)
    # Unpacking multiplies by the rounded scale, so the division uses the rounded scale too.
    steps = rest / jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
    codes = jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8)
    return QuantizedKV(codes if marked is None else jnp.where(marked, EXACT, codes), scale, exact)


def quantized_zeros(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, channels: jax.Array | np.ndarray | None = None
) -> QuantizedKV:
    """What `quantize` makes of zeros [..., K, S, H]. Compiled, it does no work for every element."""
    codes, scale = jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], dtype)
    if channels is None:
        return QuantizedKV(codes, scale)
    marked = channel_mask(jnp.asarray(channels), shape[-1])[..., None, :]
    return QuantizedKV(
        jnp.where(marked, jnp.int8(EXACT), codes), scale, jnp.zeros((*shape[:-1], channels.shape[-1]), dtype)
    )


def channel_mask(channels: jax.Array, h: int) -> jax.Array:
    """Channels [..., C] -> boolean [..., H]."""
    return jnp.any(channels[..., None] == jnp.arange(h), axis=-2)


def kept_channels(x: KVArray) -> int:
    """How many channels of each head are kept exactly in 8 bits."""
    return x.exact.shape[-1] if isinstance(x, QuantizedKV) and x.exact is not None else 0


def exact_channels(x: KVArray) -> jax.Array | None:
    """The channels that are kept exactly, int32 [..., K, C] in ascending order, or None."""
    if not isinstance(x, QuantizedKV) or x.exact is None:
        return None
    counts = jnp.cumsum(x.values[..., 0, :] == EXACT, axis=-1, dtype=jnp.int32)
    wanted = jnp.arange(1, x.exact.shape[-1] + 1)
    return jnp.argmax(counts[..., None, :] == wanted[:, None], axis=-1).astype(jnp.int32)


def unpack(x: KVArray) -> jax.Array:
    """Keys or values in the dtype of the computation."""
    if not isinstance(x, QuantizedKV):
        return x
    numbers = (x.values.astype(jnp.float32) * x.scale.astype(jnp.float32)[..., None]).astype(x.scale.dtype)
    if x.exact is None:
        return numbers
    marked = x.values[..., :1, :] == EXACT
    place = jnp.clip(jnp.cumsum(marked, axis=-1, dtype=jnp.int32) - 1, 0)
    return jnp.where(marked, jnp.take_along_axis(x.exact, place, axis=-1), numbers)


def kv_shape(x: KVArray | TurnedKeys) -> tuple[int, ...]:
    """The shape of keys or values, [..., K, S, H]."""
    if isinstance(x, TurnedKeys):
        *rest, h, slots = x.values.shape
        return *rest, slots, h
    return (x.values if isinstance(x, QuantizedKV) else x).shape


def kv_dtype(x: KVArray | TurnedKeys) -> np.dtype:
    """The dtype of keys or values once they are unpacked."""
    if isinstance(x, TurnedKeys):
        return np.dtype(x.values.dtype)
    return np.dtype((x.scale if isinstance(x, QuantizedKV) else x).dtype)


class Source(NamedTuple):
    """Slots of keys and values, and what the queries see of them."""

    k: KVArray
    """[R, K, S, H]: rows of slots, which are cache layers or batch rows. Or `TurnedKeys` of them, where `rows` is
    None, for single tokens (T is 1) and the blockwise implementation."""
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
