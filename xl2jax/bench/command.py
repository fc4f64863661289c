"""`xl2jax bench prefill|decode|answers|read|kernels|e2e|cards|serve|live|check|train`.

Every row of `prefill`, `decode`, `read` and `e2e --video` runs in a process of its own, so that it has its own peak
memory and compilation. The other commands run in one process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import tyro

from xl2jax.bench.answers import AnswersArgs, answer_rows
from xl2jax.bench.cards import CardsArgs, card_rows
from xl2jax.bench.e2e import E2EArgs, e2e_rows
from xl2jax.bench.file import file_row, plot_rows
from xl2jax.bench.kernels import KernelArgs, kernel_rows
from xl2jax.bench.live import LiveBenchArgs, live_rows
from xl2jax.bench.llm import DecodeArgs, PrefillArgs, decode_row, prefill_row
from xl2jax.bench.matrices import matrix_rows
from xl2jax.bench.read import MODES, ReadArgs, ensure_video, parse_synthetic, read_row
from xl2jax.bench.rounding import CheckArgs, rounding_tables
from xl2jax.bench.serve import ServeBenchArgs, serve_rows
from xl2jax.bench.setup import machine
from xl2jax.bench.train import TrainBenchArgs, train_rows
from xl2jax.commands.flags import BilevelFlags, PrefillFlags, choices, require_checkpoint, whole_numbers
from xl2jax.config import FRAMES_PER_GROUP, PRESETS
from xl2jax.errors import UserError, require_number, require_whole
from xl2jax.ops.attention import check_name
from xl2jax.system.atomic import check_file_target
from xl2jax.system.backend import start_backend
from xl2jax.system.tables import print_table
from xl2jax.system.terminal import flag_errors, run_command

type _RowArgs = PrefillArgs | DecodeArgs | ReadArgs | E2EArgs

ROWS: dict[str, tuple[type, Callable[..., dict[str, Any]]]] = {
    "prefill": (PrefillArgs, prefill_row),
    "decode": (DecodeArgs, decode_row),
    "read": (ReadArgs, read_row),
    "e2e": (E2EArgs, file_row),
}
"""Commands that run a process for each row: the type of their flags, and the function that a process runs."""


def main() -> None:
    if sys.argv[1:2] == ["row"]:
        _print_row(sys.argv[2])
        return
    flags: dict[str, Any] = {name: kind for name, (kind, _) in _COMMANDS.items()}
    with flag_errors():
        args = tyro.extras.subcommand_cli_from_dict(flags, prog="xl2jax bench")
    run = next(function for kind, function in _COMMANDS.values() if isinstance(args, kind))
    run(args)


def _prefill(args: PrefillArgs) -> None:
    _check_preset(args.preset)
    check_name(args.attention)
    args.prefill.config()  # raises UserError for sizes out of range
    _check_step_groups(args.step_groups)
    modes = choices("--modes", args.modes, ("chunked", "dense"))
    _run_rows("prefill", args, modes, whole_numbers("--groups", args.groups))


def _decode(args: DecodeArgs) -> None:
    _check_preset(args.preset)
    check_name(args.attention)
    args.decode.bilevel()  # raises UserError for sizes out of range
    modes = choices("--modes", args.modes, ("dense", "bilevel"))
    _run_rows("decode", args, modes, whole_numbers("--groups", args.groups))


def _answers(args: AnswersArgs) -> None:
    args.check()
    start_backend()
    _print_rows(answer_rows(args), args.json)


def _cards(args: CardsArgs) -> None:
    args.check()
    start_backend(keep_programs=False)
    _print_rows(card_rows(args), args.json)


def _serve(args: ServeBenchArgs) -> None:
    args.check()
    _print_rows(serve_rows(args), args.json)


def _live(args: LiveBenchArgs) -> None:
    args.check()
    start_backend()
    _print_rows(live_rows(args), args.json)


def _read(args: ReadArgs) -> None:
    require_whole("--size", args.size, 1, 4096)
    modes, frames = choices("--modes", args.modes, MODES), whole_numbers("--frames", args.frames)
    _check_video(args.video, args.synthetic)
    _run_rows("read", args, modes, frames)


def _kernels(args: KernelArgs) -> None:
    whole_numbers("--groups", args.groups)
    whole_numbers("--windows", args.windows, low=0)
    start_backend(keep_programs=False)
    if jax.default_backend() != "gpu":
        raise UserError("bench kernels needs a GPU; the tests check the kernel without one")

    def rows() -> Iterator[dict[str, Any]]:
        copy = math.nan
        for row in kernel_rows(args):
            copy = row.get("copy_gb_s", copy)
            yield row
        yield from matrix_rows(copy)

    _print_rows(rows(), args.json)


def _train(args: TrainBenchArgs) -> None:
    args.check()
    start_backend(keep_programs=False)
    _print_rows(train_rows(args), args.json)


def _e2e(args: E2EArgs) -> None:
    _check_preset(args.preset)
    check_name(args.attention)
    require_whole("--profile", args.profile, 0)
    require_whole("--dense-up-to", args.dense_up_to, 0)
    require_number("--fps", args.fps)
    if not 0 < args.fps <= 1000:
        raise UserError(f"--fps must be above 0, and at most 1000, not {args.fps}")
    if args.plot is not None:
        check_file_target(args.plot)
    args.prefill.config()  # both raise UserError for sizes out of range
    args.decode.bilevel()
    _check_step_groups(args.step_groups)
    frames = whole_numbers("--frames", args.frames)
    if any(f % FRAMES_PER_GROUP for f in frames):
        raise UserError(f"--frames: multiples of {FRAMES_PER_GROUP}, not {args.frames!r}")
    _check_file_flags(args)
    if args.video is None and args.synthetic is None:
        start_backend(keep_programs=False)
        _print_rows(e2e_rows(args), args.json)
        return
    _check_video(args.video, args.synthetic or "")
    rows = _run_rows("e2e", args, ["watch"], frames)
    if args.plot is not None:
        plot_rows(args.plot, rows)


def _check(args: CheckArgs) -> None:
    args.kinds()  # raises UserError
    require_checkpoint(args.checkpoint)
    start_backend()
    table, layers = rounding_tables(args)
    if args.json:
        print(json.dumps({"machine": machine(), "rows": table, "layers": layers}))
        return
    print(machine())
    print_table(table, decimals=4)
    print("\nKV in 8 bits, by layer")
    print_table(layers, decimals=4)


_COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {
    "prefill": (PrefillArgs, _prefill),
    "decode": (DecodeArgs, _decode),
    "answers": (AnswersArgs, _answers),
    "read": (ReadArgs, _read),
    "kernels": (KernelArgs, _kernels),
    "e2e": (E2EArgs, _e2e),
    "cards": (CardsArgs, _cards),
    "serve": (ServeBenchArgs, _serve),
    "live": (LiveBenchArgs, _live),
    "check": (CheckArgs, _check),
    "train": (TrainBenchArgs, _train),
}


def _check_preset(preset: str) -> None:
    if preset not in PRESETS:
        raise UserError(f"--preset: choose from {', '.join(PRESETS)}, not {preset!r}")


def _check_step_groups(step_groups: int | None) -> None:
    if step_groups is not None and step_groups < 1:
        raise UserError(f"--step-groups must be 1 or more, not {step_groups}")


def _check_file_flags(args: E2EArgs) -> None:
    """Raises UserError for flags that have no effect with a video file, or no effect without one."""
    of_files = ("checkpoint", "fps", "offload", "plot")
    of_random = ("preset", "step_groups", "dense_up_to", "whole", "check", "profile")
    file = args.video is not None or args.synthetic is not None
    given = [n for n in (of_random if file else of_files) if getattr(args, n) != getattr(E2EArgs, n)]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{flag} {'has no effect with' if file else 'needs'} --video or --synthetic")


def _check_video(video: Path | None, synthetic: str) -> None:
    """Makes the synthetic video before anything is timed. Raises UserError where there is no video."""
    if video is None:
        parse_synthetic(synthetic)
    elif not video.exists():
        raise UserError(f"{video}: no such video")
    ensure_video(video, synthetic)


def _run_rows(command: str, args: _RowArgs, modes: list[str], sizes: list[int]) -> list[dict[str, Any]]:
    """Runs a process for each size and mode, and prints all rows at the end."""
    rows = []
    for size in sizes:
        for mode in modes:
            print(f"{command} {mode} {size} ...", file=sys.stderr, flush=True)
            rows.append(_in_own_process(command, args, mode, size))
    if args.json:
        print(json.dumps(rows))
    else:
        print(machine())
        print_table(_compared(rows), decimals=2)
    return rows


def _in_own_process(command: str, args: _RowArgs, mode: str, size: int) -> dict[str, Any]:
    payload = json.dumps([command, dataclasses.asdict(args), mode, size], default=str)
    run = subprocess.run(
        [sys.executable, "-m", "xl2jax", "bench", "row", payload], stdout=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        raise UserError(f"bench {command} {mode} of size {size} failed (status {run.returncode})")
    return json.loads(run.stdout.splitlines()[-1])


def _print_row(payload: str) -> None:
    """The process of one row."""
    command, fields, mode, size = json.loads(payload)
    kind, row = ROWS[command]
    start_backend(keep_programs=False)  # a row measures its own compilation
    print(json.dumps(row(restored(kind, fields), mode, size)))


def restored(kind: type, fields: dict[str, Any]) -> Any:
    """Flags from their JSON: the inverse of `dataclasses.asdict`."""
    groups: dict[str, type] = {"prefill": PrefillFlags, "decode": BilevelFlags}
    return kind(**{name: groups[name](**value) if name in groups else value for name, value in fields.items()})


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with bytes as MB, and with their time as a multiple of the first mode's at the same size."""
    time = "seconds" if "seconds" in rows[0] else "step_ms"
    size = "groups" if "groups" in rows[0] else "frames"
    table = []
    for row in rows:
        first = next(r for r in rows if r[size] == row[size])
        shown = {k: v for k, v in row.items() if not k.endswith("_bytes")}
        shown |= {k.removesuffix("_bytes") + "_MB": v / 1e6 for k, v in row.items() if k.endswith("_bytes")}
        table.append(shown | {f"x {first['mode']}": row[time] / first[time]})
    return table


def _print_rows(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Prints one line for each row as it comes. With `as_json` these lines go to stderr, and JSON follows at the end."""
    finished = []
    lines = sys.stderr if as_json else sys.stdout
    print(machine(), file=lines, flush=True)
    for row in rows:
        finished.append(row)
        line = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(line, file=lines, flush=True)
    if as_json:
        print(json.dumps({"machine": machine(), "rows": finished}))


if __name__ == "__main__":
    run_command(main)
