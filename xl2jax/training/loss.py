"""The language loss of a batch of samples (upstream: LlavaQwenForCausalLM.forward with labels)."""

from __future__ import annotations

from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp

from xl2jax.arithmetic import round_up
from xl2jax.models.qwen2 import Qwen2
from xl2jax.models.video_xl2 import VideoXL2
from xl2jax.ops.dense import dense_attention
from xl2jax.training.sharding import split_batch

IGNORE = -100
"""Label of a token that the loss does not count."""

_LOSS_BLOCK = 256  # logits are computed for this many tokens of each row at a time


class TokenBatch(NamedTuple):
    """The tokens of B samples, padded at the end to T."""

    ids: jax.Array
    """int32 [B, T]. Values at the places of visual tokens are not used."""
    visual: jax.Array
    """int32 [B, T]: index into the visual tokens of the row, -1 for text."""
    labels: jax.Array
    """int32 [B, T]: the id of a token that the loss counts, else IGNORE."""
    segment: jax.Array | None = None
    """int32 [B, T] for packed rows: number of the sample within its row, -1 for padding. None: one sample a row."""


def embeddings(llm: Qwen2, visual: jax.Array, tokens: TokenBatch) -> jax.Array:
    """Inserts visual tokens [B, N, D] into the embedded text. Returns [B, T, D]."""
    inserted = jnp.take_along_axis(visual, jnp.maximum(tokens.visual, 0)[..., None], axis=1)
    is_text = tokens.visual < 0
    return jnp.where(is_text[..., None], llm.embed_tokens(jnp.where(is_text, tokens.ids, 0)), inserted)


def hidden_states(model: VideoXL2, pixels: jax.Array, tokens: TokenBatch, *, remat: bool) -> jax.Array:
    """Pixels [B, F, H, W, 3] in [-1, 1] and tokens [B, T] -> normed hidden states [B, T, D].

    Attention is dense and causal within a sample. Padding is at the end of a row, so no other token attends to it.
    """
    b, f = pixels.shape[:2]
    pixels = split_batch(pixels.reshape(b * f, *pixels.shape[2:]))
    visual = split_batch(model.encode_frames(pixels, remat=remat))
    visual = visual.reshape(b, -1, visual.shape[-1])
    x = split_batch(embeddings(model.llm, visual, tokens))
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    mask = None
    if tokens.segment is not None:
        changed = jnp.diff(tokens.segment, axis=1, prepend=tokens.segment[:, :1]) != 0
        positions -= jax.lax.cummax(jnp.where(changed, positions, 0), axis=1)
        mask = (tokens.segment[:, :, None] == tokens.segment[:, None, :])[:, None]

    def attend(state: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
        return None, split_batch(dense_attention(q, k, v, causal=True, mask=mask))

    return model.llm.forward(x, positions, attend, None, remat=remat)[0]


def token_loss(
    model: VideoXL2, pixels: jax.Array, tokens: TokenBatch, *, remat: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(sum of cross-entropies, number of labelled tokens), float32. Their ratio is upstream's loss."""
    return cross_entropies(model.llm, hidden_states(model, pixels, tokens, remat=remat), tokens.labels)


def cross_entropies(llm: Qwen2, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Normed hidden states [B, T, D], labels [B, T] -> (sum of cross-entropies, number of labelled tokens), float32.

    Labels are shifted: the hidden state at t predicts the label at t + 1. Logits never exist for the whole batch: they
    are computed for a few hundred tokens of each row at a time, and recomputed in the backward pass.
    """
    hidden, labels = hidden[:, :-1], labels[:, 1:]
    block = min(_LOSS_BLOCK, labels.shape[1])
    padding = round_up(labels.shape[1], block) - labels.shape[1]
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORE)

    @jax.checkpoint
    def of_block(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, labels = xs
        counted = labels != IGNORE
        logits = llm.logits(hidden)
        picked = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0))

    blocks = tuple(einops.rearrange(x, "b (n t) ... -> n b t ...", t=block) for x in (hidden, labels))
    return jnp.sum(jax.lax.map(of_block, blocks)), jnp.sum(labels != IGNORE).astype(jnp.float32)
