"""Qwen2.5 decoder. The caller decides where keys and values are stored: see `Qwen2.forward`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xl2jax.config import LLMConfig
from xl2jax.models.layers import rope_tables, rotate, scan_layers, stack_layers
from xl2jax.models.linear import QuantizedEmbed, QuantizedLinear, apply_all
from xl2jax.models.lora import LoRAConfig, LoRALinear, LoRAQuantizedLinear
from xl2jax.ops.precision import accumulator, product
from xl2jax.ops.quantized_product import multiply
from xl2jax.ops.split import look_up, splits
from xl2jax.ops.weights import unpack

type Attend[S] = Callable[[S, jax.Array, jax.Array, jax.Array, jax.Array], tuple[S, jax.Array]]
"""`(state, layer, q, k, v) -> (state, out)`: q and out [..., T, N, H], k and v [..., T, K, H], rotated."""


def pad_tokens(x: jax.Array, rows: int) -> jax.Array:
    """[..., T, D] with zeros behind, so that there are at least `rows` tokens."""
    missing = max(rows - x.shape[-2], 0)
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, missing), (0, 0))) if missing else x


class DecoderLayer(nnx.Module):
    """RMSNorm, GQA with RoPE, RMSNorm, SwiGLU; the attention itself is passed in.

    x may have more rows than `cos` and `sin` have tokens. Those behind are padding, which attention does not get.
    """

    def __init__(
        self, config: LLMConfig, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs, lora: LoRAConfig | None = None
    ):
        c = config
        self.head_width = c.head_width

        def linear(n: int, m: int, bias: bool = False, inward: bool = False) -> nnx.Linear | QuantizedLinear:
            if c.weights is not None and lora is not None:
                return LoRAQuantizedLinear(n, m, c.weights, lora, use_bias=bias, param_dtype=param_dtype, rngs=rngs)
            if c.weights is not None:
                return QuantizedLinear(
                    n, m, c.weights, use_bias=bias, param_dtype=param_dtype, rngs=rngs, sums_parts=inward
                )
            if lora is not None:
                return LoRALinear(n, m, lora, use_bias=bias, param_dtype=param_dtype, rngs=rngs)
            return nnx.Linear(n, m, use_bias=bias, param_dtype=param_dtype, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(c.width, epsilon=c.eps, param_dtype=param_dtype, rngs=rngs)

        self.input_norm, self.post_attention_norm = norm(), norm()
        self.q = linear(c.width, c.heads * c.head_width, bias=True)
        self.k = linear(c.width, c.kv_heads * c.head_width, bias=True)
        self.v = linear(c.width, c.kv_heads * c.head_width, bias=True)
        self.o = linear(c.heads * c.head_width, c.width, inward=True)
        self.gate, self.up = linear(c.width, c.mlp_width), linear(c.width, c.mlp_width)
        self.down = linear(c.mlp_width, c.width, inward=True)

    def __call__[S](
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend[S], state: S, index: jax.Array
    ) -> tuple[jax.Array, S]:
        y, tokens = self.input_norm(x), cos.shape[-3]
        # With one row XLA on GPUs would write all products of a split matrix before it sums them. With padded rows it does
        # not; but of three whole matrices it would make one in every step.
        y = y if splits() > 1 else y[..., :tokens, :]
        q, k, v = (
            einops.rearrange(out[..., :tokens, :], "... t (n h) -> ... t n h", h=self.head_width)
            for out in apply_all(y, self.q, self.k, self.v)
        )
        state, out = attend(state, index, rotate(q, cos, sin), rotate(k, cos, sin), v)
        out = pad_tokens(einops.rearrange(out, "... t n h -> ... t (n h)"), x.shape[-2])
        x = x + self.o(out)
        y = self.post_attention_norm(x)
        gate, up = apply_all(y, self.gate, self.up)
        return x + self.down(nnx.silu(gate) * up), state


class Qwen2(nnx.Module):
    """Embedding, stacked decoder layers, final norm, lm_head.

    With `config.weights` the matrices are in 8 or 4 bits. Embedding and lm_head then always have 8: they are a seventh
    of the released LLM, and the logits depend on lm_head directly.
    """

    def __init__(
        self, config: LLMConfig, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs, lora: LoRAConfig | None = None
    ):
        self.heads, self.head_width, self.rope_theta = config.heads, config.head_width, config.rope_theta
        self.quantized = config.weights is not None
        self.embed: nnx.Embed | QuantizedEmbed
        self.lm_head: nnx.Linear | QuantizedLinear
        if self.quantized:
            self.embed = QuantizedEmbed(config.vocab, config.width, "int8", rngs=rngs)
        else:
            self.embed = nnx.Embed(config.vocab, config.width, param_dtype=param_dtype, rngs=rngs)
        self.layers = stack_layers(
            lambda rngs: DecoderLayer(config, param_dtype=param_dtype, rngs=rngs, lora=lora), config.layers, rngs
        )
        self.norm = nnx.RMSNorm(config.width, epsilon=config.eps, param_dtype=param_dtype, rngs=rngs)
        if not config.tied_embeddings:
            width, vocab = config.width, config.vocab
            if self.quantized:
                self.lm_head = QuantizedLinear(width, vocab, "int8", use_bias=False, param_dtype=param_dtype, rngs=rngs)
            else:
                self.lm_head = nnx.Linear(width, vocab, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.tied = config.tied_embeddings

    @property
    def dtype(self) -> np.dtype:
        """The dtype of activations, which is that of all parameters but quantised matrices."""
        assert self.norm.scale is not None
        return np.dtype(self.norm.scale[...].dtype)

    def embed_tokens(self, ids: jax.Array) -> jax.Array:
        """Token ids [...] -> embeddings [..., D] in the parameters' dtype."""
        if isinstance(self.embed, QuantizedEmbed):
            return self.embed.lookup(ids, self.dtype)
        # A call of nnx.Embed would cast to the dtype that it was built with, whatever dtype its parameters have.
        return look_up(lambda table, ids: table[ids], self.embed.embedding[...], ids)

    def forward[S](
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: Attend[S],
        state: S,
        *,
        remat: bool = False,
        unroll: bool = False,
        rows: int | None = None,
        separate: Sequence[Any] | None = None,
    ) -> tuple[jax.Array, S]:
        """Embeddings [..., T, D] at integer positions [..., T] -> normed hidden states [..., T, D].

        Every layer calls `attend(state, layer, q, k, v)` with rotated q and k. A cache is part of `state`, which is
        carried from layer to layer and returned.

        Args:
          remat: the backward pass recomputes each layer.
          unroll, separate: see `scan_layers`.
          rows: pads everything but q, k, v and attention to at least so many tokens. XLA on GPUs pads the operands of products of
            fewer than eight rows, and slices their results, in kernels of their own.
        """
        tokens = x.shape[-2]
        if rows is not None:
            x = pad_tokens(x, rows)
        (x, state), _ = self._run_layers(x, positions, attend, state, remat=remat, unroll=unroll, separate=separate)
        return self.norm(x)[..., :tokens, :], state

    def layer_outputs[S](self, x: jax.Array, positions: jax.Array, attend: Attend[S], state: S) -> jax.Array:
        """The output of every layer, [L, ..., T, D], for the arguments of `forward`.

        `forward` returns the last one, normed.
        """
        _, outputs = self._run_layers(x, positions, attend, state, keep_outputs=True)
        assert outputs is not None
        return outputs

    def _run_layers[S](
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: Attend[S],
        state: S,
        *,
        remat: bool = False,
        unroll: bool = False,
        separate: Sequence[Any] | None = None,
        keep_outputs: bool = False,
    ) -> tuple[tuple[jax.Array, S], jax.Array | None]:
        cos, sin = (
            t[..., None, :] for t in rope_tables(positions, self.head_width, self.rope_theta, accumulator(x.dtype))
        )

        def body(
            layer: DecoderLayer, carry: tuple[jax.Array, S], index: jax.Array
        ) -> tuple[tuple[jax.Array, S], jax.Array | None]:
            x, state = layer(carry[0], cos, sin, attend, carry[1], index)
            return (x, state), x if keep_outputs else None

        return scan_layers(self.layers, body, (x, state), remat=remat, unroll=unroll, separate=separate)

    def unembedding(self) -> jax.Array:
        """The matrix [D, vocab] whose product with a hidden state gives the logits, in the dtype of activations."""
        head = self.embed if self.tied else self.lm_head
        if isinstance(head, QuantizedEmbed | QuantizedLinear):
            return unpack(head.matrix, self.dtype).T
        return head.embedding[...].T if isinstance(head, nnx.Embed) else head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> logits [..., vocab], float32 (float64 for float64).

        Where the vocabulary is split over devices, so are they.
        """
        head = self.embed if self.tied else self.lm_head
        if isinstance(head, QuantizedEmbed | QuantizedLinear):
            return multiply(hidden, (head.matrix,), accumulator(hidden.dtype))[0]
        kernel = self.unembedding()
        if hidden.ndim > 1:
            return product("...d,dv->...v", hidden, kernel)
        # For one 16-bit row XLA would first write all of lm_head as float32. For eight rows it does not.
        rows = jax.lax.optimization_barrier(jnp.pad(hidden[None], ((0, 7), (0, 0))))
        return product("td,dv->tv", rows, kernel)[0]
