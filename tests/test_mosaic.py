"""The GPU kernel without a GPU: results and races in the interpreter, and lowering at the released shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xl2jax.config import PRESETS
from xl2jax.errors import UserError
from xl2jax.inference.layout import PrefillConfig, VideoLayout, natural_ranges
from xl2jax.ops.attention import arena_attention
from xl2jax.ops.mosaic import TILE, KernelConfig, attend_mosaic, choose_config, live_block_count, tile_blocks
from xl2jax.ops.ranges import NEGATIVE, Ranges
from xl2jax.ops.reference import attend_reference


def interpreted(args: list[Any], config: KernelConfig) -> tuple[np.ndarray, np.ndarray]:
    params = plgpu.InterpretGPUParams(detect_races=True)
    out, lse = attend_mosaic(*args, config=config, interpret=params)
    return np.asarray(out, np.float32), np.asarray(lse)


def problem(ranges: Ranges, *, slots: int, heads: int, kv_heads: int, h: int = 64, rows: int = 2) -> list[Any]:
    """Random bfloat16 arrays for ranges [B, T]. Every batch row reads another row of the arena."""
    rng = np.random.default_rng(0)
    batch, tokens = ranges.g_end.shape
    q = rng.standard_normal((batch, tokens, heads, h))
    k, v = rng.standard_normal((2, rows, kv_heads, slots, h))
    row = (np.arange(batch) + 1) % rows
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    return [*arrays, jnp.asarray(row, jnp.int32), Ranges(*(jnp.asarray(x, jnp.int32) for x in ranges))]


def assert_reference(args: list[Any], config: KernelConfig) -> None:
    out, lse = interpreted(args, config)
    expected, expected_lse = (np.asarray(x, np.float32) for x in attend_reference(*args))
    assert np.isfinite(out).all()
    assert np.linalg.norm(out - expected) <= 1e-2 * np.linalg.norm(expected)
    assert np.allclose(lse, expected_lse, atol=1e-4)
    unseen = expected_lse <= NEGATIVE
    assert not out[unseen].any()


def some_ranges(tokens: int, slots: int, seed: int) -> Ranges:
    """Ranges that end inside blocks, and a few queries that see nothing."""
    rng = np.random.default_rng(seed)
    g_end = rng.integers(slots // 8, slots // 3, (1, tokens))
    v_lo = rng.integers(slots // 3, slots // 2, (1, tokens))
    v_hi = v_lo + rng.integers(0, slots // 2, (1, tokens))
    dead = rng.random((1, tokens)) < 0.1
    return Ranges(np.where(dead, 0, g_end), v_lo, np.where(dead, 0, v_hi))


@pytest.mark.parametrize(
    ("tokens", "slots", "heads", "kv_heads", "config"),
    [
        (40, 384, 4, 2, KernelConfig(64, 2)),
        (70, 512, 2, 1, KernelConfig(128, 2)),
        (1, 640, 7, 1, KernelConfig(64, 4, splits=3)),
    ],
)
def test_against_the_reference(tokens: int, slots: int, heads: int, kv_heads: int, config: KernelConfig) -> None:
    """The cases have one tile or many, masked and unmasked blocks, and split blocks. The interpreter detects races."""
    ranges = some_ranges(tokens, slots, 0)
    assert_reference(problem(ranges, slots=slots, heads=heads, kv_heads=kv_heads), config)


def test_padding_queries_poisoned_with_nan() -> None:
    """Queries that see nothing share tiles, and so unmasked blocks, with others. Their NaN does not spread."""
    rng = np.random.default_rng(1)
    dead = rng.random((1, 40)) < 0.3
    g_end, v_lo, v_hi = (
        rng.integers(130, 200, (1, 40)),
        rng.integers(200, 250, (1, 40)),
        rng.integers(400, 500, (1, 40)),
    )
    ranges = Ranges(np.where(dead, 0, g_end), v_lo, np.where(dead, 0, v_hi))
    blocks = np.asarray(tile_blocks(Ranges(*(jnp.asarray(np.resize(x, (1, TILE)), jnp.int32) for x in ranges)), 64))[
        0, 0
    ]
    assert blocks[0] > 0
    assert blocks[4] > blocks[3]
    args = problem(ranges, slots=512, heads=4, kv_heads=2)
    clean = attend_reference(*args)
    args[0] = jnp.where(jnp.asarray(dead)[..., None, None], jnp.nan, args[0])
    out, lse = interpreted(args, KernelConfig(64, 2))
    expected, expected_lse = (np.asarray(x, np.float32) for x in clean)
    assert np.isfinite(out).all()
    assert np.linalg.norm(out - expected) <= 1e-2 * np.linalg.norm(expected)
    assert not out[dead].any()
    assert np.allclose(lse, expected_lse, atol=1e-4)


def test_short_lists_and_batches() -> None:
    """Tiles may have no block, one block, or fewer blocks than splits and stages."""
    g_end = np.array([[0] * 8, [1] * 8])
    v_lo, v_hi = np.array([[0] * 8, [64] * 8]), np.array([[0] * 8, [0] * 8])
    args = problem(Ranges(g_end, v_lo, v_hi), slots=256, heads=1, kv_heads=1)
    for config in (KernelConfig(64, 2), KernelConfig(64, 2, splits=3)):
        assert_reference(args, config)


def test_a_chunk_of_a_video() -> None:
    """Visual tokens of a video's last chunk, as prefill has them. Key blocks that they do not see are never loaded."""
    layout = VideoLayout(5, (3,) * 20, 16)
    tokens = natural_ranges(layout, 0, 128, PrefillConfig(2, 1))
    mine = tokens.ranges.select(tokens.slot >= 128 + 18 * 16)
    args = problem(mine.batched(), slots=448, heads=2, kv_heads=1)
    seen = mine.mask(np.arange(448)).any(0).reshape(-1, 64).any(1)
    assert seen.tolist() == [True, True, False, False, False, False, True]
    poison = jnp.asarray(np.where(np.repeat(seen, 64), 0.0, np.nan), jnp.bfloat16)[:, None]
    args[1], args[2] = args[1] + poison, args[2] + poison
    assert_reference(args, KernelConfig(64, 2))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([16, 64, 128]))
def test_tile_blocks(seed: int, block: int) -> None:
    """A tile visits all blocks that its rows see. Its unmasked blocks are seen whole by all rows that see anything."""
    rng = np.random.default_rng(seed)
    slots = 1024
    g_end, v_lo = rng.integers(0, slots // 2, (2, 2 * TILE))
    v_lo = np.maximum(v_lo + slots // 4, 0)
    v_hi = np.minimum(v_lo + rng.integers(-50, slots, 2 * TILE), slots)
    dead = rng.random(2 * TILE) < rng.choice([0, 0.5, 1.0])
    g_end, v_hi = np.where(dead, 0, g_end), np.where(dead, 0, v_hi)
    if rng.random() < 0.5:  # narrow tiles, so that unmasked blocks exist
        g_end = np.where(dead, 0, slots // 2 - rng.integers(0, 20, 2 * TILE))
    blocks = np.asarray(tile_blocks(Ranges(*(jnp.asarray(x, jnp.int32) for x in (g_end, v_lo, v_hi))), block))
    seen = Ranges(g_end, v_lo, v_hi).mask(np.arange(slots)).reshape(2, TILE, slots // block, block)
    for tile, (a_full, a, b, b_full, c_full, c) in enumerate(blocks):
        assert 0 <= a_full <= a <= b <= b_full <= c_full <= c <= slots // block
        visited = {*range(a), *range(b, c)}
        assert {*np.nonzero(seen[tile].any((0, 2)))[0]} <= visited
        alive = seen[tile].any((1, 2))
        whole = seen[tile][alive].all((0, 2))
        assert all(whole[i] for i in (*range(a_full), *range(b_full, c_full)))
        assert live_block_count(blocks)[tile] == len(visited)


def test_few_tiles_are_split() -> None:
    assert choose_config(504, 60_928).splits == 1
    assert choose_config(4, 60_928).splits == 33
    assert choose_config(4, 256).splits == 1
    assert choose_config(4, 192) == dataclasses.replace(choose_config(4, 256), block=64, stages=4)


LLM = PRESETS["video-xl-2"].llm


@pytest.mark.parametrize(
    ("tokens", "slots", "h", "batch"),
    [(2304, 60_928, 128, 1), (128, 380_032, 128, 1), (1, 380_032, 128, 1), (1, 192, 128, 1), (256, 1024, 64, 2)],
)
def test_lowers_for_cuda_at_the_released_shapes(tokens: int, slots: int, h: int, batch: int) -> None:
    """The shapes are those of prefill, time tokens, decoding and a text cache, with the default kernel config."""
    shape = jax.ShapeDtypeStruct
    q = shape((batch, tokens, LLM.heads, h), jnp.bfloat16)
    kv = shape((LLM.layers, LLM.kv_heads, slots, h), jnp.bfloat16)
    rows, ranges = shape((batch,), jnp.int32), Ranges(*[shape((batch, tokens), jnp.int32)] * 3)
    lowered = jax.jit(attend_mosaic).trace(q, kv, kv, rows, ranges).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("h", "dtype", "slots", "message"),
    [
        (32, jnp.bfloat16, 128, "head width 32 is not supported"),
        (64, jnp.float32, 128, "float32 queries"),
        (64, jnp.bfloat16, 100, "100 cache slots"),
    ],
)
def test_what_is_not_served_is_an_error_by_name(h: int, dtype: jax.typing.DTypeLike, slots: int, message: str) -> None:
    q, kv = jnp.zeros((1, 2, 2, h), dtype), jnp.zeros((1, 1, slots, h), dtype)
    ints = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(UserError, match=message):
        arena_attention(q, kv, kv, jnp.zeros(1, jnp.int32), Ranges(ints, ints, ints), implementation="mosaic")
