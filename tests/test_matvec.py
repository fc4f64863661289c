"""The kernel that multiplies a few rows with quantised matrices, without a GPU: results, races and lowering."""

from __future__ import annotations

import jax
import jax.experimental.mosaic.gpu.utils as mosaic_utils
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from xl2jax.config import PRESETS, Weights
from xl2jax.ops.matvec import multiply_rows, supports
from xl2jax.ops.weights import QuantizedMatrix, dequantize, part_shapes, quantize


@pytest.mark.parametrize(("weights", "rows", "m", "n"), [("int8", 1, (128, 64), 512), ("int4", 11, (64,), 1024)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_equal_those_of_the_numbers(
    weights: Weights, rows: int, m: tuple[int, ...], n: int, dtype: str
) -> None:
    """The kernel multiplies codes exactly and sums in float32. The reference has float64."""
    rng = np.random.default_rng(0)
    matrices = [quantize(rng.standard_normal((m, n)) * rng.uniform(0.1, 3, (m, 1)), weights) for m in m]
    x = jnp.asarray(rng.standard_normal((rows, n)), dtype)
    params = plgpu.InterpretGPUParams(detect_races=True)
    got = multiply_rows(x, tuple(QuantizedMatrix(*map(_maybe, matrix)) for matrix in matrices), interpret=params)
    for out, matrix in zip(got, matrices, strict=True):
        wide, numbers = np.asarray(x, np.float64), dequantize(matrix).astype(np.float64)
        # In 4 bits an offset of 128 (or 1024) is added to each code, and its part of the sum is taken away again. Errors
        # of sums in float32 add up like a random walk, so that 8 of its steps are hardly ever exceeded.
        scale = np.repeat(np.asarray(matrix.scale, np.float64), 128, 1) if weights == "int4" else 0
        offset = 0 if weights == "int8" else (128 if dtype == "bfloat16" else 1024)
        terms = np.abs(wide) @ (np.abs(numbers) + offset * scale).T
        bound = 8 * 2.0**-24 * terms
        assert (np.abs(np.asarray(out) - wide @ numbers.T) <= bound).all()
        assert out.dtype == np.float32
        # A zero point that is off by one in a single group would be noticed.
        if weights == "int4":
            assert (np.abs(wide[:, :128].sum(axis=1))[:, None] * scale[:, 0] > bound).mean() > 0.9


def _maybe(x: object) -> jax.Array | None:
    return None if x is None else jnp.asarray(x)


LLM = PRESETS["video-xl-2"].llm
MATRICES = [
    (LLM.kv_heads * LLM.head_width, LLM.width),
    (LLM.mlp_width, LLM.width),
    (LLM.width, LLM.mlp_width),
    (LLM.vocab, LLM.width),
]


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "12.0"])
def test_lowers_for_cuda_at_the_released_shapes(
    capability: str, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_utils, "_infer_arch", lambda: tuple(map(int, capability.split("."))))
    for m, n in MATRICES[:1] if capability != "8.0" else MATRICES:
        matrix = QuantizedMatrix(**part_shapes(m, n, weights))  # type: ignore[arg-type]
        for rows in (1, 16):
            assert supports(rows, matrix, "bfloat16")
            x = jax.ShapeDtypeStruct((rows, n), "bfloat16")
            run = jax.jit(
                lambda x, *matrices: multiply_rows(x, matrices)
            )  # another function each time, so that nothing is cached
            assert "mosaic_gpu" in run.trace(x, matrix, matrix).lower(lowering_platforms=("cuda",)).as_text()


def test_what_does_not_fit_is_left_to_xla() -> None:
    def matrix(m: int, n: int, weights: Weights = "int8") -> QuantizedMatrix:
        return QuantizedMatrix(**part_shapes(m, n, weights))  # type: ignore[arg-type]

    assert supports(16, matrix(64, 128), "float16")
    assert not supports(17, matrix(64, 256), "float16")
    assert not supports(1, matrix(64, 256), "float32")
    assert not supports(1, matrix(96, 256), "float16")
    assert not supports(1, matrix(64, 320), "float16")
    assert supports(1, matrix(64, 256, "int4"), "float16")
    assert not supports(1, matrix(64, 128, "int4"), "float16")
    assert not supports(1, matrix(64, 256 + 64, "int4"), "float16")
