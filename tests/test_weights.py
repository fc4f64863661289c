"""Matrices in 8 and 4 bits: rounding, products, and whole models against float64 models of the unpacked matrices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from xl2jax.checkpoint.params import ParamReader, load_params
from xl2jax.config import PRESETS, VideoXL2Config, Weights
from xl2jax.models.param_tree import cast, flatten, unflatten
from xl2jax.models.qwen2 import Qwen2
from xl2jax.models.video_xl2 import VideoXL2, abstract_model
from xl2jax.ops.quantized_product import FEW_ROWS, multiply
from xl2jax.ops.weights import (
    QuantizedMatrix,
    dequantize,
    group_size,
    lookup,
    part_shapes,
    quantize,
    unpack,
)

KINDS: tuple[Weights, ...] = ("int8", "int4")


def random_matrix(m: int, n: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    """Rows and columns of very different sizes, a row of zeros and a row of one sign."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, n)) * np.exp(rng.uniform(-spread, spread, (m, 1)) + rng.uniform(-1, 1, (1, n)))
    x[0] = 0
    x[-1] = np.abs(x[-1]) + 1
    return x.astype(np.float32)


@pytest.mark.parametrize("weights", KINDS)
@settings(deadline=None, max_examples=60)
@given(st.integers(2, 6), st.integers(1, 5), st.sampled_from([2, 6, 16, 64, 128]), st.integers(0, 1000))
def test_errors_are_at_most_half_a_scale(weights: Weights, m: int, groups: int, size: int, seed: int) -> None:
    x = random_matrix(m, groups * size, seed)
    q = quantize(x, weights)
    scale = np.asarray(q.scale).astype(np.float32)
    if weights == "int4":
        scale = np.repeat(scale, group_size(groups * size), axis=1)
    else:
        scale = scale[:, None]
        assert np.abs(np.asarray(q.codes)).max() <= 127
    # Dividing, and multiplying again, rounds float32 by a few units of the last place of the number.
    room = scale / 2 + 4 * np.finfo(np.float32).eps * np.abs(x)
    assert (np.abs(dequantize(q) - x) <= room).all()
    expected = part_shapes(m, groups * size, weights)
    assert {f: (p.shape, p.dtype) for f, p in q._asdict().items() if p is not None} == {
        f: (s.shape, s.dtype) for f, s in expected.items()
    }


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 10, 128]), st.integers(0, 1000))
def test_four_bits_are_packed_and_unpacked_in_place(m: int, groups: int, size: int, seed: int) -> None:
    """A matrix of whole steps is exact, whatever the codes: each code comes back at its own place."""
    rng = np.random.default_rng(seed)
    n = groups * size
    steps = rng.integers(0, 16, (m, n)).reshape(m, -1, group_size(n))
    steps[..., 0], steps[..., -1] = 0, 15
    x = (steps - 5.0).reshape(m, n).astype(np.float32)
    q = quantize(x, "int4")
    # The scale is a little above 1, because it is rounded up; codes and zero points are those of a scale of 1.
    halves = np.asarray(q.codes).reshape(m, -1, group_size(n) // 2)
    assert np.array_equal(np.concatenate([halves & 15, halves >> 4], axis=2), steps)
    assert np.array_equal(unpack(jax.tree.map(jnp.asarray, q), jnp.float32), dequantize(q))


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("rows", [(), (1,), (2, 1), (FEW_ROWS + 1,), (3, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_products_agree_with_float64(weights: Weights, rows: tuple[int, ...], dtype: str) -> None:
    """Both ways of multiplying. The error of a sum is bounded by the sum of the magnitudes of its terms."""
    m, n = 40, 256
    with jax.enable_x64(dtype == "float64"):
        q = jax.tree.map(jnp.asarray, quantize(random_matrix(m, n, spread=1.0), weights))
        x = jnp.asarray(np.random.default_rng(1).standard_normal((*rows, n)), dtype)
        whole = dequantize(q).astype(np.float64)
        if weights == "int4":  # dequantize rounds the product of scale and code to float32
            whole = np.asarray(unpack(q, "float32"), np.float64)
        exact = np.asarray(x, np.float64) @ whole.T
        terms = np.abs(np.asarray(x, np.float64)) @ np.abs(whole.T)
        eps = max(float(jnp.finfo(dtype).eps), float(np.finfo(np.float32).eps))
        # The unpacked matrix and the result are rounded to `dtype`, and n terms are added in float32.
        assert multiply(x, (q,))[0].dtype == dtype
        assert (np.abs(np.asarray(multiply(x, (q,))[0], np.float64) - exact) <= 4 * eps * terms + 1e-30).all()
        wide = multiply(x, (q,), "float64" if dtype == "float64" else "float32")[0]
        assert (np.abs(np.asarray(wide, np.float64) - exact) <= 4 * eps * terms + 1e-30).all()
        ids = jnp.array([[3, 0], [m - 1, 3]])
        assert np.array_equal(lookup(q, ids, dtype), unpack(q, dtype)[ids])


def quantized_model(config: VideoXL2Config, weights: Weights) -> tuple[nnx.State, nnx.State]:
    """Parameters in 8 or 4 bits, and those of the ordinary model that they stand for, float64."""
    quantized = config.with_weights(weights)
    flat = flatten(nnx.state(VideoXL2(quantized, rngs=nnx.Rngs(0))))
    # Codes that are not only random: scales differ by output.
    rng = np.random.default_rng(0)
    flat = {
        n: (p * jnp.asarray(np.exp(rng.uniform(-0.5, 0.5, p.shape)), p.dtype)) if n.endswith("codes_scale") else p
        for n, p in flat.items()
    }
    plain = {}
    for name in flatten(nnx.state(abstract_model(config, jnp.float32))):
        base, _, last = name.rpartition(".")
        if f"{base}.codes" in flat and last in ("kernel", "embedding"):
            matrix = QuantizedMatrix(flat[f"{base}.codes"], flat[f"{base}.codes_scale"], flat.get(f"{base}.codes_zero"))
            whole = unpack(matrix, jnp.float64)
            plain[name] = jnp.swapaxes(whole, -1, -2) if last == "kernel" else whole
        else:
            plain[name] = flat[name].astype(jnp.float64)
    return unflatten(flat, quantized), unflatten(plain, config)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", KINDS)
def test_a_quantised_llm_is_its_unpacked_one(weights: Weights, tied: bool) -> None:
    """In float64, so that nothing but the format is compared: many rows, and one row, as in decoding."""
    config = PRESETS["tiny"]
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, tied_embeddings=tied))
    ids = jnp.arange(3, 12)

    def run(config: VideoXL2Config, params: nnx.State, ids: jax.Array) -> jax.Array:
        llm: Qwen2 = nnx.merge(nnx.graphdef(abstract_model(config, jnp.float64)), params).llm

        def attend(state: None, _: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
            mixed = (k + v).sum(axis=-3, keepdims=True)
            return state, q + jnp.repeat(mixed, q.shape[-2] // k.shape[-2], axis=-2)

        hidden, _ = llm.forward(llm.embed_tokens(ids), jnp.arange(len(ids)), attend, None)
        return llm.logits(hidden)

    with jax.enable_x64(True):
        quantized, plain = quantized_model(config, weights)
        for chosen in (ids, ids[:1]):
            actual = run(config.with_weights(weights), cast(quantized, jnp.float64), chosen)
            expected = run(config, plain, chosen)
            assert actual.dtype == jnp.float64
            assert float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)) < 1e-12


def test_casting_leaves_quantised_matrices_alone() -> None:
    config = PRESETS["tiny"].with_weights("int4")
    abstract = nnx.state(abstract_model(config, jnp.float32))
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract)
    before, after = flatten(params), flatten(cast(params, jnp.bfloat16))
    kept = {n for n in after if after[n].dtype == before[n].dtype}
    assert kept == {n for n in after if ".codes" in n}
    assert {n.rpartition(".")[2] for n in kept} == {"codes", "codes_scale", "codes_zero"}


@pytest.mark.parametrize("weights", KINDS)
def test_quantising_while_reading_equals_quantising_the_whole(checkpoint: Path, weights: Weights) -> None:
    """Layer by layer, from the stored numbers, whatever the dtype of the other parameters."""
    plain = {n: np.asarray(p) for n, p in flatten(load_params(checkpoint)[1]).items()}
    config, params = load_params(checkpoint, "bfloat16", weights)
    assert config.llm.weights == weights
    flat = flatten(params)
    assert {str(p.dtype) for n, p in flat.items() if ".codes" not in n} == {"bfloat16"}
    for name, whole in plain.items():
        base, _, last = name.rpartition(".")
        if f"{base}.codes" not in flat or last == "bias":
            assert np.array_equal(flat[name], whole.astype(jnp.bfloat16)), name
            continue
        kind = weights if ".layers." in name else "int8"
        matrices = whole.swapaxes(-1, -2) if last == "kernel" else whole
        for i, matrix in enumerate(matrices if matrices.ndim == 3 else [matrices]):
            for field, part in quantize(matrix, kind)._asdict().items():
                if part is not None:
                    actual = flat[f"{base}.codes" if field == "codes" else f"{base}.codes_{field}"]
                    assert np.array_equal(actual[i] if matrices.ndim == 3 else actual, part), (name, field)


def test_a_reader_unpacks_what_it_quantised(checkpoint: Path) -> None:
    plain = ParamReader(checkpoint, "float32")
    reader = ParamReader(checkpoint, "float32", "int8")
    for name in plain.names:
        whole, unpacked = plain.read(name), reader.plain(name)
        assert unpacked.shape == whole.shape
        quantized = name not in reader.names
        # Half a scale, and a scale is at most a 127th of the largest element.
        assert np.abs(unpacked - whole).max() <= (np.abs(whole).max() / 254 * 1.001 if quantized else 0), name
