"""`xl2jax verify CASE_DIR ...`: compares every stage with tensors dumped from upstream."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from xl2jax.commands.flags import DeviceFlags, choices
from xl2jax.config import VideoXL2Config, Weights
from xl2jax.errors import UserError
from xl2jax.evaluation.picture_case import is_picture_case, verify_pictures
from xl2jax.evaluation.verify import SECTIONS, STEMS, Row, verify
from xl2jax.inference.devices import Devices
from xl2jax.models.dts import NORM_GROUPS
from xl2jax.system.terminal import flag_errors

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Args:
    """Compares the model with tensors dumped from upstream."""

    case_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders with checkpoint/, inputs.safetensors, case.json and expected/."""
    only: str | None = None
    """Comma-separated sections to compare (dense,chunked,bilevel,train); by default all that expected/ holds."""
    dtype: Literal["float32", "float64"] = "float32"
    """dtype of the computation. In float64 all tensors agree with float64 goldens to 1e-9."""
    cache_dtype: Literal["int8"] | None = None
    """dtype of the video's KV; by default --dtype. int8 has a wider limit."""
    weights: Weights | None = None
    """Quantises the LLM's matrices, with wider limits and without training; greedy ids are then reported only."""
    devices: tyro.conf.OmitArgPrefixes[DeviceFlags] = dataclasses.field(default_factory=DeviceFlags)
    json: bool = False
    """Prints one JSON object instead of tables."""


def main() -> int:
    with flag_errors():
        args = tyro.cli(Args, prog="xl2jax verify")
    if not args.case_dirs:
        raise UserError("no case folder is given")
    chosen = {folder: _sections(folder, args) for folder in args.case_dirs}
    if args.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    reports = []
    meshes = args.devices.devices().meshes()
    for folder, sections in chosen.items():
        if not args.json:
            print(f"{folder}, computed in {args.dtype}")
        rows = [row for mesh in meshes for row in _verify_case(folder, sections, args, mesh)]
        passed = all(r.ok for r in rows) and bool(rows)
        reports.append({"case": str(folder), "passed": passed, "rows": [_as_json(r) for r in rows]})
        if not args.json and not passed:
            print(f"{folder}: {sum(not r.ok for r in rows)} of {len(rows)} tensors differ", file=sys.stderr)
    everything = all(r["passed"] for r in reports)
    if args.json:
        print(json.dumps({"passed": everything, "dtype": args.dtype, "cases": reports}))
    return 0 if everything else 1


def _sections(folder: Path, args: Args) -> tuple[str, ...]:
    """The sections of a case to compare. Raises UserError for an unknown section, or one that float32 cannot decide."""
    expected = folder / "expected"
    available = tuple(s for s in SECTIONS if (expected / f"{STEMS.get(s, s)}.safetensors").is_file())
    chosen = available if args.only is None else tuple(choices("--only", args.only, SECTIONS))
    devices = args.devices.devices()
    if "train" in chosen and devices.count > 1:
        if args.only is not None:
            raise UserError(f"--only {args.only}: training is verified on one device: leave out --tensor and --copies")
        chosen = tuple(s for s in chosen if s != "train")
    if "train" in chosen and args.weights is not None:
        if args.only is not None:
            raise UserError(f"--only {args.only} and --weights: quantised matrices have no gradients: leave out train")
        chosen = tuple(s for s in chosen if s != "train")
    if not (folder / "case.json").is_file():
        raise UserError(f"{folder}: not a case folder (no case.json)")
    alone = args.weights is None and args.cache_dtype is None and devices == Devices()
    if is_picture_case(folder) and not alone:
        raise UserError(
            f"{folder}: pictures are compared without --weights, --cache-dtype, --tensor and --copies: leave them out"
        )
    config = VideoXL2Config.from_hf(folder / "checkpoint")
    devices.check(config.with_weights(args.weights))
    width = config.vision.width
    if "train" in chosen and args.dtype == "float32" and width == NORM_GROUPS:
        reason = (
            f"{folder}: vision width {width} normalises one channel a group: float32 is too coarse for its gradients"
        )
        if args.only is not None:
            raise UserError(f"{reason}: use --dtype float64")
        logger.info("%s; they are compared with --dtype float64 only", reason)
        chosen = tuple(s for s in chosen if s != "train")
    if not chosen:
        raise UserError(f"{folder}: nothing to compare in {args.dtype}")
    return chosen


def _verify_case(folder: Path, sections: tuple[str, ...], args: Args, mesh: Mesh | None) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if not args.json:
            print(f"{'tensor':32} {'shape':>20} {'relative L2':>12} {'max abs':>10}  ok")
        for row in _compared(folder, sections, Path(scratch) / "checkpoint", args, mesh):
            rows.append(row)
            if not args.json:
                shape = "x".join(map(str, row.shape))
                mark = "ok" if row.ok else "WRONG"
                print(f"{row.name:32} {shape:>20} {row.relative_l2:12.2e} {row.max_abs:10.2e}  {mark}", flush=True)
    return rows


def _compared(folder: Path, sections: tuple[str, ...], converted: Path, args: Args, mesh: Mesh | None) -> Iterator[Row]:
    if is_picture_case(folder):
        return verify_pictures(folder, sections, converted, dtype=args.dtype)
    quantized = args.cache_dtype == "int8"
    return verify(folder, sections, converted, dtype=args.dtype, quantized=quantized, weights=args.weights, mesh=mesh)


def _as_json(row: Row) -> dict[str, Any]:
    """A row as JSON, which has null for infinity."""
    fields = dataclasses.asdict(row)
    return {k: None if isinstance(x, float) and not np.isfinite(x) else x for k, x in fields.items()}
