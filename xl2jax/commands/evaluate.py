"""`xl2jax eval`: benchmarks of video understanding from local files."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from xl2jax.system.tables import print_table
from xl2jax.system.terminal import flag_errors, require_stdout


@dataclasses.dataclass(frozen=True)
class CheckArgs:
    """Compares prompts, paths, extractions, scores and aggregates with golden files. Exits with 0 if all agree."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of golden files, {task}__upstream.json and {task}__lmms_eval.json."""
    json: bool = False
    """Prints one JSON object instead of a table."""


def check() -> int:
    """`xl2jax eval check`. Returns 1 where a file differs."""
    with flag_errors():
        args = tyro.cli(CheckArgs, prog="xl2jax eval check")
    require_stdout()
    from xl2jax.benchmarks.golden_files import check_folder

    comparisons = list(check_folder(args.folder))
    agree = all(c.agrees for c in comparisons)
    rows = [c.row() for c in comparisons]
    if args.json:
        print(json.dumps({"agree": agree, "files": rows}, ensure_ascii=False))
    else:
        print_table(rows, decimals=3)
    return 0 if agree else 1


SUBCOMMANDS: dict[str, Callable[[], int]] = {"check": check}


def main() -> int:
    """Runs the command and returns its exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    sys.argv = [f"xl2jax eval {name}", *sys.argv[2:]]
    return SUBCOMMANDS[name]()
