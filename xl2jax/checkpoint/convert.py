"""`python -m xl2jax convert SRC DST`: the PyTorch checkpoint to Orbax, and back with `--reverse`."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from xl2jax.checkpoint.orbax_folder import OrbaxFolder, OrbaxWriter, is_orbax
from xl2jax.checkpoint.param_names import Entry
from xl2jax.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES, DtypeName, cast
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.checkpoint.torch_folder import TorchCheckpoint, copy_companions, write_torch
from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.system.atomic import replacing_folder
from xl2jax.system.terminal import byte_bar, run_command


@dataclasses.dataclass(frozen=True)
class Args:
    """Converts a Video-XL-2 checkpoint between the PyTorch layout and Orbax."""

    src: Annotated[str, tyro.conf.Positional]
    """Folder with config.json and safetensors files, or a hub id (with --reverse: an Orbax folder)."""
    dst: Annotated[Path, tyro.conf.Positional]
    """Folder to make; it must not exist."""
    dtype: DtypeName | None = None
    """Stored dtype of the result; the source's own by default."""
    reverse: bool = False
    """Orbax to the PyTorch layout."""
    verify_checksums: bool = True
    """Compares each tensor of an Orbax folder with the checksum that was kept when it was made."""


def torch_to_orbax(source: Path, target: Path, dtype: str | None, *, progress: bool = False) -> None:
    """Converts a PyTorch-layout folder; peak memory is a few tensors.

    Raises UserError where `source` is not whole or `target` cannot be made; nothing is left behind then.
    """
    torch = TorchCheckpoint(source)
    chosen = torch.dtype(dtype)
    total = sum(math.prod(e.shape) for e in torch.entries) * DTYPES[DTYPE_NAMES[chosen]].itemsize
    kept = sum(torch.files.nbytes(n) for n in torch.unused)
    with replacing_folder(target, total + kept) as place, byte_bar("convert", total, progress) as bar:
        copy_companions(source, place)
        writer = OrbaxWriter(place, chosen)
        for entry in torch.entries:
            array = torch.read(entry, chosen)
            writer.write(entry.name, array)
            bar.update(array.nbytes)
        writer.write_unused(torch.files, torch.unused)
        writer.finish()


def orbax_to_torch(
    source: Path, target: Path, dtype: str | None, *, progress: bool = False, verify: bool = True
) -> None:
    """Converts an Orbax model folder back to sharded safetensors, a tensor at a time. Errors as in `torch_to_orbax`."""
    config = VideoXL2Config.from_hf(source)
    orbax = OrbaxFolder(source, config, verify=verify)
    orbax.verify_unused()
    chosen = dtype or orbax.dtype

    def read(entry: Entry) -> np.ndarray:
        return cast(orbax.read([entry])[0], chosen, f"{source}: {entry.name}")

    write_torch(target, config, read, chosen, companions=source, progress=progress)


def main() -> None:
    args = tyro.cli(Args, prog="python -m xl2jax convert")
    source = find_checkpoint(args.src)
    if args.reverse != is_orbax(source):
        kind = "is an Orbax checkpoint: add --reverse" if is_orbax(source) else "is not an Orbax checkpoint of xl2jax"
        raise UserError(f"{source} {kind}")
    if args.reverse:
        orbax_to_torch(source, args.dst, args.dtype, progress=True, verify=args.verify_checksums)
    elif not args.verify_checksums:
        raise UserError("--no-verify-checksums has no effect without --reverse: leave it out")
    else:
        torch_to_orbax(source, args.dst, args.dtype, progress=True)
    print(f"wrote {args.dst}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
