"""Writes docs/cli.md, the reference of the command line, from what the commands' own --help says.

python tools/cli_reference.py            # writes docs/cli.md
python tools/cli_reference.py --check    # status 1 where docs/cli.md is not what would be written
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cli.md"

WIDE, ONE_COLUMN = "2000", "129"
"""Widths in characters. On the first no help text is wrapped; on the second long help has no boxes side by side."""

# Read by the library that prints help.
os.environ |= {"COLUMNS": WIDE, "NO_COLOR": "1", "TERM": "dumb"}

INTRODUCTION = """\
# Command line

This page is generated from the flags by `make docs` (`tools/cli_reference.py`); do not edit it by hand.

`xl2jax COMMAND` and `python -m xl2jax COMMAND` are the same. `python infer.py` is `xl2jax infer` and `python train.py` is
`xl2jax train`, for use in a checkout.

Every command prints its results to standard output and everything else to standard error. An error that a user can cause
is one line on standard error and exit status 2. Ctrl-C is exit status 130.
"""


def run_help(*command: str) -> str:
    """What `xl2jax COMMAND --help` prints, with all boxes below each other."""
    text = printed_help(*command)
    if "││" not in text:
        return text
    os.environ["COLUMNS"] = ONE_COLUMN
    try:
        return printed_help(*command)
    finally:
        os.environ["COLUMNS"] = WIDE


def printed_help(*command: str) -> str:
    from xl2jax.__main__ import dispatch

    raw = io.BytesIO()
    text = io.TextIOWrapper(raw, encoding="utf-8")  # the encoding decides how tables are drawn
    saved, sys.argv = sys.argv, ["xl2jax", *command, "--help"]
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            dispatch()
    finally:
        sys.argv = saved
        text.flush()
    return re.sub(r"\x1b\[[0-9;]*m", "", raw.getvalue().decode()).replace(f"{ROOT}/", "")


def entries(box: list[str]) -> Iterator[tuple[str, str]]:
    """(flag with its values, help) of each option of a box."""
    name, words = "", list[str]()
    for line in box:
        if line.startswith(" "):
            words.append(line.strip())
            continue
        if name:
            yield name, " ".join(words)
        name, _, first = re.sub(r" {2,}", "\0", line.strip()).partition("\0")
        words = [first] if first else []
    if name:
        yield name, " ".join(words)


def boxes(text: str) -> dict[str, list[str]]:
    """The lines of each box of a help text by the box's title."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("╭"):
            lines = found[line.strip("╭╮─ ")] = []
        elif line.startswith("│"):
            lines.append(line[2:-1].rstrip())
    return found


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def section(command: tuple[str, ...]) -> Iterator[str]:
    """The Markdown lines of one command and of its subcommands."""
    text = run_help(*command)
    yield f"\n## xl2jax {' '.join(command)}\n"
    before = text.partition("╭")[0].strip().split("\n\n")
    yield from (f"{' '.join(paragraph.split())}\n" for paragraph in before[1:])
    subcommands: list[str] = []
    for title, lines in boxes(text).items():
        if title == "subcommands":
            subcommands = [m.group(1) for line in lines if (m := re.match(r"\s*• (\S+)", line))]
            yield "Subcommands: " + ", ".join(f"`{s}`" for s in subcommands) + ".\n"
            continue
        rule = next((i for i, line in enumerate(lines) if set(line.strip()) == {"─"}), None)
        if rule is not None:  # above it stands what the flags of the box have in common
            yield " ".join(line.strip() for line in lines[:rule]) + "\n"
            lines = lines[rule + 1 :]
        rows = [(flag, words) for flag, words in entries(lines) if not flag.startswith("-h,")]
        if not rows:
            continue
        yield "| argument | default | meaning |\n| --- | --- | --- |"
        for flag, words in rows:
            if not flag.startswith("-"):  # a positional argument
                name, values = flag, ""
            elif ", " in flag:  # --x, --no-x
                name, values = flag.replace(", ", "` `"), ""
            else:
                name, _, values = flag.partition(" ")
                values = values.removeprefix("{None}|").replace("|", " / ")
            mark = re.search(r"\s*\((?:default: (.*)|(required)|(repeatable))\)$", words)
            default = ""
            if mark:
                words = words[: mark.start()]
                given = mark.group(1)
                default = "required" if mark.group(2) else "repeatable" if mark.group(3) else f"`{given}`"
                default = "" if given in ("None", "") else default
            shown = f"`{name}`" + (f" `{values}`" if values else "")
            yield f"| {cell(shown)} | {cell(default)} | {cell(words)} |"
        yield ""
    for subcommand in subcommands:
        yield from section((*command, subcommand))


def page() -> str:
    """The whole of docs/cli.md."""
    from xl2jax.__main__ import COMMANDS
    from xl2jax.commands import evaluate

    lines = [INTRODUCTION]
    for command in COMMANDS:
        lines += section((command,))
        if command == "eval":  # its subcommands are optional, so that its help does not list them
            for subcommand in evaluate.SUBCOMMANDS:
                lines += section((command, subcommand))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/cli.md is stale: run `make docs`, and commit it", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
