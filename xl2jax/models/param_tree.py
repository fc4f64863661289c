"""The model's parameters as a dictionary by dotted name, and as the tree that Flax merges into modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xl2jax.config import VideoXL2Config
from xl2jax.models.linear import PART_PREFIX
from xl2jax.models.lora import LoRAConfig
from xl2jax.models.video_xl2 import abstract_model


def flatten(params: nnx.State) -> dict[str, jax.Array]:
    """Parameters by dotted name, e.g. `llm.layers.q.kernel`, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))
    return {".".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def unflatten(params: dict[str, jax.Array], config: VideoXL2Config, lora: LoRAConfig | None = None) -> nnx.State:
    """The inverse of `flatten`. Raises KeyError if a parameter of the model is missing."""
    state = nnx.state(abstract_model(config, jnp.float32, lora))
    names = list(flatten(state))
    treedef = jax.tree.structure(state)
    return jax.tree.unflatten(treedef, [params[name] for name in names])


def is_quantized(name: str) -> bool:
    """Whether the parameter with a dotted name is a part of a matrix in 8 or 4 bits. Such parts are never cast."""
    return name.rpartition(".")[2].startswith(PART_PREFIX)


def parameter_count(name: str, array: jax.Array | jax.ShapeDtypeStruct) -> int:
    """The number of parameters that an array holds: two in a byte of 4 bits, and none in scales and zero points."""
    if not is_quantized(name):
        return array.size
    return array.size * (2 if array.dtype == jnp.uint8 else 1) if name.endswith(f".{PART_PREFIX}") else 0


def cast(params: nnx.State, dtype: jax.typing.DTypeLike) -> nnx.State:
    """The parameters in `dtype`, except for the parts of matrices in 8 or 4 bits."""

    def convert(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = ".".join(str(k.key) for k in path if hasattr(k, "key"))
        return leaf if is_quantized(name) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, params)
