"""`python -m xl2jax bench prefill|decode|read|kernels|e2e|train`.

Every row of `prefill`, `decode`, `read` and `e2e --video` runs in a process of its own, so that peak memory and compilation are
its own; the others are one process each.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import tyro

from xl2jax.bench.e2e import E2EArgs, e2e_rows
from xl2jax.bench.file import file_row, plot_rows
from xl2jax.bench.kernels import KernelArgs, kernel_rows
from xl2jax.bench.llm import DecodeArgs, PrefillArgs, decode_row, prefill_row
from xl2jax.bench.read import ReadArgs, check_modes, parse_synthetic, read_row, the_file
from xl2jax.bench.setup import machine
from xl2jax.bench.train import TrainBenchArgs, train_rows
from xl2jax.config import FRAMES_PER_GROUP, PRESETS
from xl2jax.errors import UserError
from xl2jax.system.backend import start_backend
from xl2jax.system.terminal import run_command

ROWS: dict[str, tuple[type, Callable[..., dict[str, Any]]]] = {
    "prefill": (PrefillArgs, prefill_row),
    "decode": (DecodeArgs, decode_row),
    "read": (ReadArgs, read_row),
    "e2e": (E2EArgs, file_row),
}


type _Args = PrefillArgs | DecodeArgs | ReadArgs | E2EArgs


def _in_own_process(command: str, args: _Args, mode: str, groups: int) -> dict[str, Any]:
    payload = json.dumps([command, dataclasses.asdict(args), mode, groups], default=str)
    run = subprocess.run(
        [sys.executable, "-m", "xl2jax", "bench", "row", payload], stdout=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        raise UserError(f"bench {command} {mode} with {groups} groups failed (status {run.returncode})")
    return json.loads(run.stdout.splitlines()[-1])


def _row(payload: str) -> None:
    command, fields, mode, groups = json.loads(payload)
    kind, row = ROWS[command]
    start_backend(keep_programs=False)  # what a row compiles is part of what it measures
    print(json.dumps(row(kind(**fields), mode, groups)))


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns, with the ratio of seconds to the first mode's at the same groups."""
    cost = "seconds" if "seconds" in rows[0] else "step_ms"
    size = "groups" if "groups" in rows[0] else "frames"
    table = []
    for row in rows:
        base = next(r for r in rows if r[size] == row[size])
        shown = {k: v for k, v in row.items() if not k.endswith("bytes")}
        shown |= {k.removesuffix("_bytes") + "_MB": v / 1e6 for k, v in row.items() if k.endswith("bytes")}
        shown[f"x {base['mode']}"] = row[cost] / base[cost]
        table.append({k: f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in shown.items()})
    names = list(table[0])
    widths = [max(len(n), *(len(r[n]) for r in table)) for n in names]
    for line in (dict(zip(names, names, strict=True)), *table):
        print("  ".join(line[n].rjust(w) for n, w in zip(names, widths, strict=True)))


def _print_rows(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """A line a row as it comes: their fields differ. JSON is printed whole at the end, lines then go to stderr."""
    kept = []
    print(machine(), file=sys.stderr if as_json else sys.stdout, flush=True)
    for row in rows:
        kept.append(row)
        line = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        print(json.dumps({"machine": machine(), "rows": kept}))


def _whole_numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(x) for x in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{flag}: whole numbers of 1 or more separated by commas, not {text!r}")
    return numbers


def _check_sizes(args: PrefillArgs | DecodeArgs | E2EArgs) -> None:
    if args.preset not in PRESETS:
        raise UserError(f"--preset: choose from {', '.join(PRESETS)}")
    least = min(
        1 if getattr(args, n, None) is None else getattr(args, n)
        for n in ("chunk_groups", "step_groups", "select_chunk_groups", "pool")
    )
    if least < 1 or getattr(args, "window_chunks", 0) < 0 or getattr(args, "top_chunks", 0) < 0:
        raise UserError("chunk, step and selection groups and pool must be 1 or more, window and top chunks 0 or more")


def main() -> None:
    if sys.argv[1:2] == ["row"]:
        _row(sys.argv[2])
        return
    commands: dict[str, Any] = {"prefill": PrefillArgs, "decode": DecodeArgs, "kernels": KernelArgs, "e2e": E2EArgs}
    commands |= {"train": TrainBenchArgs, "read": ReadArgs}
    args: PrefillArgs | DecodeArgs | KernelArgs | E2EArgs | TrainBenchArgs | ReadArgs = (
        tyro.extras.subcommand_cli_from_dict(commands, prog="python -m xl2jax bench")
    )
    if isinstance(args, KernelArgs):
        start_backend(keep_programs=False)
        if jax.default_backend() != "gpu":
            raise UserError("bench kernels needs a GPU; the tests check the kernel without one")
        _print_rows(kernel_rows(args), args.json)
        return
    if isinstance(args, TrainBenchArgs):
        if args.preset not in PRESETS or args.frames < FRAMES_PER_GROUP or args.rows < 1 or args.steps < 1:
            raise UserError(f"--preset is one of {', '.join(PRESETS)}; 4 frames, 1 row and 1 step are the least")
        start_backend(keep_programs=False)
        _print_rows(train_rows(args), args.json)
        return
    if isinstance(args, ReadArgs):
        modes, counts = check_modes(args.modes), _whole_numbers("--frames", args.frames)
        _make_file(args.video, args.synthetic)
        _rows_in_processes("read", args, modes, counts)
        return
    _check_sizes(args)
    if isinstance(args, E2EArgs):
        if any(f % FRAMES_PER_GROUP for f in _whole_numbers("--frames", args.frames)):
            raise UserError(f"--frames: multiples of {FRAMES_PER_GROUP}, not {args.frames!r}")
        _check_file_flags(args)
        if args.video is not None or args.synthetic is not None:
            _make_file(args.video, args.synthetic or "")
            rows = _rows_in_processes("e2e", args, ["watch"], _whole_numbers("--frames", args.frames))
            if args.plot is not None:
                plot_rows(args.plot, rows)
            return
        start_backend(keep_programs=False)
        _print_rows(e2e_rows(args), args.json)
        return
    command = "prefill" if isinstance(args, PrefillArgs) else "decode"
    modes, known = args.modes.split(","), {"chunked", "dense"} if command == "prefill" else {"dense", "bilevel"}
    if not set(modes) <= known:
        raise UserError(f"--modes: choose from {', '.join(sorted(known))}")
    _rows_in_processes(command, args, modes, _whole_numbers("--groups", args.groups))


def _check_file_flags(args: E2EArgs) -> None:
    """Raises UserError for flags that mean nothing beside --video and --synthetic, or nothing without them."""
    of_files = ("checkpoint", "fps", "cache_dtype", "offload", "plot")
    of_random = ("preset", "step_groups", "dense_up_to", "whole", "check", "profile")
    file = args.video is not None or args.synthetic is not None
    given = [n for n in (of_random if file else of_files) if getattr(args, n) != getattr(E2EArgs, n)]
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} {'means nothing with' if file else 'needs'} --video or --synthetic"
        )


def _make_file(video: Path | None, synthetic: str) -> None:
    """Before anything is timed. Raises UserError."""
    if video is None:
        parse_synthetic(synthetic)
    elif not video.exists():
        raise UserError(f"{video}: no such video")
    the_file(video, synthetic)


def _rows_in_processes(command: str, args: _Args, modes: list[str], sizes: list[int]) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        for mode in modes:
            print(f"{command} {mode} {size} ...", file=sys.stderr, flush=True)
            rows.append(_in_own_process(command, args, mode, size))
    if args.json:
        print(json.dumps(rows))
    else:
        print(machine())
        _print_table(rows)
    return rows


if __name__ == "__main__":
    run_command(main)
