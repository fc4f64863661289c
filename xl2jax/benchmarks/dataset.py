"""Rows and videos of data sets in a local folder, in the layouts that the hub and the code bases use.

Nothing is downloaded. The whole folder is listed once; rows are found by the names of files (`test-00000-of-00001.parquet`,
`videomme.json`), and videos by the end of their path, wherever they were unpacked to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xl2jax.benchmarks.task import Task
from xl2jax.errors import UserError, first_line, listing
from xl2jax.system.schema import Schema, parse_json, read_bytes, read_json, require_readable

_TABLE = re.compile(r"(?P<stem>.+?)(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?\.(?P<kind>parquet|arrow|jsonl|json)")
_KINDS = ("parquet", "arrow", "jsonl", "json")
_MAX_BYTES = 1 << 30
_NAMES: Mapping[str, tuple[str, ...]] = {
    "videomme": ("videomme", "video-mme"),
    "mlvu": ("mlvu", "mlvu_dev"),
    "mlvu_test": ("mlvu_test", "mlvu_test_dataset"),
    "charades_sta": ("charades_sta", "charades-sta"),
}
"""Names of folders that are a data set's, beside its own."""


class DataFolder:
    """The files below a folder.

    Raises UserError where the folder cannot be read.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        self.root = root
        self._by_name: dict[str, list[Path]] = {}
        seen: set[str] = set()
        for folder, folders, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder above it
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                self._by_name.setdefault(name, []).append(Path(folder, name))

    def rows(self, task: Task) -> list[Any]:
        """The rows of a task, in the order of its files. Raises UserError for missing files and for wrong rows."""
        rows: list[Any] = []
        for names in task.parts:
            for file in self._tables(task, names):
                raw = _read(file, list(task.Row.model_fields))
                rows += [task.row(row, f"{file}: row {number}") for number, row in enumerate(raw)]
        if task.keep is not None:
            rows = [row for row in rows if task.keep(row)]
        if not rows:
            raise UserError(f"{self.root}: {task.name} has no row")
        return rows

    def find(self, task: Task, path: str) -> Path | None:
        """The file of a video (or subtitles), looked for by the end of its path; None where there is none.

        Raises UserError where several different files have the name.
        """
        for wanted in (path, *task.other_paths(path)):
            name = wanted.rpartition("/")[2]
            candidates = self._by_name.get(name, [])
            whole = [file for file in candidates if f"/{file.as_posix()}".endswith(f"/{wanted}")] or candidates
            own = [file for file in whole if self._is_of(task, file)] or whole
            if own:
                if len({file.stat().st_size for file in own if file.exists()}) > 1:
                    raise UserError(
                        f"{wanted}: {listing(map(str, own))} differ: name the data set's folder with --data"
                    )
                return next((file for file in own if file.is_file()), None)
        return None

    def _is_of(self, task: Task, file: Path) -> bool:
        """Whether a folder above a file has the data set's name."""
        names = _NAMES.get(task.folder, (task.folder,))
        return any(part.lower() in names for part in file.relative_to(self.root).parts[:-1])

    def _tables(self, task: Task, names: Sequence[str]) -> list[Path]:
        """The files that hold the rows under the first of `names` that there is, in the order of their shards."""
        for name in names:
            groups: dict[Path, dict[str, list[re.Match[str]]]] = {}
            for file in self._candidates(task, name):
                match = _TABLE.fullmatch(file.name)
                assert match is not None
                groups.setdefault(file.parent, {}).setdefault(match["kind"], []).append(match)
            own = [folder for folder in groups if self._is_of(task, folder / "x")]
            chosen = own if own else list(groups)
            if len(chosen) > 1:
                raise UserError(
                    f"{self.root}: the rows of {task.name} may be those in {listing(map(str, chosen))}: name one of the "
                    "folders with --data"
                )
            for folder in chosen:
                kind = next(kind for kind in _KINDS if kind in groups[folder])
                return _complete(folder, groups[folder][kind])
        forms = ", ".join(dict.fromkeys(names))
        raise UserError(
            f"{self.root}: no rows of {task.name}: a file {forms} with the suffix parquet, json, jsonl or arrow is "
            "looked for (docs/evaluation.md shows the layouts)"
        )

    def _candidates(self, task: Task, name: str) -> Iterable[Path]:
        for files in self._by_name.values():
            match = _TABLE.fullmatch(files[0].name)
            if match is None:
                continue
            for file in files:
                in_folder = file.parent.name == name and match["stem"] in (task.split, "data")
                if match["stem"] == name or in_folder:
                    yield file


def _complete(folder: Path, matches: list[re.Match[str]]) -> list[Path]:
    """Files in the order of their shards. Raises UserError where one is missing, or where they are of several tables."""
    if len({(match["stem"], match["shards"]) for match in matches}) > 1:
        names = listing(sorted(match.string for match in matches))
        raise UserError(f"{folder}: {names} are not shards of one table: keep those of one")
    count = int(matches[0]["shards"] or 1)
    found = {int(match["shard"] or 0): folder / match.string for match in matches}
    beyond = [found[number].name for number in sorted(found) if number >= count]
    if beyond:
        raise UserError(f"{folder}: {beyond[0]} is none of {count} shards counted from 0")
    missing = [number for number in range(count) if number not in found]
    if missing:
        raise UserError(f"{folder}: shard {missing[0]} of {count} of {matches[0]['stem']} is missing")
    return [found[number] for number in range(count)]


def _read(file: Path, columns: list[str]) -> list[dict[str, Any]]:
    if file.suffix == ".json":
        return read_json(file, list[dict[str, Any]], max_bytes=_MAX_BYTES)
    if file.suffix == ".jsonl":
        lines = read_bytes(file, max_bytes=_MAX_BYTES).split(b"\n")
        return [
            parse_json(text, dict[str, Any], f"{file}: line {n}") for n, text in enumerate(lines, 1) if text.strip()
        ]
    return _read_table(file, columns)


def import_pyarrow() -> Any:
    """The module. Raises UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'xl2jax[eval]'") from None
    return pyarrow


def _read_table(file: Path, columns: list[str]) -> list[dict[str, Any]]:
    pyarrow = import_pyarrow()
    try:
        require_readable(file)
        if file.suffix == ".parquet":
            there = pyarrow.parquet.read_schema(file).names
            table = pyarrow.parquet.read_table(file, columns=[name for name in columns if name in there])
        else:
            with pyarrow.memory_map(str(file)) as source:  # the format in which `datasets` keeps a data set on disk
                table = pyarrow.ipc.open_stream(source).read_all()
            table = table.select([name for name in columns if name in table.column_names])
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{file}: cannot be read as a table ({first_line(e)})") from None
    return rows


def row_values(row: Schema) -> dict[str, Any]:
    """The columns of a row that were in the data set, for a record."""
    return row.model_dump(exclude_unset=True)
