"""`xl2jax convert SRC DST`: converts a PyTorch checkpoint to Orbax, and back with `--reverse`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from xl2jax.checkpoint.convert import orbax_to_torch, torch_to_orbax
from xl2jax.checkpoint.orbax_folder import is_orbax
from xl2jax.checkpoint.safetensors_io import DtypeName
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.config import Weights
from xl2jax.errors import UserError
from xl2jax.ops.weights import QuantizedMatrix
from xl2jax.system.atomic import check_folder_target
from xl2jax.system.backend import start_backend
from xl2jax.system.terminal import flag_errors
from xl2jax.video.clip import FrameSampling, open_video


@dataclasses.dataclass(frozen=True)
class Args:
    """Converts a Video-XL-2 checkpoint between the PyTorch layout and Orbax."""

    src: Annotated[str, tyro.conf.Positional]
    """Folder with config.json and safetensors files, or a hub id (with --reverse: an Orbax folder)."""
    dst: Annotated[Path, tyro.conf.Positional]
    """Folder to create; it must not exist."""
    dtype: DtypeName | None = None
    """dtype of the tensors in the result; by default the dtype of the source."""
    weights: Weights | None = None
    """Quantises the LLM's matrices to 8 or 4 bits; --dtype is that of all other tensors."""
    calibrate: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Video whose inputs --weights int4 is to change least (GPTQ); may be given several times. Loads the whole model."""
    calibrate_frames: int = 64
    """Frames of each of these videos."""
    reverse: bool = False
    """Converts Orbax to the PyTorch layout, in which matrices of 8 or 4 bits are unpacked."""
    verify_checksums: bool = True
    """Compares each tensor of an Orbax folder with the checksum that the folder stores for it."""


def main() -> None:
    with flag_errors():
        args = tyro.cli(Args, prog="xl2jax convert")
    source = find_checkpoint(args.src)
    if args.weights is not None and not args.reverse and is_orbax(source):
        raise UserError(
            f"{source} is an Orbax checkpoint: --weights needs the PyTorch folder or hub id that it was made from"
        )
    if args.calibrate and args.weights != "int4":
        raise UserError("--calibrate is for --weights int4: 8 bits are rounded to nearest")
    if args.calibrate_frames != Args.calibrate_frames and not args.calibrate:
        raise UserError("--calibrate-frames has no effect without --calibrate: leave it out")
    if args.reverse != is_orbax(source):
        kind = "is an Orbax checkpoint: add --reverse" if is_orbax(source) else "is not an Orbax checkpoint of xl2jax"
        raise UserError(f"{source} {kind}")
    if args.reverse and args.weights is not None:
        raise UserError("--weights has no effect with --reverse, which unpacks matrices: leave one out")
    if args.reverse:
        orbax_to_torch(source, args.dst, args.dtype, progress=True, verify=args.verify_checksums)
    elif not args.verify_checksums:
        raise UserError("--no-verify-checksums has no effect without --reverse: leave it out")
    else:
        calibrated = _calibrated(args, source) if args.calibrate else None
        torch_to_orbax(source, args.dst, args.dtype, args.weights, calibrated=calibrated, progress=True)
    print(f"wrote {args.dst}", file=sys.stderr)


def _calibrated(args: Args, source: Path) -> dict[str, QuantizedMatrix]:
    """The matrices in 4 bits, for the videos of --calibrate."""
    from xl2jax.inference.api import load
    from xl2jax.inference.calibration import calibrate

    check_folder_target(args.dst)
    clips = [open_video(video, FrameSampling(max_frames=args.calibrate_frames)) for video in args.calibrate]
    for clip in clips:
        clip.check()
    start_backend()
    return calibrate(load(source, dtype=args.dtype, progress=True), clips, progress=True)
