"""Converts a checkpoint from the PyTorch layout to Orbax and back, a few tensors at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xl2jax.checkpoint.orbax_folder import OrbaxFolder, OrbaxWriter
from xl2jax.checkpoint.param_names import Entry, tensors
from xl2jax.checkpoint.quantizing import base_name, dequantized, named_parts, quantized, weights_of
from xl2jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES, cast
from xl2jax.checkpoint.torch_folder import TorchCheckpoint, copy_companions, write_torch
from xl2jax.config import VideoXL2Config, Weights
from xl2jax.ops.weights import QuantizedMatrix
from xl2jax.system.atomic import replacing_folder
from xl2jax.system.terminal import byte_bar


def torch_to_orbax(
    source: Path,
    target: Path,
    dtype: str | None,
    weights: Weights | None = None,
    *,
    calibrated: Mapping[str, QuantizedMatrix] | None = None,
    progress: bool = False,
) -> None:
    """Converts a folder in the PyTorch layout. Host memory holds a few tensors at a time.

    `weights` quantises the LLM's matrices, from the numbers as they are stored. `dtype` is that of all other tensors.
    `calibrated` are matrices that were quantised before, by their names (`xl2jax.inference.calibration`).

    Raises:
      UserError: `source` is incomplete or damaged, or `target` cannot be written. Then `target` does not exist.
    """
    torch = TorchCheckpoint(source)
    chosen = torch.dtype(dtype)
    config = torch.config.with_weights(weights)
    itemsize = DTYPES[DTYPE_NAMES[chosen]].itemsize
    total = sum(math.prod(t.shape) * (itemsize if t.dtype is None else t.dtype.itemsize) for t in tensors(config))
    unused = sum(torch.files.nbytes(n) for n in torch.unused)
    with replacing_folder(target, total + unused) as folder, byte_bar("convert", total, progress) as bar:
        copy_companions(source, folder)
        writer = OrbaxWriter(folder, chosen, weights)
        for entry in torch.entries:
            (array,) = torch.read([entry])
            kind, where = weights_of(entry, config), f"{source}: {entry.torch_name}"
            ready = None if calibrated is None else calibrated.get(base_name(entry.name))
            if kind is None:
                parts = {entry.name: cast(array, chosen, where)}
            elif ready is not None:
                parts = named_parts(base_name(entry.name), ready)
            else:
                parts = quantized(entry, array, kind, chosen, where)
            for name, part in parts.items():
                writer.write(name, part)
                bar.update(part.nbytes)
        writer.write_unused(torch.files, torch.unused)
        writer.finish()


def orbax_to_torch(
    source: Path, target: Path, dtype: str | None, *, progress: bool = False, verify: bool = True
) -> None:
    """Converts an Orbax model folder to sharded safetensors, a tensor at a time. Raises as `torch_to_orbax` does.

    Matrices in 8 or 4 bits are unpacked, because upstream's layout has no others.
    """
    config = VideoXL2Config.from_hf(source)
    orbax = OrbaxFolder(source, config, verify=verify)
    orbax.verify_unused()
    chosen = dtype or orbax.dtype

    def read(entry: Entry) -> np.ndarray:
        if weights_of(entry, orbax.config) is None:
            (array,) = orbax.read([entry])
        else:
            parts = [t for t in orbax.tensors if t.dtype is not None and base_name(t.name) == base_name(entry.name)]
            array = dequantized(entry.name, dict(zip((t.name for t in parts), orbax.read(parts), strict=True)))
        return cast(array, chosen, f"{source}: {entry.name}")

    write_torch(target, config, read, chosen, companions=source, progress=progress)
