"""Attention of packed rows: each sample gets what it gets alone, and the layout that cuDNN reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xl2jax.ops.dense import dense_attention
from xl2jax.ops.packed import cudnn_layout, packed_attention, sample_starts

ROWS = st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=3, max_size=3)


def padded(rows: list[list[int]], samples: int = 4) -> np.ndarray:
    return np.array([row + [0] * (samples - len(row)) for row in rows], np.int32)


@settings(deadline=None)  # the first example compiles
@given(ROWS)
def test_every_token_knows_the_start_of_its_sample(rows: list[list[int]]) -> None:
    starts = np.asarray(sample_starts(jnp.asarray(padded(rows)), 40))
    for row, got in zip(rows, starts, strict=True):
        lengths = [*row, 40 - sum(row)]
        assert got.tolist() == np.repeat(np.cumsum(lengths) - lengths, lengths).tolist()


@settings(deadline=None)  # the first example compiles
@given(ROWS)
def test_cudnn_gets_the_samples_and_the_padding(rows: list[list[int]]) -> None:
    lengths, offsets = (np.asarray(x) for x in cudnn_layout(jnp.asarray(padded(rows)), 36))
    for row, got, starts in zip(rows, lengths, offsets, strict=True):
        whole = [*row, *([36 - sum(row)] if sum(row) < 36 else [])]
        assert got[got >= 0].tolist() == whole
        # JAX joins the starts of all rows, so that there is one for each length and none for the end.
        assert starts[starts >= 0].tolist() == (np.cumsum(whole) - whole).tolist()
        assert starts[-1] == -1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[[7, 12, 3], []], [[1, 1], [24]]])
def test_samples_do_not_see_each_other(rows: list[list[int]]) -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(rng.standard_normal((len(rows), 24, n, 8))) for n in (4, 2, 2, 4)]
        check_samples(rows, *arrays)


def check_samples(rows: list[list[int]], q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> None:

    def packed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, jnp.asarray(padded(rows)))

    def alone(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        parts = [np.split(np.arange(24), np.cumsum(row)) for row in rows]
        return jnp.stack([
            jnp.concatenate([
                dense_attention(*(x[b : b + 1, at] for x in (q, k, v)), causal=True)[0] for at in part if len(at)
            ])
            for b, part in enumerate(parts)
        ])  # fmt: skip

    out, pullback = jax.vjp(packed, q, k, v)
    expected, expected_pullback = jax.vjp(alone, q, k, v)
    for a, b in zip((out, *pullback(d_out)), (expected, *expected_pullback(d_out)), strict=True):
        assert np.allclose(a, b, rtol=0, atol=1e-13)
