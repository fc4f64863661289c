"""Files of JSON lines that a run appends to, a line at a time, so that a killed run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from xl2jax.system.schema import parse_json, require_regular, unreadable


def append_line(out: IO[bytes], row: Mapping[str, Any]) -> None:
    """Appends a line to an unbuffered file and waits until it is on the disk. Raises OSError."""
    left = memoryview(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    while left:
        left = left[out.write(left) :]
    os.fsync(out.fileno())


def finished_lines[T](path: Path, schema: type[T], *, repair: bool) -> Iterator[T]:
    """The complete lines of a file; none where it does not exist.

    A killed run may leave its last line incomplete. That line is passed over, and removed with `repair`.

    Raises UserError for a file that cannot be read, and for a line that is not a `schema`.
    """
    try:
        require_regular(path)
        with open(path, "r+b" if repair else "rb") as f:
            end = 0
            for number, text in enumerate(f, 1):
                if not text.endswith(b"\n"):
                    if repair:
                        f.truncate(end)
                    return
                end += len(text)
                yield parse_json(text, schema, f"{path}: line {number}")
    except FileNotFoundError:
        return
    except OSError as e:
        raise unreadable(path, e) from None
