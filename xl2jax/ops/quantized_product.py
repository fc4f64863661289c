"""Products with matrices in 8 or 4 bits: by a kernel for a few rows on a GPU, else by XLA."""

from __future__ import annotations

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from xl2jax.ops.attention import MMA_CARDS
from xl2jax.ops.dense import cuda_capability
from xl2jax.ops.precision import accumulator, product
from xl2jax.ops.split import TENSOR, on_parts, part_of, splits
from xl2jax.ops.weights import QuantizedMatrix, unpack

logger = logging.getLogger(__name__)

KERNEL_ROWS = 16
"""Rows that the kernel multiplies at most (`matvec.MAX_ROWS`, which is slow to import)."""
FEW_ROWS = 3
"""Up to so many rows are multiplied with the codes themselves. Every row is a pass over the codes, and unpacking the
matrix costs as much as about four."""


def multiply(
    x: jax.Array,
    matrices: tuple[QuantizedMatrix, ...],
    dtype: jax.typing.DTypeLike | None = None,
    *,
    sums_parts: bool = False,
) -> tuple[jax.Array, ...]:
    """x [..., n] times each of the transposed matrices [m, n]: [..., m] in `dtype`, by default that of x.

    On the NVIDIA GPUs of `MMA_CARDS` a kernel multiplies up to 16 rows of 16 bits with all of them (xl2jax.ops.matvec),
    where the sizes of the matrices fit it; it has no gradient. XLA multiplies everything else. Sums have the
    `accumulator` of x's dtype.

    Where matrices are split over devices (`xl2jax.ops.split`), each multiplies with its own part: of the outputs, or
    with `sums_parts` of the inputs.
    """
    dtype = np.dtype(x.dtype if dtype is None else dtype)
    count = splits()
    if count == 1 or (not sums_parts and any(matrix.codes.shape[-2] % count for matrix in matrices)):
        return _multiply(x, matrices, dtype)
    behind = x.ndim - 1
    if not sums_parts:
        spec = (QuantizedMatrix(*[part_of(0)] * 3),) * len(matrices)  # type: ignore[arg-type]
        run = on_parts(functools.partial(_multiply, dtype=dtype), (PartitionSpec(), spec), part_of(behind))
        return run(x, matrices)

    # Many rows are summed in their own dtype, as XLA sums those of plain matrices: half the bytes are exchanged.
    exchanged = np.dtype(accumulator(x.dtype)) if math.prod(x.shape[:-1]) <= KERNEL_ROWS else dtype

    def summed(x: jax.Array, matrices: tuple[QuantizedMatrix, ...]) -> tuple[jax.Array, ...]:
        parts = _multiply(x, matrices, exchanged)
        return tuple(out.astype(dtype) for out in jax.lax.psum(parts, TENSOR))

    of_scale = PartitionSpec() if matrices[0].zero is None else part_of(1)
    spec = (QuantizedMatrix(part_of(1), of_scale, of_scale),) * len(matrices)  # type: ignore[arg-type]
    return on_parts(summed, (part_of(behind), spec), PartitionSpec())(x, matrices)


def _multiply(x: jax.Array, matrices: tuple[QuantizedMatrix, ...], dtype: np.dtype) -> tuple[jax.Array, ...]:
    """`multiply` on one device."""
    rows, capability = math.prod(x.shape[:-1]), cuda_capability()
    xla = functools.partial(_by_xla, dtype)
    if capability is not None and ".".join(map(str, capability)) in MMA_CARDS and rows <= KERNEL_ROWS:
        from xl2jax.ops.matvec import supports  # Pallas is slow to import

        if all(supports(rows, matrix, x.dtype) for matrix in matrices):
            kernel = functools.partial(_by_kernel, dtype)
            return jax.lax.platform_dependent(x, matrices, cuda=kernel, default=xla)
        _log_xla(x.dtype.name, tuple(matrix.codes.shape[-2:] for matrix in matrices))
    return xla(x, matrices)


@functools.cache
def _log_xla(dtype: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Says once, on a GPU that has the kernel, that it does not fit."""
    logger.info("few %s rows times codes of %s: XLA, since the kernel does not fit", dtype, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _by_kernel(dtype: np.dtype, x: jax.Array, matrices: tuple[QuantizedMatrix, ...]) -> tuple[jax.Array, ...]:
    """The kernel as a function of its own, so that unrolled layers trace and lower it once."""
    from xl2jax.ops.matvec import multiply_rows

    outs = multiply_rows(x.reshape(-1, x.shape[-1]), matrices)
    return tuple(out.reshape(*x.shape[:-1], -1).astype(dtype) for out in outs)


def _by_xla(dtype: np.dtype, x: jax.Array, matrices: tuple[QuantizedMatrix, ...]) -> tuple[jax.Array, ...]:
    few = math.prod(x.shape[:-1]) <= FEW_ROWS

    def multiplied(matrix: QuantizedMatrix) -> jax.Array:
        if few:
            return multiply_codes(x, matrix).astype(dtype)
        whole = unpack(matrix, x.dtype)
        if dtype == x.dtype:
            return jnp.einsum("...n,mn->...m", x, whole)
        return product("...n,mn->...m", x, whole).astype(dtype)

    return tuple(map(multiplied, matrices))


def multiply_codes(x: jax.Array, matrix: QuantizedMatrix) -> jax.Array:
    """x [..., n] times the transposed matrix, row by row and without a copy of it, in the `accumulator` of x's dtype."""
    wide = accumulator(x.dtype)
    rows = x.astype(wide)[..., None, :]
    if matrix.zero is None:
        return jnp.sum(rows * matrix.codes.astype(wide), axis=-1) * matrix.scale.astype(wide)
    # Each group is summed over its codes alone, so that scale and zero point cost once a group.
    packed = matrix.codes.reshape(*matrix.scale.shape, -1).astype(jnp.int32)
    halves = rows.reshape(*rows.shape[:-1], matrix.scale.shape[-1], 2, -1)
    terms = (packed & 15).astype(wide) * halves[..., 0, :] + (packed >> 4).astype(wide) * halves[..., 1, :]
    groups = jnp.sum(terms, axis=-1) - matrix.zero.astype(wide) * jnp.sum(halves, axis=(-2, -1))
    return jnp.sum(groups * matrix.scale.astype(wide), axis=-1)
