"""`python -m xl2jax.convert SRC DST`: the PyTorch checkpoint to Orbax, and back with `--reverse`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xl2jax.checkpoint import find_checkpoint, is_orbax, orbax_to_torch, torch_to_orbax
from xl2jax.errors import UserError
from xl2jax.terminal import run_command


@dataclasses.dataclass(frozen=True)
class Args:
    """Converts a Video-XL-2 checkpoint between the PyTorch layout and Orbax."""

    src: Annotated[str, tyro.conf.Positional]
    """Folder with config.json and safetensors files, or a hub id (with --reverse: an Orbax folder)."""
    dst: Annotated[Path, tyro.conf.Positional]
    """Folder to make; it must not exist."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Stored dtype of the result; the source's own by default."""
    reverse: bool = False
    """Orbax to the PyTorch layout."""


def main() -> None:
    args = tyro.cli(Args, prog="python -m xl2jax.convert")
    source = find_checkpoint(args.src)
    if args.reverse != is_orbax(source):
        kind = "is an Orbax checkpoint: add --reverse" if is_orbax(source) else "is not an Orbax checkpoint of xl2jax"
        raise UserError(f"{source} {kind}")
    convert = orbax_to_torch if args.reverse else torch_to_orbax
    convert(source, args.dst, args.dtype, progress=True)
    print(f"wrote {args.dst}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
