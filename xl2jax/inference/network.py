"""The loaded networks, as every compiled program takes them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.models.param_tree import flatten
from xl2jax.models.sharding import replicated
from xl2jax.models.video_xl2 import VideoXL2, abstract_model
from xl2jax.ops.attention import Attention, choose_attention

LARGE_KEY_BIAS = 50.0
"""Norm of a head's key bias from which on KV in 8 bits keeps channels of the keys. At 22 the bias costs little, at 220 a lot."""


def exact_pairs(head_width: int) -> int:
    """How many pairs of channels of each key are then kept: 16 of 128 channels."""
    return min(8, head_width // 4)


def largest_channels(biases: np.ndarray) -> np.ndarray:
    """The channels of biases [..., H] that belong to the largest pairs: int32 [..., C] in ascending order."""
    half = biases.shape[-1] // 2
    size = np.hypot(biases[..., :half], biases[..., half:])
    largest = np.sort(np.argsort(-size, axis=-1, stable=True)[..., : exact_pairs(2 * half)], axis=-1)
    return np.concatenate([largest, largest + half], axis=-1).astype(np.int32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params",),
    meta_fields=("config", "attention", "platform", "mesh", "head_copies"),
)
@dataclasses.dataclass(frozen=True)
class Network:
    """Config, parameters, and the choices that depend on the devices, which are made once.

    A pytree: under `jax.jit` the parameters are traced and everything else is static.
    """

    config: VideoXL2Config
    params: nnx.State
    attention: Attention
    """The implementation of arena attention."""
    platform: str
    """"cpu" or "gpu": where the parameters are."""
    mesh: Mesh | None = None
    """The devices over which the LLM and the KV are split, and frames for the vision tower. None: the default device."""
    head_copies: int = 1
    """How often each KV head of the checkpoint is there (`xl2jax.models.sharding.head_copies`)."""

    @classmethod
    def create(
        cls,
        config: VideoXL2Config,
        params: nnx.State,
        implementation: str = "auto",
        *,
        mesh: Mesh | None = None,
        head_copies: int = 1,
    ) -> Network:
        """Finds the platform and, where `implementation` is "auto", chooses the attention. The choice is logged once.

        `params` are on the devices of `mesh`, as `xl2jax.models.sharding` splits them.

        Raises UserError for an implementation that does not exist or does not serve the model on its device.
        """
        first = jax.tree.leaves(params)[0]
        device = next(iter(first.devices()))
        attention = choose_attention(implementation, device, config.llm.head_width, first.dtype)
        platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
        return cls(config, params, attention, platform, mesh, head_copies)

    @property
    def dtype(self) -> str:
        """The dtype of the parameters, and so of activations and KV."""
        return str(jax.tree.leaves(self.params)[0].dtype)

    @property
    def model(self) -> VideoXL2:
        """The module over the parameters, inside or outside a transformation."""
        return nnx.merge(_graphdef(self.config, self.dtype), self.params)

    @functools.cached_property
    def layers(self) -> tuple[Any, ...] | None:
        """The parameters of each layer of the LLM for `scan_layers`, on CPUs. They share the memory of the stacked ones.

        None on GPUs, which read the stacked ones in place, and where they are split over devices.
        """
        if self.platform != "cpu" or self.tensor > 1:
            return None
        stacked = nnx.state(self.model.llm.layers)
        return tuple(jax.tree.map(functools.partial(layer_view, at=i), stacked) for i in range(self.config.llm.layers))

    @property
    def tensor(self) -> int:
        """Number of devices over which the LLM is split."""
        return 1 if self.mesh is None else self.mesh.size

    def in_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Has operations split over the devices while a program is traced (`xl2jax.ops.split`)."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    @property
    def whole(self) -> NamedSharding | None:
        """The sharding of an array that every device holds whole."""
        return None if self.mesh is None else replicated(self.mesh)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Has products of float32 arrays computed in float32. By default GPUs compute them in TF32."""
        return jax.default_matmul_precision("highest" if self.dtype == "float32" else None)

    def key_bias_norms(self) -> np.ndarray:
        """The norm of each head's key bias, [L, K]."""
        return np.linalg.norm(self._key_biases(), axis=-1)

    def exact_key_channels(self) -> np.ndarray | None:
        """The channels of keys that KV in 8 bits keeps as they are: int32 [L, K, C] in ascending order.

        None where no head's bias is as large as `LARGE_KEY_BIAS`. Otherwise these are the pairs of channels, rotated
        together, in which the bias is largest.
        """
        biases = self._key_biases()
        if np.linalg.norm(biases, axis=-1).max() <= LARGE_KEY_BIAS:
            return None
        return largest_channels(biases)

    def _key_biases(self) -> np.ndarray:
        """float32 [L, K, H]"""
        bias = np.asarray(flatten(self.params)["llm.layers.k.bias"], np.float32)
        return bias.reshape(len(bias), -1, self.config.llm.head_width)

    def not_finite(self, what: str) -> UserError:
        """The error for numbers that are NaN or infinite."""
        advice = "use bfloat16 or float32 (--dtype)" if self.dtype == "float16" else "the weights may be damaged"
        return UserError(f"{what} holds NaN or infinity, computed in {self.dtype}: {advice}")


@functools.cache
def _graphdef(config: VideoXL2Config, dtype: str) -> nnx.GraphDef:
    return nnx.graphdef(abstract_model(config, dtype))


def layer_view(stacked: jax.Array, at: int | slice) -> jax.Array:
    """A part of an array [L, ...] on a CPU. It is a view where the part begins at a multiple of 64 bytes."""
    return jax.device_put(np.asarray(stacked)[at], next(iter(stacked.devices())), may_alias=True)
