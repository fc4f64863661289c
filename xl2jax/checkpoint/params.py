"""Reads the parameters of a checkpoint in either layout, by dotted name and with stacked layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from xl2jax.checkpoint.orbax_folder import OrbaxFolder, is_orbax
from xl2jax.checkpoint.param_names import Entry
from xl2jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES, cast
from xl2jax.checkpoint.torch_folder import TorchCheckpoint
from xl2jax.config import VideoXL2Config
from xl2jax.models.param_tree import unflatten
from xl2jax.system.terminal import byte_bar


def load_params(
    folder: Path, dtype: str | None = None, *, progress: bool = False, verify: bool = True
) -> tuple[VideoXL2Config, nnx.State]:
    """The config and the parameters of a checkpoint, on the default device. See `ParamReader`."""
    config = VideoXL2Config.from_hf(folder)
    params = {n: jnp.asarray(array) for n, array in read_params(folder, dtype, progress=progress, verify=verify)}
    return config, unflatten(params, config)


class ParamReader:
    """Reads parameters by dotted name, with stacked layers, from a checkpoint that is opened and checked once.

    Host memory holds one stacked parameter and its layers at a time.

    Args:
      folder: a checkpoint in either layout.
      dtype: `float32`, `bfloat16`, `float16`, or None for the stored dtype.
      verify: whether tensors of an Orbax folder are compared with their checksums.

    Raises:
      UserError: the checkpoint is incomplete; in `read`, a tensor is damaged, not finite or too large for `dtype`.
    """

    def __init__(self, folder: Path, dtype: str | None = None, *, verify: bool = True):
        self._source: Callable[[list[Entry]], list[np.ndarray]]
        if is_orbax(folder):
            orbax = OrbaxFolder(folder, VideoXL2Config.from_hf(folder), verify=verify)
            chosen, table = dtype or orbax.dtype, orbax.entries
            self._source = lambda parts: [
                cast(array, chosen, f"{folder}: {e.name}") for e, array in zip(parts, orbax.read(parts), strict=True)
            ]
        else:
            torch = TorchCheckpoint(folder)
            chosen, table = torch.dtype(dtype), torch.entries
            self._source = lambda parts: [torch.read(entry, chosen) for entry in parts]
        self._itemsize = DTYPES[DTYPE_NAMES[chosen]].itemsize
        self._parts: dict[str, list[Entry]] = {}
        for entry in table:
            self._parts.setdefault(entry.param, []).append(entry)

    @property
    def names(self) -> list[str]:
        """Dotted names of all parameters."""
        return list(self._parts)

    def nbytes(self, name: str) -> int:
        """Bytes of a parameter in `dtype`."""
        return sum(int(np.prod(e.shape)) for e in self._parts[name]) * self._itemsize

    def read(self, name: str) -> np.ndarray:
        """One parameter in `dtype`; layers are stacked along the first axis."""
        parts = self._parts[name]
        arrays = self._source(parts)
        return arrays[0] if parts[0].layer is None else np.stack(arrays)


def read_params(
    folder: Path,
    dtype: str | None = None,
    *,
    progress: bool = False,
    wanted: Callable[[str], bool] = lambda _: True,
    verify: bool = True,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (dotted name, array) of the parameters whose name is `wanted`. See `ParamReader`."""
    reader = ParamReader(folder, dtype, verify=verify)
    names = [n for n in reader.names if wanted(n)]
    with byte_bar("load", sum(map(reader.nbytes, names)), progress) as bar:
        for name in names:
            array = reader.read(name)
            yield name, array
            bar.update(array.nbytes)
