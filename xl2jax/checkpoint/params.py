"""Reads the parameters of a checkpoint in either layout, by dotted name and with stacked layers."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xl2jax.checkpoint.orbax_folder import OrbaxFolder, is_orbax, read_manifest
from xl2jax.checkpoint.param_names import Entry, Tensor, tensors
from xl2jax.checkpoint.quantizing import base_name, check_scale, dequantized, quantized, weights_of
from xl2jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES, cast
from xl2jax.checkpoint.torch_folder import TorchCheckpoint
from xl2jax.config import VideoXL2Config, Weights
from xl2jax.errors import UserError
from xl2jax.models.param_tree import is_quantized, unflatten
from xl2jax.models.sharding import copy_heads, inference_sharding, with_head_copies
from xl2jax.system.schema import quoted
from xl2jax.system.terminal import byte_bar


def stored_config(folder: Path, weights: Weights | None = None) -> VideoXL2Config:
    """The sizes of a checkpoint, and how its matrices are once they are read with `weights`. Reads no tensor.

    Raises:
      UserError: its matrices are quantised already, and otherwise than `weights` asks for; or `weights` is unknown.
    """
    if weights not in (None, "int8", "int4"):
        raise UserError(f"weights must be int8, int4 or None, not {quoted(weights)}")
    config = VideoXL2Config.from_hf(folder)
    stored = read_manifest(folder).weights if is_orbax(folder) else None
    if weights is not None and stored not in (None, weights):
        raise UserError(f"{folder}: its weights are {stored} already: leave out --weights {weights}")
    return config.with_weights(weights or stored)


def load_params(
    folder: Path,
    dtype: str | None = None,
    weights: Weights | None = None,
    *,
    progress: bool = False,
    verify: bool = True,
) -> tuple[VideoXL2Config, nnx.State]:
    """The config and the parameters of a checkpoint, on the default device. See `ParamReader`."""
    reader = ParamReader(folder, dtype, weights, verify=verify)
    return reader.config, reader.load(progress=progress)


class ParamReader:
    """Reads parameters by dotted name, with stacked layers, from a checkpoint that is opened and checked once.

    Host memory holds one stacked parameter and its layers at a time. A matrix that is quantised on reading is quantised
    layer by layer, from the numbers as they are stored.

    Args:
      folder: a checkpoint in either layout.
      dtype: `float32`, `bfloat16`, `float16`, or None for the stored dtype.
      weights: quantises the LLM's matrices to 8 or 4 bits. None leaves them as they are stored.
      verify: whether tensors of an Orbax folder are compared with their checksums.

    Raises:
      UserError: the checkpoint is incomplete, or its matrices are quantised otherwise than `weights` asks for; in
        `read`, a tensor is damaged, not finite or too large for `dtype`.
    """

    config: VideoXL2Config
    """The sizes, and how the matrices are stored once they are read."""
    dtype: str
    """That of all parameters but quantised matrices."""

    def __init__(self, folder: Path, dtype: str | None = None, weights: Weights | None = None, *, verify: bool = True):
        self._folder = folder
        self._source: Callable[[Sequence[Any]], list[np.ndarray]]  # of `Tensor`, or of `Entry` in the PyTorch layout
        table: Sequence[Tensor]
        self.config = stored_config(folder, weights)
        if is_orbax(folder):
            orbax = OrbaxFolder(folder, self.config, verify=verify)
            table = orbax.tensors
            # Orbax reads many tensors at once by itself, in their order.
            self.dtype, self._source, self._threads = dtype or orbax.dtype, orbax.read, 1
        else:
            torch = TorchCheckpoint(folder)
            table = torch.entries
            self.dtype, self._source, self._threads = torch.dtype(dtype), torch.read, 4
        self._parts = _by_param(tensors(self.config))
        self._stored = _by_param(table)
        self._quantized: dict[str, np.ndarray] = {}

    @property
    def names(self) -> list[str]:
        """Dotted names of all parameters."""
        return list(self._parts)

    def load(self, *, progress: bool = False) -> nnx.State:
        """All parameters, on the default device."""
        params = {n: jnp.asarray(array) for n, array in self.read_all(progress=progress)}
        return unflatten(params, self.config)

    def load_split(self, meshes: Sequence[Mesh], *, head_copies: int = 1, progress: bool = False) -> list[nnx.State]:
        """All parameters, on the devices of each mesh as `inference_sharding` splits them.

        The host holds a few tensors at a time, and each device its own parts and a part of the next tensor. `head_copies`:
        see `xl2jax.models.sharding.head_copies`.
        """
        config = with_head_copies(self.config, head_copies)
        copies: list[dict[str, jax.Array]] = [{} for _ in meshes]
        with byte_bar("load", sum(map(self.nbytes, self.names)), progress) as bar:
            for name, layer, array in self._ahead():
                bar.update(array.nbytes)
                array = copy_heads(name, array, head_copies, config.llm.head_width)
                for params, mesh in zip(copies, meshes, strict=True):
                    if layer is None:
                        params[name] = _placed(array, inference_sharding(name, array.shape, mesh))
                        continue
                    count = len(self._parts[name])
                    stacked = inference_sharding(name, (count, *array.shape), mesh)
                    if name not in params:
                        params[name] = _zeros((count, *array.shape), array.dtype, stacked)
                    part = _placed(array, NamedSharding(mesh, PartitionSpec(*stacked.spec[1:])))
                    params[name] = _put_layer(params[name], part, np.int32(layer))
        return [unflatten(params, config) for params in copies]

    def _ahead(self) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """Each tensor of each parameter: (dotted name, layer, array). Threads read those that follow meanwhile."""
        jobs: Iterator[tuple[str, int]] = ((name, i) for name, parts in self._stored.items() for i in range(len(parts)))
        with ThreadPoolExecutor(self._threads) as pool:
            waiting: collections.deque[Future[list[tuple[str, int | None, np.ndarray]]]] = collections.deque()
            while True:
                while len(waiting) <= self._threads and (job := next(jobs, None)) is not None:
                    waiting.append(pool.submit(self._read_tensor, *job))
                if not waiting:
                    return
                try:
                    yield from waiting.popleft().result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def _read_tensor(self, name: str, index: int) -> list[tuple[str, int | None, np.ndarray]]:
        """A stored tensor, or its parts if it is quantised on reading."""
        tensor = self._stored[name][index]
        (array,) = self._source([tensor])
        if name in self._parts:
            return [(name, tensor.layer, self._cast(tensor, array))]
        kind = weights_of(tensor, self.config)
        assert kind is not None
        base, parts = base_name(name), quantized(tensor, array, kind, self.dtype, self._where(tensor))
        return [(f"{base}.{part.rpartition('.')[2]}", tensor.layer, x) for part, x in parts.items()]

    def nbytes(self, name: str) -> int:
        """Bytes of a parameter as `read` returns it."""
        return sum(
            math.prod(t.shape) * (t.dtype or DTYPES[DTYPE_NAMES[self.dtype]]).itemsize for t in self._parts[name]
        )

    def read(self, name: str) -> np.ndarray:
        """One parameter; layers are stacked along the first axis."""
        if name in self._stored:
            parts = self._stored[name]
            arrays = [self._cast(t, x) for t, x in zip(parts, self._source(parts), strict=True)]
            return arrays[0] if parts[0].layer is None else np.stack(arrays)
        if name not in self._quantized:
            self._quantized = self._quantize(base_name(name))
        return self._quantized.pop(name)

    def plain(self, name: str) -> np.ndarray:
        """One parameter of the unquantised model, by its name there, in `dtype`. A quantised matrix is unpacked."""
        if name in self._parts:
            return self.read(name)
        base = base_name(name)
        parts = {n: self.read(n) for n in self._parts if base_name(n) == base and is_quantized(n)}
        where = f"{self._folder}: {name}"
        if ".layers." not in name:
            return cast(dequantized(name, parts), self.dtype, where)
        layers = ({n: x[i] for n, x in parts.items()} for i in range(self.config.llm.layers))
        return np.stack([cast(dequantized(name, layer), self.dtype, where) for layer in layers])

    def _cast(self, tensor: Tensor, array: np.ndarray) -> np.ndarray:
        if tensor.dtype is None:
            return cast(array, self.dtype, self._where(tensor))
        if jnp.issubdtype(array.dtype, jnp.floating):
            check_scale(array, self.dtype, self._where(tensor))
        return array

    def _where(self, tensor: Tensor) -> str:
        return f"{self._folder}: {tensor.torch_name if isinstance(tensor, Entry) else tensor.name}"

    def _quantize(self, base: str) -> dict[str, np.ndarray]:
        """The parts of a matrix, with stacked layers."""
        out: dict[str, np.ndarray] = {}
        (param,) = (n for n in self._stored if base_name(n) == base and n not in self._parts)
        layers = self._stored[param]
        for i, tensor in enumerate(layers):
            (array,) = self._source([tensor])
            kind = weights_of(tensor, self.config)
            assert kind is not None
            for name, part in quantized(tensor, array, kind, self.dtype, self._where(tensor)).items():
                if tensor.layer is None:
                    out[name] = part
                    continue
                stacked = f"{base}.{name.rpartition('.')[2]}"
                if stacked not in out:
                    out[stacked] = np.empty((len(layers), *part.shape), part.dtype)
                out[stacked][i] = part
        return out

    def read_all(
        self, *, progress: bool = False, wanted: Callable[[str], bool] = lambda _: True
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (dotted name, array) of the parameters whose name is `wanted`."""
        names = [n for n in self.names if wanted(n)]
        with byte_bar("load", sum(map(self.nbytes, names)), progress) as bar:
            for name in names:
                array = self.read(name)
                yield name, array
                bar.update(array.nbytes)


def _placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array of which each device of this process gets its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stacked: jax.Array, part: jax.Array, layer: np.int32) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, part, layer, 0)


def _by_param[T: Tensor](table: Sequence[T]) -> dict[str, list[T]]:
    parts: dict[str, list[T]] = {}
    for tensor in table:
        parts.setdefault(tensor.param, []).append(tensor)
    return parts
