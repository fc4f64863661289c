"""Products of a few tokens with the released model's MLP matrices in 16, 8 and 4 bits, as in decoding."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from xl2jax.bench.kernels import MAX_ERROR, seconds
from xl2jax.config import PRESETS, Weights
from xl2jax.errors import UserError
from xl2jax.ops.quantized_product import multiply
from xl2jax.ops.weights import QuantizedMatrix, part_shapes, unpack

_LLM = PRESETS["video-xl-2"].llm
_PAIRS = 8  # so many layers do not fit a card's cache


def _random_matrix(seed: int, m: int, n: int, weights: Weights | None) -> jax.Array | QuantizedMatrix:
    """A matrix [m, n] whose values have about the size of n**-0.5. Scales and zero points differ."""
    key, of_scale, of_zero = jax.random.split(jax.random.key(seed), 3)
    if weights is None:
        return jax.random.normal(key, (m, n), jnp.bfloat16) * jnp.bfloat16(n**-0.5)
    shapes = part_shapes(m, n, weights)
    codes, scale = shapes["codes"], shapes["scale"]
    bits = jax.random.bits(key, codes.shape, jnp.uint8)
    # The standard deviation of codes that are spread evenly, in 4 bits minus a zero point that is too.
    spread = 0.29 * 256 if weights == "int8" else 0.41 * 16
    scales = jax.random.uniform(of_scale, scale.shape, jnp.float32, 0.5, 1.3) / (spread * n**0.5)
    zero = jax.random.bits(of_zero, shapes["zero"].shape, jnp.uint8) % 16 if "zero" in shapes else None
    return QuantizedMatrix(jax.lax.bitcast_convert_type(bits, codes.dtype), scales.astype(scale.dtype), zero)


def _product(x: jax.Array, matrix: jax.Array | QuantizedMatrix) -> jax.Array:
    return multiply(x, (matrix,))[0] if isinstance(matrix, QuantizedMatrix) else x @ matrix.T


def _largest_error(x: jax.Array, *matrices: jax.Array | QuantizedMatrix) -> float:
    """The relative L2 against float32 of the products with matrices that are multiplied together, as gate and up are."""
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    got = jax.jit(multiply)(x, tuple(quantized)) if quantized else tuple(_product(x, matrix) for matrix in matrices)
    errors = []
    for out, matrix in zip(got, matrices, strict=True):
        whole = unpack(matrix, jnp.float32) if isinstance(matrix, QuantizedMatrix) else matrix.astype(jnp.float32)
        expected = jnp.matmul(x.astype(jnp.float32), whole.T, precision="highest")
        errors.append(float(jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)))
    return max(errors)


def matrix_rows(copy_gb_s: float, width: int = _LLM.width, mlp_width: int = _LLM.mlp_width) -> Iterator[dict[str, Any]]:
    """Yields, for 1 and 16 tokens and each number of bits, the time of one product and the bytes read a second.

    Raises UserError where the result differs from float32 by more than `MAX_ERROR`.
    """
    kinds: tuple[Weights | None, ...] = (None, "int8", "int4")
    for weights in kinds:
        make = jax.jit(functools.partial(_random_matrix, weights=weights), static_argnums=(0, 1, 2))
        pairs = [(make(2 * i, mlp_width, width), make(2 * i + 1, width, mlp_width)) for i in range(_PAIRS)]
        size = sum(x.nbytes for x in jax.tree.leaves(pairs)) / (2 * _PAIRS)
        for tokens in (1, 16):
            x = jax.random.normal(jax.random.key(99), (tokens, width), jnp.bfloat16)
            error = _largest_error(x, pairs[0][0], pairs[1 % _PAIRS][0])
            if not error < MAX_ERROR:
                raise UserError(f"products with {weights} weights are wrong on this card: relative L2 {error:.2g}")

            def layers(x: jax.Array, pairs: Any) -> jax.Array:
                for up, down in pairs:
                    x = _product(_product(x, up), down)
                return x

            taken = seconds(layers, x, pairs) / (2 * _PAIRS)
            rate = size / taken / 1e9
            yield {
                "op": "matrix",
                "weights": weights or "bfloat16",
                "tokens": tokens,
                "relative_l2": error,
                "us": 1e6 * taken,
                "gb_s": rate,
                "of_ceiling": rate / copy_gb_s,
            }
