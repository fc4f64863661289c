"""The rows of a JSONL or Parquet file of videos and questions, read in order or from a place in the file on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pydantic_core

from xl2jax.errors import UserError, first_line, listing
from xl2jax.system.schema import require_readable, unreadable

MAX_LINE = 16 << 20
"""Bytes of a line of JSON."""

_BATCH_ROWS = 1024
_LONGEST_PART = 8
"""A video with very many questions is divided: a part has at most so many times the rows that were asked for."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns: the path of the video, the question, and, if there is one, what tells rows apart."""

    video: str = "video"
    question: str = "question"
    id: str | None = None

    @property
    def names(self) -> list[str]:
        return [self.video, self.question] + ([] if self.id is None else [self.id])


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the input. `number` counts from 0. `problem` says why it cannot be asked, if it cannot."""

    number: int
    video: str | None
    question: str | None
    id: str | None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows `first` to `last`, which one actor answers. `place` is where `first` lies in the file."""

    first: int
    last: int
    place: int


class RowFile(Protocol):
    """A file of rows. A place is an offset in bytes in JSONL, and a number of rows in Parquet."""

    def rows(self, first: int = 0, place: int = 0) -> Iterator[tuple[int, Row]]:
        """Places and rows from row number `first` on, which lies at `place`. Raises UserError for an unreadable file."""


def open_rows(path: Path, columns: Columns) -> RowFile:
    """The rows of a file: Parquet by its name (.parquet), JSONL otherwise.

    Raises UserError where the file cannot be read, lacks a column, or has no row.
    """
    try:
        require_readable(path)
    except OSError as e:
        raise unreadable(path, e) from None
    file: RowFile = (
        ParquetRows(path, columns) if path.suffix.lower() in (".parquet", ".pq") else JsonRows(path, columns)
    )
    if next(file.rows(), None) is None:
        raise UserError(f"{path}: has no row")
    return file


def read_part(file: RowFile, part: Part) -> Iterator[Row]:
    """The rows of a part."""
    for _, row in file.rows(part.first, part.place):
        if row.number > part.last:
            return
        yield row
        if row.number == part.last:
            return


def divide(rows: Iterable[tuple[int, Row]], size: int) -> Iterator[Part]:
    """Parts of at least `size` consecutive rows, where so many stand together, whose ends do not divide a video's rows."""
    first = last = place = 0
    count, video = 0, None
    for at, row in rows:
        full = (count >= size and row.video != video) or count >= _LONGEST_PART * size
        if count and (full or row.number != last + 1):
            yield Part(first, last, place)
            count = 0
        if count == 0:
            first, place = row.number, at
        last, video, count = row.number, row.video, count + 1
    if count:
        yield Part(first, last, place)


class Digest:
    """Hash of what rows ask."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, video: str | None, question: str | None, id: str | None) -> None:
        self._hash.update(repr((video, question, id)).encode())

    @property
    def text(self) -> str:
        return self._hash.hexdigest()


def _row(number: int, values: Any, columns: Columns) -> Row:
    """A row of parsed values, with the problem that it has, if any."""
    if not isinstance(values, dict):
        return Row(number, None, None, None, "the row is not an object with columns")
    video, question = values.get(columns.video), values.get(columns.question)
    name = None if columns.id is None else values.get(columns.id)
    problem = None
    for column, value in ((columns.video, video), (columns.question, question)):
        if not isinstance(value, str) or not value.strip():
            problem = problem or f"{column}: is empty or no text"
    return Row(
        number,
        video if isinstance(video, str) else None,
        question if isinstance(question, str) else None,
        str(name) if isinstance(name, str | int) else None,
        problem,
    )


@dataclasses.dataclass(frozen=True)
class JsonRows:
    """A JSON object a line. A later line that is none is a row with a problem; the first one must be right."""

    path: Path
    columns: Columns

    def rows(self, first: int = 0, place: int = 0) -> Iterator[tuple[int, Row]]:
        try:
            with open(self.path, "rb") as f:
                f.seek(place)
                number = first
                while text := f.readline(MAX_LINE + 1):
                    at, place = place, place + len(text)
                    if len(text) > MAX_LINE:
                        raise UserError(f"{self.path}: row {number}: the line has more than {MAX_LINE:,} bytes")
                    if text.strip():
                        yield at, self._parse(number, text)
                        number += 1
        except OSError as e:
            raise unreadable(self.path, e) from None

    def _parse(self, number: int, text: bytes) -> Row:
        try:
            values = pydantic_core.from_json(text)
        except ValueError as e:
            if number == 0:
                raise UserError(f"{self.path}: row 0: not JSON ({e}); Parquet files are named .parquet") from None
            return Row(number, None, None, None, f"not JSON ({first_line(e)})")
        if number == 0 and isinstance(values, dict):
            _require_columns(self.path, self.columns, list(values))
        return _row(number, values, self.columns)


@dataclasses.dataclass(frozen=True)
class ParquetRows:
    """A Parquet file, of which a batch of rows is in memory at a time."""

    path: Path
    columns: Columns

    def rows(self, first: int = 0, place: int = 0) -> Iterator[tuple[int, Row]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                _require_columns(self.path, self.columns, file.schema_arrow.names)
                number, groups = 0, list(range(file.num_row_groups))
                while groups and number + file.metadata.row_group(groups[0]).num_rows <= first:
                    number += file.metadata.row_group(groups.pop(0)).num_rows
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=self.columns.names):
                    if number + len(batch) > first:
                        skipped = max(first - number, 0)
                        for i, values in enumerate(batch.slice(skipped).to_pylist(), number + skipped):
                            yield i, _row(i, values, self.columns)
                    number += len(batch)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{self.path}: not a Parquet file that can be read ({first_line(e)})") from None


def _require_columns(path: Path, columns: Columns, found: list[str]) -> None:
    for flag, name in (("video", columns.video), ("question", columns.question), ("id", columns.id)):
        if name is not None and name not in found:
            raise UserError(f"{path}: has no column {name!r}, but {listing(found)}: name it with --{flag}-column")
