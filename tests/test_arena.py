"""The implementations of arena attention against float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xl2jax.arithmetic import ceil_div
from xl2jax.errors import UserError
from xl2jax.inference.layout import PrefillConfig, VideoLayout, natural_ranges
from xl2jax.ops import attention, blockwise
from xl2jax.ops.attention import Attention, arena_attention, choose_attention
from xl2jax.ops.blockwise import attend_blockwise
from xl2jax.ops.kv import Source, TurnedKeys, quantize
from xl2jax.ops.ranges import NEGATIVE, Ranges, merge
from xl2jax.ops.reference import attend_reference

XLA = ("reference", "blockwise")  # tests/test_gpu_kernels.py has the same checks for the GPU kernels


def float64_attention(q, k, v, rows, ranges):
    """A loop over queries in float64 numpy."""
    b, t, n, h = q.shape
    out, lse = np.zeros(q.shape), np.full((b, t, n), NEGATIVE)
    seen = ranges.mask(np.arange(k.shape[2]))
    for i, j, head in np.ndindex(b, t, n):
        kv = head // (n // k.shape[1])
        at = np.nonzero(seen[i, j])[0]
        if len(at):
            s = k[rows[i], kv, at].astype(np.float64) @ q[i, j, head].astype(np.float64) * h**-0.5
            p = np.exp(s - s.max())
            out[i, j, head] = (p / p.sum()) @ v[rows[i], kv, at].astype(np.float64)
            lse[i, j, head] = s.max() + np.log(p.sum())
    return out, lse


def problem(
    seed: int, *, t: int, s: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, h: int = 16, rows: int = 3
):
    """Random arrays and ranges: empty ones, overlapping intervals and full views among them."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, t, heads, h)).astype(np.float32)
    k, v = rng.standard_normal((2, rows, kv_heads, s, h)).astype(np.float32)
    g_end = rng.integers(0, s // 2 + 1, (batch, t))
    v_lo = rng.integers(0, s, (batch, t))
    v_hi = np.minimum(v_lo + rng.integers(-3, s, (batch, t)), s)
    dead = rng.random((batch, t)) < 0.1
    g_end, v_hi = np.where(dead, 0, g_end), np.where(dead, 0, v_hi)
    row = rng.integers(0, rows, batch)
    return q, k, v, row.astype(np.int32), Ranges(*(x.astype(np.int32) for x in (g_end, v_lo, v_hi)))


def attend(name, q, k, v, rows, ranges):
    q, *source = jax.tree.map(jnp.asarray, (q, k, v, rows, ranges))
    return arena_attention(q, Source(*source), attention=Attention(name))


def close(actual, expected, tolerance: float) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("name", XLA)
@pytest.mark.parametrize(
    "shape",
    [{"t": 7, "s": 50}, {"t": 1, "s": 4500, "heads": 8}, {"t": 700, "s": 1100, "h": 8}, {"t": 3, "s": 33, "batch": 3}],
)
def test_against_float64(name: str, shape: dict) -> None:
    args = problem(0, **shape)
    out, lse = attend(name, *args)
    expected, expected_lse = float64_attention(*args)
    close(out, expected, 1e-5)
    assert np.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", XLA)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_ranges(name: str, seed: int) -> None:
    # All examples have one shape, so that it compiles once. With key blocks of 16 slots a tile reads many blocks.
    args = problem(seed, t=20, s=77)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(blockwise, "_tile_sizes", lambda queries, slots: (8, 16))
        out, lse = attend(name, *args)
    expected, expected_lse = float64_attention(*args)
    close(out, expected, 1e-5)
    assert np.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", XLA)
def test_bfloat16(name: str) -> None:
    args = problem(1, t=64, s=600)
    half = [jnp.asarray(x, jnp.bfloat16) for x in args[:3]]
    out, _ = attend(name, *half, *args[3:])
    assert out.dtype == jnp.bfloat16
    expected, _ = float64_attention(*(np.asarray(x, np.float32) for x in half), *args[3:])
    close(out.astype(jnp.float32), expected, 1e-2)


@pytest.mark.parametrize("name", XLA)
def test_unseen_slots_may_be_poisoned(name: str) -> None:
    q, k, v, rows, (g_end, v_lo, v_hi) = problem(2, t=40, s=300)
    ranges = Ranges(np.minimum(g_end, 20), np.maximum(v_lo, 100), np.minimum(v_hi, 200))
    expected, _ = float64_attention(q, k, v, rows, ranges)
    unseen = ~ranges.mask(np.arange(300)).any((0, 1))
    assert unseen.sum() > 100
    k[:, :, unseen], v[:, :, unseen] = np.nan, np.nan
    out, _ = attend(name, q, k, v, rows, ranges)
    close(out, expected, 1e-5)


@pytest.mark.parametrize("name", XLA)
def test_nothing_seen_is_zero(name: str) -> None:
    q, k, v, rows, (g_end, v_lo, _v_hi) = jax.tree.map(jnp.asarray, problem(3, t=5, s=40))
    out, lse = attend(name, q, k, v, rows, Ranges(g_end * 0, v_lo, v_lo))
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == NEGATIVE).all()


def test_keys_whose_slots_come_last() -> None:
    """A token for each row, as answers are decoded together on CPUs, where another source has other keys."""
    q, k, v, _, ranges = problem(5, t=1, s=40, batch=3, rows=3)
    expected, expected_lse = float64_attention(q, k, v, np.arange(3), ranges)
    turned = TurnedKeys(jnp.asarray(k.swapaxes(2, 3)))
    out, lse = arena_attention(jnp.asarray(q), Source(turned, jnp.asarray(v), None, Ranges(*map(jnp.asarray, ranges))))  # type: ignore[arg-type]
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)
    with pytest.raises(AssertionError):  # they are not turned
        arena_attention(jnp.asarray(q), Source(TurnedKeys(jnp.asarray(k)), jnp.asarray(v), None, ranges))  # type: ignore[arg-type]


def test_merge_is_attention_over_the_union() -> None:
    q, k, v, rows, (g_end, v_lo, v_hi) = problem(4, t=9, s=60)
    g_end, v_lo, v_hi = g_end * 0 + 25, v_lo * 0 + 30, v_hi * 0 + 55
    nothing = np.zeros_like(g_end)
    parts = [
        attend("blockwise", q, k, v, rows, Ranges(*part))
        for part in ((g_end, nothing, nothing), (nothing, v_lo, v_hi), (nothing, nothing, nothing))
    ]
    expected, expected_lse = float64_attention(q, k, v, rows, Ranges(g_end, v_lo, v_hi))
    out, lse = merge(parts)
    close(out, expected, 1e-5)
    assert np.allclose(lse, expected_lse, rtol=1e-5)


def test_unknown_implementation() -> None:
    with pytest.raises(UserError, match="choose auto, reference, blockwise, wgmma, mma"):
        choose_attention("cudnn", jax.devices("cpu")[0], 64, jnp.bfloat16)


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    attention._log_choice.cache_clear()
    with caplog.at_level("INFO", "xl2jax"):
        for _ in range(2):
            assert choose_attention("auto", jax.devices("cpu")[0], 64, jnp.bfloat16) == Attention("blockwise")
    assert caplog.text.count("arena attention: blockwise (auto on cpu)") == 1


def test_blocks_visited_are_the_live_ones() -> None:
    """A chunk of visual tokens late in a long video reads the globals and its window, and no blocks between them."""
    layout = VideoLayout(5, (3,) * 40, 16)
    tokens = natural_ranges(layout, 0, 256, PrefillConfig(2, 1))
    last = tokens.ranges.select(tokens.slot >= 256 + 38 * 16)
    a, b, c = (int(x) for x in blockwise.live_blocks(jax.tree.map(jnp.asarray, last), 16))
    assert a == ceil_div(layout.global_tokens, 16)
    assert (b, c) == ((256 + 36 * 16) // 16, (256 + 40 * 16) // 16)


def test_no_array_of_queries_times_slots() -> None:
    """Temporaries of the blockwise op do not grow with the slots."""

    def temporaries(slots: int) -> int:
        shape = jax.ShapeDtypeStruct
        q, kv = shape((1, 64, 4, 16), jnp.float32), shape((2, 2, slots, 16), jnp.float32)
        rows, ranges = shape((1,), jnp.int32), Ranges(*[shape((1, 64), jnp.int32)] * 3)
        compiled = jax.jit(attend_blockwise).lower(q, Source(kv, kv, rows, ranges)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(80_000) == temporaries(8_000)


@pytest.mark.parametrize(
    "shape", [pytest.param({"t": 20, "s": 77}, marks=pytest.mark.slow), {"t": 9, "s": 40, "batch": 3, "rows": 2}]
)
def test_gradients_are_those_of_the_reference(shape: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients through out and lse agree with autodiff of the reference. Batch rows may share a row of the arena."""
    monkeypatch.setattr(blockwise, "_tile_sizes", lambda queries, slots: (8, 16))
    q, k, v, *rest = jax.tree.map(jnp.asarray, problem(5, **shape))
    weights = jax.random.normal(jax.random.key(0), q.shape)

    def loss(attend, q, k, v):
        out, lse = attend(q, Source(k, v, *rest))
        seen = lse > NEGATIVE / 2
        return jnp.sum(out * weights) + jnp.sum(jnp.where(seen, jnp.sin(lse), 0.0))

    expected = jax.grad(lambda *a: loss(attend_reference, *a), (0, 1, 2))(q, k, v)
    actual = jax.jit(jax.grad(lambda *a: loss(arena_attention, *a), (0, 1, 2)))(q, k, v)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, 1e-5)


@pytest.mark.slow
def test_gradients_of_two_sources_are_those_of_one() -> None:
    """The slots of one source in two halves: out, lse and all gradients are the same."""
    q, k, v, rows, (g_end, v_lo, v_hi) = jax.tree.map(jnp.asarray, problem(6, t=12, s=64))
    nothing = g_end * 0
    ranges = (Ranges(g_end // 2, v_lo, v_lo), Ranges(nothing, jnp.maximum(v_lo, 32) - 32, v_hi - 32))
    halves = slice(None, 32), slice(32, None)
    weights = jax.random.normal(jax.random.key(0), q.shape)
    whole = Ranges(g_end // 2, jnp.maximum(v_lo, 32), v_hi)

    def loss(split: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        sources = [Source(k, v, rows, whole)]
        if split:
            sources = [Source(k[:, :, at], v[:, :, at], rows, r) for at, r in zip(halves, ranges, strict=True)]
        out, lse = arena_attention(q, *sources)
        return jnp.sum(out * weights) + jnp.sum(jnp.where(lse > NEGATIVE / 2, jnp.sin(lse), 0.0))

    for one, two in zip(
        *(jax.value_and_grad(functools.partial(loss, s), (0, 1, 2))(q, k, v) for s in (False, True)), strict=True
    ):
        jax.tree.map(lambda a, b: close(a, b, 1e-5), two, one)


def test_8_bits_have_no_gradient() -> None:
    q, k, v, *rest = jax.tree.map(jnp.asarray, problem(7, t=4, s=16))
    source = Source(quantize(k), quantize(v), *rest)
    assert np.isfinite(arena_attention(q, source)[0]).all()
    with pytest.raises(UserError, match="no gradient"):
        jax.grad(lambda q: arena_attention(q, source)[0].sum())(q)


def test_what_is_not_finite_is_not_hidden() -> None:
    q, k, v, rows, (g_end, v_lo, _) = problem(8, t=3, s=16, rows=1)
    k[:, :, 12] = np.nan
    out, lse = attend("blockwise", q, k, v, rows, Ranges(np.full_like(g_end, 12), v_lo, v_lo))
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    out, lse = attend("blockwise", q, k, v, rows, Ranges(np.full_like(g_end, 13), v_lo, v_lo))
    assert np.isnan(out).all()
    assert np.isnan(lse).all()
