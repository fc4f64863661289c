"""Converts a checkpoint from the PyTorch layout to Orbax and back, a few tensors at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from xl2jax.checkpoint.orbax_folder import OrbaxFolder, OrbaxWriter
from xl2jax.checkpoint.param_names import Entry
from xl2jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES, cast
from xl2jax.checkpoint.torch_folder import TorchCheckpoint, copy_companions, write_torch
from xl2jax.config import VideoXL2Config
from xl2jax.system.atomic import replacing_folder
from xl2jax.system.terminal import byte_bar


def torch_to_orbax(source: Path, target: Path, dtype: str | None, *, progress: bool = False) -> None:
    """Converts a folder in the PyTorch layout. Host memory holds a few tensors at a time.

    Raises:
      UserError: `source` is incomplete or damaged, or `target` cannot be written. Then `target` does not exist.
    """
    torch = TorchCheckpoint(source)
    chosen = torch.dtype(dtype)
    total = sum(math.prod(e.shape) for e in torch.entries) * DTYPES[DTYPE_NAMES[chosen]].itemsize
    unused = sum(torch.files.nbytes(n) for n in torch.unused)
    with replacing_folder(target, total + unused) as folder, byte_bar("convert", total, progress) as bar:
        copy_companions(source, folder)
        writer = OrbaxWriter(folder, chosen)
        for entry in torch.entries:
            array = torch.read(entry, chosen)
            writer.write(entry.name, array)
            bar.update(array.nbytes)
        writer.write_unused(torch.files, torch.unused)
        writer.finish()


def orbax_to_torch(
    source: Path, target: Path, dtype: str | None, *, progress: bool = False, verify: bool = True
) -> None:
    """Converts an Orbax model folder to sharded safetensors, a tensor at a time. Raises as `torch_to_orbax` does."""
    config = VideoXL2Config.from_hf(source)
    orbax = OrbaxFolder(source, config, verify=verify)
    orbax.verify_unused()
    chosen = dtype or orbax.dtype

    def read(entry: Entry) -> np.ndarray:
        return cast(orbax.read([entry])[0], chosen, f"{source}: {entry.name}")

    write_torch(target, config, read, chosen, companions=source, progress=progress)
