"""The folder of answers: Parquet files that are each complete, and journals of the parts that are being answered.

An actor appends the answers about a video to the journal of its part as soon as it has them. When the part is complete,
its Parquet file appears, and the journal goes. Files are named by their rows, so that a part that is answered again
cannot appear twice. Names of everything else begin with a dot or an underscore, which readers of Parquet folders skip.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field

from xl2jax.errors import UserError, first_line
from xl2jax.ray.rows import Digest, Part, Row
from xl2jax.system.atomic import remove_leftovers, replacing_file
from xl2jax.system.json_lines import append_line, finished_lines
from xl2jax.system.schema import Schema, is_file, read_json

SETTINGS, LOCK = "_run.json", ".lock"

_FILE = re.compile(r"rows-(\d{12,})-(\d{12,})\.parquet")
_JOURNAL = re.compile(r"\.rows-(\d{12,})-(\d{12,})\.jsonl")
_DIGEST = b"xl2jax.asked"
_ERRORS = b"xl2jax.errors"
_LOCK_SECONDS = 60.0


class Answered(Schema):
    """A row of the output. `answer` is None where there is none, and `error` says why."""

    row: int
    id: str | None = None
    video: str | None = None
    question: str | None = None
    answer: str | None = None
    finish_reason: str | None = None
    new_tokens: int | None = None
    frames: int | None = None
    error: str | None = None


class _Line(Schema):
    """A line of a journal: rows that were answered, or the row that is tried now, or how trying it failed."""

    rows: Annotated[list[Answered], Field(default_factory=list)]
    begin: int | None = None
    fault: str | None = None


class _Settings(Schema):
    settings: dict[str, Any]


def file_of(folder: Path, first: int, last: int) -> Path:
    """The Parquet file of rows."""
    return folder / f"rows-{first:012d}-{last:012d}.parquet"


def journal_of(folder: Path, part: Part) -> Path:
    """The journal of a part."""
    return folder / f".rows-{part.first:012d}-{part.last:012d}.jsonl"


# --- for the driver ----------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, which no other run may write to meanwhile.

    Raises UserError where another run does, or where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "ab")  # noqa: SIM115 (closed below)
        remove_leftovers(folder)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({first_line(e)})") from None
    with lock:
        if not _lock(lock):
            raise UserError(f"{folder}: another run is writing to it: give each its own --output")
        yield


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes what answers depend on to the folder. Raises UserError where the folder has answers of other settings."""
    path = folder / SETTINGS
    if is_file(path):
        earlier = read_json(path, _Settings).settings
        for name in sorted(earlier.keys() | settings.keys()):
            if earlier.get(name) != settings.get(name):
                raise UserError(
                    f"{folder}: has answers of a run with {name} {_shown(earlier.get(name))}, not "
                    f"{_shown(settings.get(name))}: choose another --output"
                )
    else:
        with replacing_file(path) as beside:
            beside.write_text(json.dumps({"settings": settings}, indent=1), encoding="utf-8")


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def collect_journals(folder: Path) -> None:
    """Makes files of what an earlier run answered of the parts that it did not complete.

    Raises UserError where an actor of that run is still at work.
    """
    for path in sorted(folder.iterdir()):
        if (match := _JOURNAL.fullmatch(path.name)) is None:
            continue
        try:
            with open_journal(folder, Part(int(match[1]), int(match[2]), 0), wait=0.0, create=False) as journal:
                if journal.rows:
                    write_rows(folder, journal.rows)
                path.unlink()
        except FileNotFoundError:  # its actor has just completed it
            continue


class Done:
    """The complete files of a folder, in the order of their rows. Raises UserError where two have the same rows."""

    def __init__(self, folder: Path):
        matches = sorted((m for path in folder.iterdir() if (m := _FILE.fullmatch(path.name))), key=lambda m: int(m[1]))
        self._folder, self._spans = folder, [(int(m[1]), int(m[2])) for m in matches]
        for (_, last), (first, _) in zip(self._spans, self._spans[1:], strict=False):
            if first <= last:
                raise UserError(f"{folder}: row {first} was answered twice: the files are of different runs")

    @property
    def count(self) -> int:
        """Rows that are answered, maybe with an error."""
        return sum(last - first + 1 for first, last in self._spans)

    def left(self, rows: Iterable[tuple[int, Row]], source: Path) -> Iterator[tuple[int, Row]]:
        """Those of all rows of the input that are not answered.

        Raises UserError where an answered row asks something else than the input.
        """
        spans = iter(self._spans)
        span, digest = next(spans, None), Digest()
        for place, row in rows:
            if span is None or row.number < span[0]:
                yield place, row
                continue
            digest.add(row.video, row.question, row.id)
            if row.number == span[1]:
                path = file_of(self._folder, *span)
                if _metadata(path).get(_DIGEST) != digest.text.encode():
                    raise UserError(f"{path}: answers other rows than {source} has there: choose another --output")
                span, digest = next(spans, None), Digest()
        if span is not None:
            raise UserError(
                f"{source}: has no row {span[1]}, which {self._folder} has answers to: choose another --output"
            )


def _metadata(path: Path) -> dict[bytes, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: cannot be read ({first_line(e)}); without it its rows are asked again") from None


# --- for actors --------------------------------------------------------------------------------


class Journal:
    """The open journal of a part.

    Attributes:
      rows: what was answered so far, from the first row of the part on.
      tries: how often the next row was begun by actors that did not end it.
      fault: what the last of them said, if it could.
    """

    def __init__(self, path: Path, out: IO[bytes]):
        self._path, self._out = path, out
        self.rows: list[Answered] = []
        self.tries, self.fault = 0, None
        for line in finished_lines(path, _Line, repair=True):
            if line.rows:
                self.rows += line.rows
                self.tries, self.fault = 0, None
            elif line.begin is not None:
                self.tries += 1
            else:
                self.fault = line.fault

    def begin(self, row: int) -> None:
        """Says that a row, and those about the same video, are tried now."""
        self._append({"begin": row})

    def failed(self, fault: str) -> None:
        """Says how trying failed, before the process ends."""
        self._append({"fault": fault})

    def add(self, rows: Sequence[Answered]) -> None:
        """Keeps the next answers, all of them or none."""
        self._append({"rows": [row.model_dump(exclude_none=True) for row in rows]})
        self.rows += rows
        self.tries, self.fault = 0, None

    def _append(self, line: dict[str, Any]) -> None:
        try:
            append_line(self._out, line)
        except OSError as e:
            raise UserError(f"{self._path}: cannot be written ({first_line(e)})") from None


@contextlib.contextmanager
def open_journal(folder: Path, part: Part, *, wait: float = _LOCK_SECONDS, create: bool = True) -> Iterator[Journal]:
    """Opens the journal of a part, which no other process may do meanwhile.

    An actor that Ray takes for dead may still run for a moment: it is waited for, at most `wait` seconds. Raises UserError
    where another process has it open still, or where it cannot be read or written.
    """
    path = journal_of(folder, part)
    try:
        out = open(path, "ab" if create else "r+b", buffering=0)  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({first_line(e)})") from None
    with out:
        end = time.monotonic() + wait
        while not _lock(out):
            if time.monotonic() >= end:
                raise UserError(f"{path}: an actor of another run is still writing it: wait until it has ended")
            time.sleep(0.5)
        yield Journal(path, out)


def remove_journal(folder: Path, part: Part) -> None:
    """Removes the journal of a part whose file is there."""
    journal_of(folder, part).unlink(missing_ok=True)


def write_rows(folder: Path, rows: Sequence[Answered]) -> None:
    """Writes consecutive rows as a file, which appears complete or not at all. Raises UserError where it cannot."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = Digest()
    for row in rows:
        digest.add(row.video, row.question, row.id)
    types = {name: pa.string() for name in Answered.model_fields} | dict.fromkeys(("new_tokens", "frames"), pa.int32())
    metadata = {_DIGEST: digest.text, _ERRORS: str(count_errors(rows))}
    schema = pa.schema(list((types | {"row": pa.int64()}).items()), metadata=metadata)
    with replacing_file(file_of(folder, rows[0].row, rows[-1].row)) as beside:
        pq.write_table(pa.Table.from_pylist([row.model_dump() for row in rows], schema), beside)


def count_errors(rows: Sequence[Answered]) -> int:
    """How many rows have an error."""
    return sum(row.error is not None for row in rows)


def errors_in(path: Path) -> int:
    """How many rows of a file have an error."""
    return int(_metadata(path).get(_ERRORS, b"0"))


def _lock(file: IO[bytes]) -> bool:
    """Locks a file until it is closed. Returns False where another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems without locks
            raise
    return True
