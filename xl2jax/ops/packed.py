"""Causal attention within the samples of packed rows, for training. No mask of T x T is made."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp

from xl2jax.ops.attention import arena_attention
from xl2jax.ops.dense import cuda_capability, runs_in_cudnn
from xl2jax.ops.kv import Source
from xl2jax.ops.ranges import Ranges

logger = logging.getLogger(__name__)

MAX_CUDNN_SAMPLES = 8
"""Samples of a row up to which cuDNN is used. Its workspace is 0.2 GiB a sample for 8,192 tokens of the released model."""


def sample_starts(lengths: jax.Array, tokens: int) -> jax.Array:
    """For each token of packed rows, the first token of its sample. lengths [B, M] -> int32 [B, T], T = `tokens`.

    The tokens behind the last sample, which are padding, count as one more sample.
    """
    starts = jnp.cumsum(lengths, axis=1) - lengths
    candidates = jnp.concatenate([starts, jnp.sum(lengths, axis=1, keepdims=True)], axis=1)
    at = jnp.arange(tokens, dtype=jnp.int32)[None, :, None]
    return jnp.max(jnp.where(candidates[:, None] <= at, candidates[:, None], 0), axis=-1).astype(jnp.int32)


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Scaled dot-product attention. q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    A query sees the tokens of its sample up to itself. On NVIDIA GPUs of compute capability 9.0 to 10.x cuDNN computes
    16-bit arrays with few samples (it has run on 9.0 only); XLA computes everything else, blockwise.

    Args:
      lengths: int32 [B, M], the tokens of each sample of a row, which begins with the first sample; 0 behind the last.
        The tokens behind the samples, which are padding, see each other only.
    """

    def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        at = jnp.arange(q.shape[1], dtype=jnp.int32)
        ranges = Ranges(jnp.zeros_like(at), sample_starts(lengths, q.shape[1]), at + 1)

        # By rows, so that a batch that is split over devices stays split.
        def row(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
            source = Source(k[None], v[None], jnp.zeros(1, jnp.int32), ranges._replace(v_lo=start).batched())
            return arena_attention(q[None], source)[0][0]

        return jax.vmap(row)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), ranges.v_lo)

    capability = cuda_capability()
    served = capability is not None and (9, 0) <= capability < (11, 0) and lengths.shape[1] <= MAX_CUDNN_SAMPLES
    if runs_in_cudnn(q) and served:
        _log_choice("cuDNN")
        return jax.lax.platform_dependent(q, k, v, lengths, cuda=_cudnn, default=blockwise)
    if capability is not None:
        _log_choice(f"XLA, blockwise (cuDNN takes 16 bits and up to {MAX_CUDNN_SAMPLES} samples on 9.0 to 10.x)")
    return blockwise(q, k, v, lengths)


@functools.cache
def _log_choice(name: str) -> None:
    logger.info("attention of packed rows: %s", name)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    # jax.nn.dot_product_attention does not offer cuDNN's packed layout.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths, offsets = cudnn_layout(lengths, q.shape[1])
    scale, mask = q.shape[-1] ** -0.5, MaskType.PADDING_CAUSAL
    return dot_product_attention(
        q, k, v, None, None, lengths, lengths, offsets, offsets, scale=scale, mask_type=mask
    )  # fmt: skip


def cudnn_layout(lengths: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """The lengths [B, M + 1] and the starts [B, M + 2] of the samples as JAX wants them: -1 where there is none.

    The padding is the last sample, so that cuDNN writes every row of its outputs and gradients.
    """
    padding = tokens - jnp.sum(lengths, axis=1, keepdims=True)
    whole = jnp.concatenate([lengths, padding], axis=1).astype(jnp.int32)
    starts = jnp.cumsum(whole, axis=1) - whole
    missing = whole <= 0
    offsets = jnp.pad(jnp.where(missing, -1, starts), ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(missing, -1, whole), offsets.astype(jnp.int32)
