"""The error of a video's keys and values in 8 bits, layer by layer (`xl2jax.ops.kv.quantize`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.config import LLMConfig
from xl2jax.inference.cache import KVCache
from xl2jax.inference.layout import PrefillConfig, VideoLayout, natural_ranges
from xl2jax.models.layers import rope_tables, rotate
from xl2jax.ops.kv import quantize, unpack

BLOCK = 64
"""Tokens that share the scale of a channel, where scales of channels are tried."""


def layer_rows(
    config: LLMConfig, cache: KVCache, layout: VideoLayout, key_bias: jax.Array, key_channels: np.ndarray | None
) -> list[dict[str, Any]]:
    """A row for each layer of the cache of a video. `key_bias` is [L, K * H], `key_channels` [L, K, C]. See `errors`."""
    tokens = natural_ranges(layout, 0, int(cache.visual_start), PrefillConfig())
    slots, positions = jnp.asarray(tokens.slot), jnp.asarray(tokens.position)
    bias = key_bias.reshape(config.layers, config.kv_heads, config.head_width)
    rows = []
    for layer in range(config.layers):
        k, v = (unpack(jax.tree.map(lambda a: a[layer][:, slots], x)) for x in (cache.k, cache.v))  # noqa: B023
        kept = None if key_channels is None else key_channels[layer]
        rows.append({"layer": layer, **errors(k, v, positions, bias[layer], config.rope_theta, kept)})
    return rows


def errors(
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    bias: jax.Array,
    theta: float,
    key_channels: np.ndarray | None = None,
) -> dict[str, float]:
    """The errors of one layer.

    Args:
      k, v: rotated keys and values [K, T, H].
      positions: int [T], by which the keys are rotated.
      bias: the bias [K, H] of the keys before their rotation.
      key_channels: int [K, C], the channels of the keys that are kept as they are, if any.

    Returns:
      key bias: the largest norm of a head's bias.
      keys, values: the error in 8 bits, relative L2.
      keys, beside their mean: the error relative to the un-rotated keys without their mean over all tokens. Keys that
        have a part in common, such as the bias, take their scale from it, and the error with the scale. Beside what
        tells the tokens apart it then is larger than it looks.
      all channels in 8 bits: that error where no channel is kept.
      without bias: that error where the rotated bias is taken off before rounding, and given back afterwards.
      by channel: that error where `BLOCK` tokens share a scale for each channel, in place of a scale for each token.
    """
    cos, sin = rope_tables(positions, k.shape[-1], theta)
    k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)
    plain = rotate(k32, cos, -sin)
    varying = plain - plain.mean(axis=1, keepdims=True)
    common = rotate(jnp.broadcast_to(bias.astype(jnp.float32)[:, None], k.shape), cos, sin).astype(k.dtype)
    less = (k32 - common.astype(jnp.float32)).astype(k.dtype)

    def error(x: jax.Array, channels: np.ndarray | None = None) -> float:
        return float(jnp.linalg.norm(unpack(quantize(x, channels)).astype(jnp.float32) - x.astype(jnp.float32)))

    # The missing tokens of the last block repeat its last one, so that they widen no scale and have no error to count.
    missing = -k.shape[1] % BLOCK
    blocks = jnp.pad(k, ((0, 0), (0, missing), (0, 0)), mode="edge").reshape(k.shape[0], -1, BLOCK, k.shape[2])
    by_channel = unpack(quantize(blocks.swapaxes(2, 3))).swapaxes(2, 3).reshape(k.shape[0], -1, k.shape[2])
    channel_error = by_channel[:, : k.shape[1]].astype(jnp.float32) - k32

    def norm(x: jax.Array) -> float:
        return max(float(jnp.linalg.norm(x)), float(np.finfo(np.float32).tiny))

    return {
        "key bias": float(jnp.linalg.norm(bias.astype(jnp.float32), axis=-1).max()),
        "keys": error(k, key_channels) / norm(k32),
        "keys, beside their mean": error(k, key_channels) / norm(varying),
        "all channels in 8 bits": error(k) / norm(varying),
        "without bias": error(less) / norm(varying),
        "by channel": norm(channel_error) / norm(varying),
        "values": error(v) / norm(v32),
    }
