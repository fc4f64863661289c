"""The dense visual KV of a watched video in host memory.

Bi-level decoding reads little of it. The device keeps the prefix and the time tokens, the pooled KV and, for each
question, the chosen chunks. Prefill needs all of it on the device, so offloading begins when the video has been
watched.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from xl2jax.config import LLMConfig
from xl2jax.inference import compiled
from xl2jax.inference.bilevel import GroupTable, PooledKV
from xl2jax.inference.cache import KVCache
from xl2jax.inference.layout import bucket
from xl2jax.ops.kv import KVArray


class HostKV(NamedTuple):
    """Rotated visual keys and values, numpy [L, K, Gcap * V, H]."""

    k: KVArray
    v: KVArray

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self))


def placed_like(a: jax.Array, x: np.ndarray) -> jax.Array:
    """x on the devices of a. Heads are split as those of a are."""
    return jax.device_put(x, a.sharding if isinstance(a.sharding, NamedSharding) else None)


@functools.partial(jax.jit, static_argnames="start")
def _visual_of_layer(x: KVArray, layer: int | jax.Array, *, start: int) -> KVArray:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)[:, start:], x)


def empty_host(cache: KVCache, start: int) -> HostKV:
    """Uninitialised arrays for the visual region, which starts at slot `start` of `cache`."""

    def empty(a: jax.Array) -> np.ndarray:
        return np.empty((*a.shape[:2], a.shape[2] - start, *a.shape[3:]), a.dtype)

    return HostKV(*jax.tree.map(empty, (cache.k, cache.v)))


def to_host(cache: KVCache, start: int) -> tuple[KVCache, HostKV]:
    """Splits a cache: (globals on the device, visual tokens on the host). Layers are copied one by one."""
    host = empty_host(cache, start)
    for layer in range(cache.shape[0]):
        for x, out in ((cache.k, host.k), (cache.v, host.v)):
            part = _visual_of_layer(x, layer, start=start)
            for a, target in zip(jax.tree.leaves(part), jax.tree.leaves(out), strict=True):
                target[layer] = np.asarray(a)
    k, v = jax.tree.map(lambda a: a[:, :, :start], (cache.k, cache.v))
    return cache._replace(k=k, v=v), host


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(pooled: PooledKV, layer: jax.Array, part: PooledKV) -> PooledKV:
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b[0], layer, 0), pooled, part)


def pool_host(
    config: LLMConfig, cache: KVCache, host: HostKV, table: GroupTable, *, visual_tokens: int, pool: int
) -> PooledKV:
    """`bilevel.pool_cache` of an offloaded video. One layer of it is on the device at a time."""
    pooled: PooledKV | None = None
    for layer in range(config.layers):
        k, v = jax.tree.map(lambda a, x, i=layer: placed_like(a, x[i : i + 1]), (cache.k, cache.v), (host.k, host.v))
        one_layer = cache._replace(k=k, v=v, visual_start=jnp.int32(0))
        part = compiled.pool_cache(config, one_layer, table, visual_tokens=visual_tokens, pool=pool)
        if pooled is None:
            pooled = PooledKV(*(jnp.zeros((config.layers, *a.shape[1:]), a.dtype) for a in part))
        pooled = _put_layer(pooled, np.int32(layer), part)
    assert pooled is not None
    return pooled


def fetch(cache: KVCache, host: HostKV, dense: np.ndarray, *, visual_tokens: int) -> KVCache:
    """The globals and the visual tokens of groups `dense` [Gcap], one behind the other, on the device."""
    chosen = np.flatnonzero(dense)
    groups = np.zeros(bucket(len(chosen)), np.int64)  # padded to a bucket, so that few shapes are compiled
    groups[: len(chosen)] = chosen

    def pick(a: jax.Array, visual: np.ndarray) -> jax.Array:
        layers, kv_heads, slots = visual.shape[:3]
        by_group = visual.reshape(layers, kv_heads, slots // visual_tokens, visual_tokens, *visual.shape[3:])
        picked = by_group[:, :, groups].reshape(layers, kv_heads, -1, *visual.shape[3:])
        return jnp.concatenate([a, placed_like(a, picked)], axis=2)

    k, v = jax.tree.map(pick, (cache.k, cache.v), (host.k, host.v))
    return cache._replace(k=k, v=v)
