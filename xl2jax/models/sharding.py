"""How parameters are split over devices, in training and in inference.

The axes of a mesh are `data` (copies of the model), `fsdp` (parameters and optimizer state are split, and gathered one
layer at a time) and `tensor` (heads, MLP columns and the vocabulary are split). Training has all three (see
`xl2jax.training.sharding`). Inference has `tensor` alone: each copy of the model has a mesh of its own.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.ops.split import TENSOR
from xl2jax.ops.weights import group_size

# The axis of a parameter (counted from the end) that `tensor` splits: columns of the projections into the heads and the
# MLP, rows of the projections out of them, and entries of the vocabulary.
_TENSOR = (
    (("*.layers.[qkv].kernel", "*.layers.gate.kernel", "*.layers.up.kernel", "*.layers.fc1.kernel"), -1),
    (("*.layers.[qkv].bias", "*.layers.fc1.bias", "*.layers.[qkv].lora_b", "*.gate.lora_b", "*.up.lora_b"), -1),
    (("*.layers.o.kernel", "*.layers.out.kernel", "*.layers.down.kernel", "*.layers.fc2.kernel"), -2),
    (("*.layers.o.lora_a", "*.layers.down.lora_a", "llm.embed.embedding"), -2),
    (("llm.lm_head.kernel",), -1),
    # Quantised matrices have outputs first. Their scales have an axis of inputs in 4 bits only.
    (("*.layers.[qkv].codes", "*.layers.gate.codes", "*.layers.up.codes", "llm.embed.codes", "llm.lm_head.codes"), -2),
    (("*.layers.o.codes", "*.layers.down.codes"), -1),
)
_SCALES, _SCALES_OF_INPUTS = ("*.codes_*",), ("*.layers.o.codes_*", "*.layers.down.codes_*")
"""Scales and zero points, and those of matrices whose inputs are split."""


def param_spec(
    name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, layer_axis: bool = True
) -> PartitionSpec:
    """How the parameter with a dotted name is split. The layer axis is never split, and vectors only over `tensor`.

    `layer_axis`: parameters of layers are those of all layers, stacked along a first axis.
    """
    spec: list[str | None] = [None] * len(shape)
    first = 1 if layer_axis and ".layers." in name else 0
    axis = _tensor_axis(name, len(shape), first)
    if axis is not None and shape[axis] % mesh.shape[TENSOR] == 0:
        spec[axis] = TENSOR
    fsdp = dict(mesh.shape).get("fsdp", 1)
    free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % fsdp == 0]
    if fsdp > 1 and len(shape) - first >= 2 and free:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def _tensor_axis(name: str, axes: int, first: int) -> int | None:
    """The axis of a parameter that `tensor` splits; `first` is that behind the layers."""

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in patterns)

    for patterns, axis in _TENSOR:
        if matches(patterns):
            return axes + axis
    if matches(_SCALES_OF_INPUTS):
        return first + 1 if axes > first + 1 else None
    return first if matches(_SCALES) else None


def param_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of `param_spec`."""
    return NamedSharding(mesh, param_spec(name, shape, mesh))


def splits_parameters() -> bool:
    """Whether the current mesh is one of training with the axis `fsdp`."""
    return bool(dict(jax.sharding.get_abstract_mesh().shape).get("fsdp", 1) > 1)


def gathered(params: Any, prefix: str) -> Any:
    """Parameters as a device uses them in training: whole, but for what `tensor` splits.

    Without this XLA may leave a matrix split over `fsdp` and split the activations along its inputs instead, so that
    every device computes all rows of the batch, and sums of activations are exchanged.

    `params` is a dictionary or a state whose dotted names begin with `prefix`. It stays as it is outside the meshes of
    training.
    """
    if not splits_parameters():
        return params
    mesh = jax.sharding.get_abstract_mesh()

    def whole(path: Any, x: jax.Array) -> jax.Array:
        name = prefix + jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        spec = param_spec(name, x.shape, mesh, layer_axis=False)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None if a == "fsdp" else a for a in spec]))

    return jax.tree_util.tree_map_with_path(whole, params)


def inference_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """That of inference: the LLM is split over `tensor`. The vision tower is whole, because frames are split."""
    return param_sharding(name, shape, mesh) if name.startswith("llm.") else replicated(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_bytes(name: str, leaf: jax.Array | jax.ShapeDtypeStruct, tensor: int) -> int:
    """Bytes of a parameter that each of `tensor` devices holds in inference."""
    whole: int = math.prod(leaf.shape) * leaf.dtype.itemsize
    if tensor == 1 or not name.startswith("llm."):
        return whole
    axis = _tensor_axis(name, len(leaf.shape), 1 if ".layers." in name else 0)
    return whole // tensor if axis is not None and leaf.shape[axis] % tensor == 0 else whole


# --- inference -----------------------------------------------------------------------------------


def tensor_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of one copy of a model."""
    return Mesh(np.asarray(devices), (TENSOR,), axis_types=(AxisType.Auto,))


def check_split(config: VideoXL2Config, tensor: int) -> None:
    """Raises UserError unless inference can split the LLM over so many devices."""
    c = config.llm
    bad = [f"{n} {what}" for what, n in {"heads": c.heads, "LLM MLP width": c.mlp_width}.items() if n % tensor]
    if c.kv_heads % tensor and tensor % c.kv_heads:
        bad.append(f"{c.kv_heads} KV heads (and is no multiple of them)")
    if not bad and c.weights == "int4":
        inputs = {"inputs of the output projection": c.heads * c.head_width, "inputs of the MLP": c.mlp_width}
        bad = [
            f"{n // group_size(n)} groups of {what} in 4 bits"
            for what, n in inputs.items()
            if n // group_size(n) % tensor
        ]
    if bad:
        raise UserError(f"--tensor {tensor} does not divide {', '.join(bad)}")


def head_copies(config: VideoXL2Config, tensor: int) -> int:
    """How many devices hold the same KV head: more than one where there are fewer KV heads than devices."""
    return max(tensor // config.llm.kv_heads, 1)


def with_head_copies(config: VideoXL2Config, copies: int) -> VideoXL2Config:
    """The config of a model each of whose KV heads is there `copies` times. It computes the same."""
    llm = dataclasses.replace(config.llm, kv_heads=config.llm.kv_heads * copies)
    return config if copies == 1 else dataclasses.replace(config, llm=llm)


def without_head_copies(config: VideoXL2Config, copies: int) -> VideoXL2Config:
    """The inverse of `with_head_copies`."""
    llm = dataclasses.replace(config.llm, kv_heads=config.llm.kv_heads // copies)
    return config if copies == 1 else dataclasses.replace(config, llm=llm)


def _heads_axis(name: str) -> int | None:
    """The axis, within a layer, of the KV heads in a parameter that makes keys or values."""
    if not fnmatch.fnmatchcase(name, "llm.layers.[kv].*"):
        return None
    return -1 if name.endswith((".kernel", ".bias")) else 0


def copy_heads(name: str, layer: np.ndarray, copies: int, head_width: int) -> np.ndarray:
    """A layer's parameter with each KV head `copies` times, one behind the other. Other parameters stay as they are."""
    axis = _heads_axis(name)
    if copies == 1 or axis is None:
        return layer
    moved = np.moveaxis(layer, axis, 0)
    heads = np.repeat(moved.reshape(-1, head_width, *moved.shape[1:]), copies, axis=0)
    return np.moveaxis(heads.reshape(-1, *moved.shape[1:]), 0, axis)


def single_heads(name: str, stacked: jax.Array, copies: int, head_width: int) -> jax.Array:
    """The inverse of `copy_heads`, for a parameter [L, ...]."""
    axis = _heads_axis(name)
    if copies == 1 or axis is None:
        return stacked
    axis = stacked.ndim - 1 if axis == -1 else 1
    shape = stacked.shape
    heads = stacked.reshape(*shape[:axis], -1, copies, head_width, *shape[axis + 1 :])
    return jax.lax.index_in_dim(heads, 0, axis + 1, keepdims=False).reshape(*shape[:axis], -1, *shape[axis + 1 :])
