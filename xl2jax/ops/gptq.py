"""Rounds a matrix to 4 bits so that its products with given inputs change least (GPTQ, arXiv 2210.17323).

Columns are rounded in turn. The error of each is made up for in the columns that are not rounded yet, by the second
moments of the inputs: what one input rounds away, others that move with it give back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xl2jax.ops.weights import QuantizedMatrix, group_size

_DAMPING = 0.01
"""Share of the mean second moment that is added to each, as in the paper."""


@jax.jit
def gptq(matrix: jax.Array, moments: jax.Array) -> QuantizedMatrix:
    """A float32 matrix [m, n] in 4 bits, in the format of `xl2jax.ops.weights.quantize`.

    Args:
      matrix: the matrix, outputs first.
      moments: float32 [n, n], X^T X of the inputs X [tokens, n].
    """
    m, n = matrix.shape
    size = group_size(n)
    with jax.default_matmul_precision("highest"):
        upper = _factor(moments)

        def group(whole: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
            block = jax.lax.dynamic_slice(whole, (0, first), (m, size))
            scale, zero = _grid(block)
            own = jax.lax.dynamic_slice(upper, (first, first), (size, size))

            def column(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                block, codes, errors = carry
                w = block[:, j]
                code = jnp.clip(jnp.round(w / jnp.where(scale == 0, 1, scale)) + zero, 0, 15)
                error = (w - (code - zero) * scale) / own[j, j]
                block = block - error[:, None] * jnp.where(jnp.arange(size) > j, own[j], 0)
                return block, codes.at[:, j].set(code.astype(jnp.uint8)), errors.at[:, j].set(error)

            start = (block, jnp.zeros((m, size), jnp.uint8), jnp.zeros((m, size), jnp.float32))
            _, codes, errors = jax.lax.fori_loop(jnp.int32(0), jnp.int32(size), column, start)
            rows = jax.lax.dynamic_slice(upper, (first, 0), (size, n))
            behind = jnp.where(jnp.arange(n) >= first + size, rows, 0)
            packed = codes[:, : size // 2] | codes[:, size // 2 :] << 4
            return whole - errors @ behind, (packed, scale, zero)

        firsts = jnp.arange(0, n, size, dtype=jnp.int32)
        _, (packed, scale, zero) = jax.lax.scan(group, matrix.astype(jnp.float32), firsts)
    codes = jnp.moveaxis(packed, 0, 1).reshape(m, n // 2)
    return QuantizedMatrix(codes, scale.T.astype(jnp.bfloat16), zero.T.astype(jnp.uint8))


def _factor(moments: jax.Array) -> jax.Array:
    """The upper Cholesky factor of the inverse of the damped moments."""
    diagonal = jnp.diagonal(moments)
    # An input that is always 0 has no say in the others.
    damped = moments + jnp.diag(jnp.where(diagonal == 0, 1.0, 0.0) + _DAMPING * jnp.mean(diagonal) + 1e-20)
    lower = jnp.linalg.cholesky(damped)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(len(moments), dtype=moments.dtype))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


def _grid(block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point [m] that cover the range of a group [m, size] and 0, as in `quantize`."""
    low, high = jnp.minimum(block.min(axis=1), 0), jnp.maximum(block.max(axis=1), 0)
    scale = ((high - low) * jnp.float32((1 + 2**-8) / 15)).astype(jnp.bfloat16).astype(jnp.float32)
    return scale, jnp.round(-low / jnp.where(scale == 0, 1, scale))
