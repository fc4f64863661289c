"""Dense attention within a batch row: the vision tower, DTS, training.

cuDNN or XLA computes it. The choice is made when a program is lowered for a platform, not when it is traced, so that the
same function also works under `jax.default_device(cpu)` on a machine with a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import einops
import jax
import jax.numpy as jnp


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """Scaled dot-product attention. q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

    N is a multiple of K (GQA). The softmax is float32 (float64 for float64). On NVIDIA GPUs cuDNN computes 16-bit
    arrays whose head width is a multiple of 8 up to 128; XLA computes everything else.
    With `causal`, a query at t sees the keys up to t.
    """
    if q.dtype == jnp.float64:
        return _float64(q, k, v, causal=causal)

    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if not causal and (q.shape[1] % 2 or k.shape[1] % 2):
            return _odd_lengths(q, k, v)
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")

    def xla(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # XLA on CPUs has no product of float16 arrays that is summed in float32.
        dtype = jnp.float32 if q.dtype == jnp.float16 else q.dtype
        q_, k_, v_ = (x.astype(dtype) for x in (q, k, v))
        out = jax.nn.dot_product_attention(q_, k_, v_, is_causal=causal, implementation="xla")
        return out.astype(q.dtype)

    if runs_in_cudnn(q) and cuda_capability() is not None:
        return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=xla)
    return xla(q, k, v)


def runs_in_cudnn(q: jax.Array) -> bool:
    """Whether cuDNN has attention for the dtype and the head width of q [..., H]."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


@functools.cache
def cuda_capability() -> tuple[int, ...] | None:
    """The compute capability of this process's NVIDIA GPU. Without one, JAX cannot even trace cuDNN's attention."""
    try:
        return tuple(int(x) for x in str(jax.local_devices(backend="cuda")[0].compute_capability).split("."))
    except RuntimeError:  # JAX knows no such platform
        return None


def _float64(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """Attention in float64. jax.nn.dot_product_attention computes the softmax in float32 for every dtype."""
    kv_heads = k.shape[2]
    queries = einops.rearrange(q, "b t (k g) h -> b t k g h", k=kv_heads)
    scores = jnp.einsum("btkgh,bskh->bkgts", queries, k) * q.shape[-1] ** -0.5
    seen = jnp.tri(q.shape[1], k.shape[1], dtype=bool) if causal else jnp.ones((1, 1), bool)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return einops.rearrange(jnp.einsum("bkgts,bskh->btkgh", weights, v), "b t k g h -> b t (k g) h")


@jax.custom_vjp
def _odd_lengths(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's attention for odd lengths (a frame has 729 patches), of which it lacks the gradient."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def padded_attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: Literal["cudnn", "xla"]) -> jax.Array:
    """Attention with lengths padded to even numbers. The padding is neither seen nor returned."""

    def even(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    query_lengths, key_lengths = (jnp.full(q.shape[0], x.shape[1], jnp.int32) for x in (q, k))
    out = jax.nn.dot_product_attention(
        even(q),
        even(k),
        even(v),
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation=implementation,
    )
    return out[:, : q.shape[1]]


type _Pullback = Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def _odd_lengths_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, _Pullback]:
    return jax.vjp(lambda q, k, v: padded_attention(q, k, v, "cudnn"), q, k, v)


def _odd_lengths_backward(pullback: _Pullback, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return pullback(gradient)


_odd_lengths.defvjp(_odd_lengths_forward, _odd_lengths_backward)
