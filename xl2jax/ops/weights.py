"""Matrices in 8 or 4 bits. `xl2jax.ops.quantized_product` multiplies with them.

A matrix is stored as [m, n], outputs first: one row's product then is a multiply and a sum over the last axis, which
XLA does in one pass over the codes.

int8    one code a byte and a float32 scale for each output: `codes * scale`
int4    two codes a byte; each group of 128 inputs of an output has a scale and a zero point: `(codes - zero) * scale`
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from xl2jax.config import Weights
from xl2jax.ops.precision import accumulator
from xl2jax.ops.split import look_up

GROUP = 128
"""Inputs that share a scale and a zero point in 4 bits. Where it does not divide n, their greatest common divisor does."""


class QuantizedMatrix(NamedTuple):
    """A matrix [m, n] in 8 or 4 bits; any axes before m stack matrices. Arrays of JAX or of NumPy."""

    codes: jax.Array
    """int8 [m, n]; or uint8 [m, n / 2]. There byte b of a group holds the code of its input b in the lower 4 bits, and
    that of input `group / 2 + b` in the upper ones."""
    scale: jax.Array
    """float32 [m]; or bfloat16 [m, n / group]"""
    zero: jax.Array | None = None
    """None; or uint8 [m, n / group], from 0 to 15."""


def group_size(n: int) -> int:
    """The number of inputs that share a scale in 4 bits."""
    return math.gcd(n, GROUP)


def part_shapes(m: int, n: int, weights: Weights) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the fields of a `QuantizedMatrix` [m, n] that are not None."""
    if weights == "int8":
        return {"codes": jax.ShapeDtypeStruct((m, n), jnp.int8), "scale": jax.ShapeDtypeStruct((m,), jnp.float32)}
    if n % 2:
        raise ValueError(f"4 bits need an even number of inputs, not {n}")
    groups = n // group_size(n)
    return {
        "codes": jax.ShapeDtypeStruct((m, n // 2), jnp.uint8),
        "scale": jax.ShapeDtypeStruct((m, groups), jnp.bfloat16),
        "zero": jax.ShapeDtypeStruct((m, groups), jnp.uint8),
    }


def quantize(matrix: np.ndarray, weights: Weights) -> QuantizedMatrix:
    """Rounds a finite matrix [m, n] to nearest, on the host. The error of an element is at most half its scale.

    int8 is symmetric: the largest magnitude of an output becomes 127. int4 covers the range of a group and 0.
    """
    x = np.asarray(matrix, np.float32)
    if weights == "int8":
        scale = np.abs(x).max(axis=1) / np.float32(127)
        steps = x / np.where(scale == 0, np.float32(1), scale)[:, None]
        return _on_host(np.clip(np.rint(steps), -127, 127).astype(np.int8), scale)
    m, n = x.shape
    size = group_size(n)
    x = x.reshape(m, n // size, size)
    low, high = np.minimum(x.min(axis=2), 0), np.maximum(x.max(axis=2), 0)
    # bfloat16 rounds by at most 2**-9 of the number. The scale must not become smaller than the range needs.
    scale = ((high - low) * np.float32((1 + 2**-8) / 15)).astype(ml_dtypes.bfloat16)
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    zero = np.rint(-low / divisor)
    codes = np.clip(np.rint(x / divisor[:, :, None]) + zero[:, :, None], 0, 15).astype(np.uint8)
    first, second = codes[:, :, : size // 2], codes[:, :, size // 2 :]
    return _on_host((first | second << 4).reshape(m, n // 2), scale, zero.astype(np.uint8))


def _on_host(*parts: np.ndarray) -> QuantizedMatrix:
    return QuantizedMatrix(*parts)  # type: ignore[arg-type]


def dequantize(matrix: QuantizedMatrix) -> np.ndarray:
    """The float32 matrix [m, n] of arrays on the host."""
    codes, scale = np.asarray(matrix.codes), np.asarray(matrix.scale).astype(np.float32)
    if matrix.zero is None:
        return codes.astype(np.float32) * scale[:, None]
    m, groups = scale.shape
    packed = codes.reshape(m, groups, -1)
    steps = np.concatenate([packed & 15, packed >> 4], axis=2).astype(np.float32) - np.asarray(matrix.zero)[:, :, None]
    return (steps * scale[:, :, None]).reshape(m, -1)


def _halves(matrix: QuantizedMatrix, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """The first and the second half of every group of a matrix in 4 bits, [m, groups, group / 2] each."""
    assert matrix.zero is not None
    packed = matrix.codes.reshape(*matrix.scale.shape, -1)
    scale, zero = matrix.scale.astype(dtype)[..., None], matrix.zero.astype(dtype)[..., None]
    return ((packed & 15).astype(dtype) - zero) * scale, ((packed >> 4).astype(dtype) - zero) * scale


def unpack(matrix: QuantizedMatrix, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrix [m, n], computed in the `accumulator` of `dtype` and rounded to `dtype`."""
    wide = accumulator(dtype)
    if matrix.zero is None:
        return (matrix.codes.astype(wide) * matrix.scale.astype(wide)[..., None]).astype(dtype)
    both = jnp.concatenate([half.astype(dtype) for half in _halves(matrix, wide)], axis=-1)
    return both.reshape(*both.shape[:-2], -1)


def lookup(matrix: QuantizedMatrix, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The rows [..., n] of a matrix [m, n] at integer ids [...], in `dtype`."""
    return look_up(lambda matrix, ids: unpack(jax.tree.map(lambda part: part[ids], matrix), dtype), matrix, ids)
