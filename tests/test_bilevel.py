"""The mixed cache against upstream's rule, written in plain numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xl2jax.inference.bilevel import (
    BilevelConfig,
    GroupTable,
    MixedSource,
    blocks_of_units,
    choose_blocks,
    group_table,
    mix,
    mixed_slots,
    mixed_source,
    pool_cache,
)
from xl2jax.inference.cache import KVCache
from xl2jax.inference.layout import PrefillConfig, VideoLayout, natural_ranges

L, K, H, THETA = 2, 2, 8, 1e4
_CAPACITY, _START = 6, 32  # fixed shapes, so that few programs are compiled


def rotated(x: np.ndarray, direction: int) -> np.ndarray:
    """x [..., N, H] rotated by its place along N (direction 1) or back (-1), as complex numbers."""
    angles = np.arange(x.shape[-2])[:, None] / THETA ** (np.arange(0, H, 2) / H)
    z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * direction * angles)
    return np.concatenate([z.real, z.imag], axis=-1).astype(np.float32)


def video_cache(layout: VideoLayout, capacity: int) -> tuple[KVCache, np.ndarray, np.ndarray]:
    """An arena cache, and its un-rotated keys and values [L, K, N, H] in natural order."""
    rng = np.random.default_rng(0)
    start = _START
    raw, v = rng.standard_normal((2, L, K, layout.tokens, H)).astype(np.float32)
    k = rotated(raw, 1)
    slot = natural_ranges(layout, 0, start, PrefillConfig()).slot
    arena = np.full((2, L, K, start + capacity * layout.visual_tokens, H), 7.0, np.float32)
    arena[0][:, :, slot], arena[1][:, :, slot] = k, v
    cache = KVCache(
        jnp.asarray(arena[0]),
        jnp.asarray(arena[1]),
        jnp.int32(layout.global_tokens),
        jnp.int32(start),
        jnp.int32(layout.groups * layout.visual_tokens),
    )
    return cache, raw, v


def naive_mix(layout: VideoLayout, dense: np.ndarray, pool: int, x: np.ndarray) -> np.ndarray:
    """Keys or values in natural order [L, K, N, H] -> those of the mixed cache [L, K, M, H]."""
    parts, at = [x[:, :, : layout.prefix]], layout.prefix
    for times, whole in zip(layout.time_lengths, dense, strict=True):
        parts.append(x[:, :, at : at + times])
        visual = x[:, :, at + times : at + times + layout.visual_tokens]
        n = layout.visual_tokens // pool
        parts.append(visual if whole else visual[:, :, : n * pool].reshape(L, K, n, pool, H).mean(3))
        at += times + layout.visual_tokens
    return np.concatenate([*parts, x[:, :, at:]], axis=2)


@functools.partial(jax.jit, static_argnames=("visual_tokens", "pool", "slots"))
def _mixed(
    cache: KVCache, table: GroupTable, dense: jax.Array, *, visual_tokens: int, pool: int, slots: int
) -> tuple[KVCache, MixedSource]:
    pooled = pool_cache(cache, table, visual_tokens=visual_tokens, pool=pool, theta=THETA)
    source = mixed_source(table, dense, cache.visual_start, visual_tokens=visual_tokens, pool=pool, slots=slots)
    return mix(cache, pooled, source, theta=THETA), source


@settings(max_examples=60, deadline=None)
@given(
    times=st.lists(st.integers(1, 4), min_size=1, max_size=_CAPACITY),
    sizes=st.sampled_from([(7, 3), (4, 4), (3, 1), (1, 1)]),
    data=st.data(),
)
def test_mixed_cache(times: list[int], sizes: tuple[int, int], data: st.DataObject) -> None:
    """Every mixture is right, with its tail; remainders of pooling are dropped, and slots behind it stay empty."""
    visual, pool = sizes
    extra = _CAPACITY - len(times)
    layout = VideoLayout(3, tuple(times), visual, data.draw(st.integers(0, 3)))
    dense = np.array(data.draw(st.lists(st.booleans(), min_size=len(times), max_size=len(times))))
    cache, raw, v = video_cache(layout, _CAPACITY)
    table = group_table(layout, _CAPACITY)
    slots = mixed_slots(layout, int(dense.sum()), BilevelConfig(1, pool))
    flags = jnp.asarray(np.pad(dense, (0, extra)))
    mixed, source = _mixed(cache, table, flags, visual_tokens=visual, pool=pool, slots=slots)
    expected_k, expected_v = (naive_mix(layout, dense, pool, x) for x in (raw, v))
    m = expected_k.shape[2]
    assert (int(mixed.length), int(mixed.visual_length)) == (m, 0)
    keys, values = np.asarray(mixed.k), np.asarray(mixed.v)
    # The oracle rotates in float64. Angles up to 60 have an error of 4e-6 in float32, which counts twice.
    assert np.allclose(rotated(keys, -1)[:, :, :m], expected_k, atol=1e-4)
    assert np.allclose(values[:, :, :m], expected_v, atol=1e-6)
    assert not keys[:, :, m:].any()
    assert np.isfinite(values).all()
    group = np.asarray(source.group)[:m]
    assert (group[: layout.prefix] == -1).all()
    counts = np.array(times) + np.where(dense, visual, visual // pool)
    behind = m - layout.tail
    assert np.array_equal(np.bincount(group[layout.prefix : behind], minlength=len(times)), counts)
    assert (group[behind:] == -1).all()


@pytest.mark.parametrize(
    ("units", "groups", "size", "dense"),
    [
        # Blocks 1 and B are always dense. Unit u lies in block u // (size / 2) + 1.
        ([0, 5, 9], 26, 4, {1, 3, 5, 7}),
        ([4], 26, 2, {1, 5, 13}),
        ([], 26, 4, set(range(1, 8))),
        ([3], 9, 3, {1, 3}),
        ([2], 6, 1, {1, 5, 6}),
        ([99], 8, 4, {1, 2}),
    ],
)
def test_blocks_of_units(units: list[int], groups: int, size: int, dense: set[int]) -> None:
    assert set(np.nonzero(blocks_of_units(units, groups, size))[0] + 1) == dense


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 10**6))
def test_choose_blocks(blocks: int, top: int, seed: int) -> None:
    scores = np.random.default_rng(seed).random(14).astype(np.float32)
    dense = np.asarray(jax.jit(choose_blocks, static_argnums=2)(scores, jnp.int32(blocks), top))
    middle = list(range(1, blocks - 1))
    best = sorted(middle, key=lambda b: -scores[b])[:top]
    assert set(np.nonzero(dense)[0]) == {0, blocks - 1, *best}
