"""The dtype of statistics, softmax, rotary positions and sums."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def accumulator(dtype: jax.typing.DTypeLike) -> np.dtype:
    """float32 for arrays of `dtype`; float64 for float64 (as in `verify --dtype float64`)."""
    return np.dtype(jnp.promote_types(dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum of two arrays of one dtype, summed and returned in the `accumulator` of that dtype.

    The backward pass rounds the gradient of the result to that dtype, so that its products are of one dtype too.
    """
    dtype = accumulator(a.dtype)

    def einsum(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, preferred_element_type=dtype)

    if a.dtype != jnp.float16:
        return einsum(a, b)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return einsum(a.astype(dtype), b.astype(dtype))

    # XLA has no float16 product with float32 sums on CPUs.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=einsum)


def _product_forward(spec: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(spec, a, b), (a, b)


def _product_backward(
    spec: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, pullback = jax.vjp(functools.partial(jnp.einsum, spec), *operands)
    d_a, d_b = pullback(gradient.astype(operands[0].dtype))
    return d_a, d_b


product.defvjp(_product_forward, _product_backward)


def gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
    """The GELU activation, by tanh or exactly."""
    if x.dtype == jnp.float64:
        # cuBLAS would compute it together with the product before it, but not to float64.
        x = jax.lax.optimization_barrier(x)
    return jax.nn.gelu(x, approximate=approximate)
