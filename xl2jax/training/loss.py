"""The language loss of a batch of samples (upstream: LlavaQwenForCausalLM.forward with labels)."""

from __future__ import annotations

from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp

from xl2jax.arithmetic import ceil_div, round_up
from xl2jax.models.qwen2 import Qwen2
from xl2jax.models.video_xl2 import VideoXL2
from xl2jax.ops.dense import dense_attention
from xl2jax.ops.packed import packed_attention, sample_starts
from xl2jax.ops.precision import accumulator, product
from xl2jax.training.sharding import batch_parts, split_batch

IGNORE = -100
"""Label of a token that the loss does not count."""

_LOSS_BLOCK = 256  # logits are computed for this many tokens of each row at a time


class TokenBatch(NamedTuple):
    """The tokens of B samples, padded at the end to T."""

    ids: jax.Array
    """int32 [B, T]. Values at the places of visual tokens are not used."""
    visual: jax.Array
    """int32 [B, T]: index into the visual tokens of the row, those of all frames and then those of all tiles; -1 for
    text."""
    labels: jax.Array
    """int32 [B, T]: the id of a token that the loss counts, else IGNORE."""
    lengths: jax.Array | None = None
    """int32 [B, M] for packed rows: tokens of each sample, 0 behind the last. None: one sample a row."""


def embeddings(llm: Qwen2, visual: jax.Array, tokens: TokenBatch) -> jax.Array:
    """Inserts visual tokens [B, N, D] into the embedded text. Returns [B, T, D]."""
    inserted = jnp.take_along_axis(visual, jnp.maximum(tokens.visual, 0)[..., None], axis=1)
    is_text = tokens.visual < 0
    return jnp.where(is_text[..., None], llm.embed_tokens(jnp.where(is_text, tokens.ids, 0)), inserted)


def visual_tokens(model: VideoXL2, pixels: jax.Array, tiles: jax.Array | None, *, remat: bool) -> jax.Array:
    """The visual tokens of each row, [B, N, D]: of its frames, then of its tiles. One of zeros where there are neither."""
    parts = []
    for x, encode in ((pixels, model.encode_frames), (tiles, model.encode_tiles)):
        if x is not None and x.shape[1]:
            flat = split_batch(x.reshape(-1, *x.shape[2:]))
            encoded = split_batch(encode(flat, remat=remat))
            parts.append(encoded.reshape(x.shape[0], -1, encoded.shape[-1]))
    return (
        jnp.concatenate(parts, axis=1)
        if parts
        else jnp.zeros((len(pixels), 1, model.config.llm.width), model.llm.dtype)
    )


def hidden_states(
    model: VideoXL2, pixels: jax.Array, tokens: TokenBatch, tiles: jax.Array | None = None, *, remat: bool
) -> jax.Array:
    """Pixels in [-1, 1] and tokens [B, T] -> normed hidden states [B, T, D].

    Attention is causal within a sample. Padding is at the end of a row, so no other token attends to it.

    Args:
      pixels: of the frames of videos, [B, F, H, W, 3]. F is a multiple of 4, maybe 0.
      tiles: of the tiles of pictures, [B, N, H, W, 3]. None: there are none.
    """
    x = split_batch(embeddings(model.llm, visual_tokens(model, pixels, tiles, remat=remat), tokens))
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    if tokens.lengths is not None:
        positions -= sample_starts(tokens.lengths, x.shape[1])

    def attend(state: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
        if tokens.lengths is None:
            return None, split_batch(dense_attention(q, k, v, causal=True))
        return None, split_batch(packed_attention(q, k, v, tokens.lengths))

    return model.llm.forward(x, positions, attend, None, remat=remat)[0]


def token_loss(
    model: VideoXL2, pixels: jax.Array, tokens: TokenBatch, tiles: jax.Array | None = None, *, remat: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(sum of cross-entropies, number of labelled tokens), float32. Their ratio is upstream's loss."""
    return cross_entropies(model.llm, hidden_states(model, pixels, tokens, tiles, remat=remat), tokens.labels)


def cross_entropies(llm: Qwen2, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Normed hidden states [B, T, D], labels [B, T] -> (sum of cross-entropies, number of labelled tokens), float32.

    Labels are shifted: the hidden state at t predicts the label at t + 1. Only tokens with a label need logits. They
    are computed for a few hundred tokens of each row at a time, and again in the backward pass.
    """
    hidden, labels = hidden[:, :-1], labels[:, 1:]
    counted = labels != IGNORE
    # Tokens with a label come first, so that the blocks behind them need not be computed.
    order = jnp.argsort(~counted, axis=1, stable=True)
    hidden, labels = jnp.take_along_axis(hidden, order[..., None], axis=1), jnp.take_along_axis(labels, order, axis=1)
    block = min(_LOSS_BLOCK, labels.shape[1])
    padding = round_up(labels.shape[1], block) - labels.shape[1]
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORE)
    hidden, labels = (einops.rearrange(x, "b (n t) ... -> n b t ...", t=block) for x in (hidden, labels))
    used = jnp.max(ceil_div(jnp.sum(counted, axis=1), block))
    return _sum_of_blocks(hidden, llm.unembedding(), labels, used), jnp.sum(counted).astype(jnp.float32)


def _loss_of_block(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """The sum of the cross-entropies of hidden states [B, T, D] and labels [B, T]."""
    counted = labels != IGNORE
    logits = product("btd,dv->btv", hidden, kernel)
    picked = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0))


@jax.custom_vjp
def _sum_of_blocks(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, used: jax.Array) -> jax.Array:
    """The sum of `_loss_of_block` over the first `used` of hidden [n, B, T, D] and labels [n, B, T]."""

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + _loss_of_block(hidden[i], kernel, labels[i])

    return jax.lax.fori_loop(0, used, add, jnp.zeros((), accumulator(hidden.dtype)))


type _Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _sum_of_blocks_forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _sum_of_blocks(*args), args


def _sum_of_blocks_backward(residuals: _Residuals, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    hidden, kernel, labels, used = residuals

    # Each part of the batch has a gradient of the kernel of its own, so that devices sum them once and not in every block.
    parts = batch_parts(hidden.shape[1])

    def add(i: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def of_part(hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
            _, pullback = jax.vjp(lambda hidden, kernel: _loss_of_block(hidden, kernel, labels), hidden, kernel)
            return pullback(gradient)

        d_hidden, d_kernel = grads
        block = (split_batch(x[i].reshape(parts, -1, *x.shape[2:])) for x in (hidden, labels))
        d_block, d_part = jax.vmap(of_part)(*block)
        d_block = d_block.reshape(hidden.shape[1:])
        return d_hidden.at[i].set(d_block), split_batch(d_kernel + d_part.astype(d_kernel.dtype))

    zeros = jnp.zeros_like(hidden), split_batch(jnp.zeros((parts, *kernel.shape), accumulator(kernel.dtype)))
    d_hidden, d_kernel = jax.lax.fori_loop(0, used, add, zeros)
    return d_hidden, jnp.sum(d_kernel, axis=0).astype(kernel.dtype), None, None


_sum_of_blocks.defvjp(_sum_of_blocks_forward, _sum_of_blocks_backward)
