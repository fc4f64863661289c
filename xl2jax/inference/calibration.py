"""Rounds the LLM's matrices to 4 bits for the inputs that they get in some videos (`xl2jax.ops.gptq`).

The videos go through the unquantised model, layer by layer, with dense attention. Memory beside the model holds the
hidden states of all videos, the second moments of one layer's inputs, and the codes so far, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.inference import compiled, session
from xl2jax.inference.api import Model
from xl2jax.inference.layout import PrefillConfig, bucket
from xl2jax.inference.network import Network
from xl2jax.models.layers import rope_tables
from xl2jax.models.param_tree import flatten
from xl2jax.models.qwen2 import pad_tokens
from xl2jax.ops.dense import dense_attention
from xl2jax.ops.gptq import gptq
from xl2jax.ops.precision import accumulator
from xl2jax.ops.weights import QuantizedMatrix
from xl2jax.prompt import PREFIX, suffix
from xl2jax.video.clip import Clip
from xl2jax.video.read_ahead import default_workers

_INPUTS = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "o": "heads",
    "gate": "mlp",
    "up": "mlp",
    "down": "hidden",
}
"""Which input of a layer each matrix multiplies."""
_QUESTION = "What happens in the video?"

type Moments = dict[str, jax.Array]
"""X^T X, float32 [n, n], of the inputs X of a layer, by their names in `_INPUTS`."""


def calibrate(model: Model, clips: Sequence[Clip], *, progress: bool = False) -> dict[str, QuantizedMatrix]:
    """The matrices of all layers in 4 bits, on the host, by their dotted names with the layer's number (`llm.layers.0.q`).

    Raises:
      UserError: a video cannot be read, or the inputs of a matrix are not finite.
    """
    network = model.network
    states, kernels = [_embeddings(model, clip) for clip in clips], flatten(model.params)
    out: dict[str, QuantizedMatrix] = {}
    for index in tqdm(range(network.config.llm.layers), "calibrate", unit="layer", disable=not progress):
        moments: Moments | None = None
        for i, (x, tokens) in enumerate(states):
            x, new = _layer(network, jnp.int32(index), x, jnp.int32(tokens))
            states[i] = x, tokens
            moments = new if moments is None else jax.tree.map(jnp.add, moments, new)
        assert moments is not None
        for name, inputs in _INPUTS.items():
            kernel = kernels[f"llm.layers.{name}.kernel"][index]
            matrix: QuantizedMatrix = jax.tree.map(np.asarray, gptq(kernel.T.astype(jnp.float32), moments[inputs]))
            if not np.isfinite(np.asarray(matrix.scale, np.float32)).all():
                raise UserError(
                    f"calibration: the inputs of llm.layers.{index}.{name} overflow in {model.dtype}: "
                    "calibrate in bfloat16 or float32 (--dtype)"
                )
            out[f"llm.layers.{index}.{name}"] = matrix
    return out


def _embeddings(model: Model, clip: Clip) -> tuple[jax.Array, int]:
    """The embeddings of prompt and video in natural order, [T, D] padded to a bucket, and how many are real."""
    network, tokenizer = model.network, model.tokenizer
    time_ids = tokenizer.time_ids(clip.times)
    plan = model.plan(model.layout(time_ids), PrefillConfig())
    llm = network.model.llm

    def text(ids: list[int]) -> jax.Array:
        return llm.embed_tokens(jnp.asarray(ids, jnp.int32))

    parts = [text(tokenizer.encode(*PREFIX))]
    batches = clip.batches(
        plan.segment_groups * FRAMES_PER_GROUP, network.config.vision.image_size, workers=default_workers()
    )
    groups = iter(time_ids)
    for frames in batches:
        visual = session.encode(network, plan, frames)
        for one in visual[: len(frames) // FRAMES_PER_GROUP]:
            parts += [text(next(groups)), one]
    x = jnp.concatenate([*parts, text(suffix(tokenizer, _QUESTION).ids)])
    return pad_tokens(x, bucket(len(x), 128)), len(x)


@compiled.program
def _layer(network: Network, index: jax.Array, x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Moments]:
    """One layer on hidden states [T, D], of which `tokens` are real: its output, and the moments of its inputs."""
    llm = network.model.llm
    graphdef, stacked = nnx.split(llm.layers)
    layer = nnx.merge(graphdef, jax.tree.map(lambda p: p[index], stacked))
    at = jnp.arange(x.shape[0])
    tables = rope_tables(at, llm.head_width, llm.rope_theta, accumulator(x.dtype))
    cos, sin = (t[..., None, :] for t in tables)

    def attend(state: jax.Array, _: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = dense_attention(q[None], k[None], v[None], causal=True)[0]
        return out.reshape(len(out), -1), out

    config = network.config.llm
    empty = jnp.zeros((x.shape[0], config.heads * config.head_width), x.dtype)
    after, seen = layer(x, cos, sin, attend, empty, index)
    mlp = layer.post_attention_norm(x + layer.o(seen))
    inputs = {
        "attention": layer.input_norm(x),
        "heads": seen,
        "mlp": mlp,
        "hidden": nnx.silu(layer.gate(mlp)) * layer.up(mlp),
    }

    def moments(rows: jax.Array) -> jax.Array:
        rows = jnp.where((at < tokens)[:, None], rows, 0)
        return jnp.einsum("ti,tj->ij", rows, rows, preferred_element_type=jnp.float32)

    return after, jax.tree.map(moments, inputs)
