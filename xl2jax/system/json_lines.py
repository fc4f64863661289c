"""Files of JSON lines that a run appends to, a line at a time, so that a killed run can go on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from xl2jax.errors import UserError
from xl2jax.system.schema import is_file, parse_json, require_regular, unreadable


def append_line(out: IO[bytes], row: Mapping[str, Any]) -> None:
    """Appends a line to an unbuffered file and waits until it is on the disk. Raises OSError."""
    left = memoryview(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    while left:
        left = left[out.write(left) :]
    os.fsync(out.fileno())


def finished_lines[T](path: Path, schema: type[T], *, repair: bool) -> Iterator[T]:
    """The complete lines of a file; none where it does not exist.

    A killed run may leave its last line incomplete. That line is passed over, and removed with `repair`.

    Raises UserError for a file that cannot be read, for a line that is not a `schema`, and for a last line without an end
    that no killed run leaves: the file is another program's, and is left as it is.
    """
    try:
        require_regular(path)
        with open(path, "r+b" if repair else "rb") as f:
            end = 0
            for number, text in enumerate(f, 1):
                if not text.endswith(b"\n"):
                    if not _is_cut(text):
                        raise UserError(
                            f"{path}: the end of line {number} is missing: give another file, or mend this one"
                        )
                    if repair:
                        f.truncate(end)
                    return
                end += len(text)
                yield parse_json(text, schema, f"{path}: line {number}")
    except FileNotFoundError:
        return
    except OSError as e:
        raise unreadable(path, e) from None


def _is_cut(line: bytes) -> bool:
    """Whether a line is the beginning of a JSON object."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(b"{")
    return False


@contextlib.contextmanager
def locked_lines(path: Path, advice: str) -> Iterator[IO[bytes]]:
    """Opens a file for `append_line`, which no other process may do meanwhile; makes it where it does not exist.

    Raises UserError where it cannot be written, or where another process has it open; `advice` says what to do then.
    """
    try:
        is_file(path)  # opening a pipe would wait for a reader
        out = open(path, "ab", buffering=0)  # noqa: SIM115 (closed below)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None
    with out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing it: {advice}") from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield out


@contextlib.contextmanager
def resumed_rows(
    path: Path, settings: Mapping[str, Any]
) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """The rows that an earlier run with the same settings left in a file, and what adds a row to these and to the file.

    The first line of the file holds the settings, which are as JSON gives them back (lists, and no tuples).

    Raises UserError where the file cannot be written, where another process writes it, and where it holds anything else,
    in which case it is left as it is.
    """
    with locked_lines(path, "give each run a file of its own") as out:
        header, *_ = [*finished_lines(path, dict, repair=False), None]
        if header is None and os.fstat(out.fileno()).st_size:
            raise UserError(f"{path}: holds something else than results of this program: give another file")
        if header is not None and header != settings:
            raise UserError(f"{path}: was made with other settings ({header}): give another file")
        rows: list[dict[str, Any]] = list(finished_lines(path, dict, repair=True))[1:]

        def write(row: Mapping[str, Any]) -> None:
            try:
                append_line(out, row)
            except OSError as e:
                raise UserError(f"{path}: cannot be written ({e.strerror})") from None

        def add(row: dict[str, Any]) -> None:
            write(row)
            rows.append(row)

        if header is None:
            write(settings)
        yield rows, add
