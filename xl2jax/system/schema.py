"""Reads untrusted JSON and YAML: regular files of bounded size, checked against a schema.

A schema is a subclass of `Schema`, or any type that pydantic knows. Everything that can be wrong with a file (missing,
unreadable, a pipe, too large, not UTF-8, nested too deeply, NaN, a number with thousands of digits, a field that is
missing or has the wrong type) raises one UserError that names the file and the field.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pydantic
import pydantic_core
import yaml

from xl2jax.errors import UserError, shorten

SMALL_FILE = 64 << 20
"""Default limit on the bytes of a file: enough for settings, an index or a selection file."""


class Schema(pydantic.BaseModel):
    """The fields of a file, with strict types. Further fields in the file are ignored."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def read_bytes(path: Path, *, max_bytes: int | None = SMALL_FILE) -> bytes:
    """The bytes of a regular file. Raises UserError if it cannot be read or is larger than `max_bytes`."""
    try:
        require_regular(path)
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if max_bytes is not None and size > max_bytes:
                raise UserError(f"{path}: has {size:,} bytes, more than the limit of {max_bytes:,} for such a file")
            return f.read()
    except OSError as e:
        raise unreadable(path, e) from None


def require_regular(path: Path) -> None:
    """Raises UserError unless `path` is a regular file: reading a pipe or a device might block.

    Raises OSError if the file's status cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise UserError(f"{path}: is {kind}, not a regular file")


def require_readable(path: Path) -> None:
    """Raises UserError unless `path` is a regular file, and OSError if it cannot be opened.

    Used before a library opens the file: safetensors reports "No such file" for a missing permission.
    """
    require_regular(path)
    with open(path, "rb"):
        pass


def is_file(path: Path) -> bool:
    """Whether there is a regular file at `path`. Raises UserError for anything but a file, and without permission.

    `Path.is_file` returns False for a file in a folder without permission.
    """
    try:
        require_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        raise unreadable(path, e) from None
    return True


def path_problem(name: str) -> str | None:
    """Why an untrusted name does not lie below a folder, or None if it does.

    Links are not resolved: in the hub's cache every file is a link to another folder.
    """
    parts = PurePosixPath(name).parts
    if not parts:
        return "is empty"
    if name.startswith("/") or ".." in parts or not name.isprintable():
        return "leads out of the folder"
    if any(len(part.encode()) > 255 for part in parts) or len(name) > 1000:
        return "is too long"
    return None


def _below_folder(name: str) -> str:
    if (reason := path_problem(name)) is not None:
        raise ValueError(reason)
    return name


type NameBelow = Annotated[str, pydantic.AfterValidator(_below_folder)]
"""A file name in a file, which must lie below the folder of that file."""


def unreadable(path: str | Path, error: OSError) -> UserError:
    """The error for a file that the operating system cannot read."""
    reasons: dict[type[OSError], str] = {
        FileNotFoundError: "no such file",
        PermissionError: "no permission to read it",
        NotADirectoryError: "no such file",
    }
    return UserError(f"{path}: {reasons.get(type(error), f'cannot be read ({error.strerror or error})')}")


def parse_json[T](data: bytes | str, schema: type[T], where: str | Path) -> T:
    """Parses JSON text as a `schema`. `where` names its source in errors."""
    try:
        raw = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as e:
        raise UserError(f"{where}: not JSON ({e})") from None
    return check(raw, schema, where)


def read_json[T](path: Path, schema: type[T], *, max_bytes: int | None = SMALL_FILE) -> T:
    """Reads a JSON file as a `schema`."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), schema, path)


def read_yaml[T](path: Path, schema: type[T]) -> T:
    """Reads a YAML file as a `schema`."""
    try:
        raw = yaml.safe_load(read_bytes(path, max_bytes=256 << 10).decode("utf-8"))
    except RecursionError:
        raise UserError(f"{path}: not YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError) as e:  # ValueError: not UTF-8, dates that do not exist, very long numbers
        reason = " ".join(str(e).split())
        raise UserError(f"{path}: not YAML ({reason[:200]})") from None
    return check(raw, schema, path)


def check[T](raw: Any, schema: type[T], where: str | Path) -> T:
    """Converts a parsed value to a `schema`. The error names the first few wrong fields."""
    try:
        return _adapter(schema).validate_python(raw, strict=True)
    except pydantic.ValidationError as e:
        raise UserError(f"{where}: {problems(e)}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


_adapter: Callable[[Any], Any] = functools.cache(pydantic.TypeAdapter)  # creating an adapter takes longer than using it


def problems(error: pydantic.ValidationError, limit: int = 3) -> str:
    """The validation errors by field, such as `a.b: should be a valid integer, not 'x'`."""
    errors = error.errors(include_url=False)
    out = []
    for e in errors[:limit]:
        place = ".".join(str(part)[:60] for part in e["loc"])
        message = _MESSAGES.get(e["type"], e["msg"].removeprefix("Value error, ").removeprefix("Input "))
        given = "" if e["type"] == "missing" or isinstance(e["input"], (dict, list)) else f", not {quoted(e['input'])}"
        out.append(f"{place}: {message}{given}" if place else f"{message}{given}")
    more = f"; and {len(errors) - limit} more" if len(errors) > limit else ""
    return "; ".join(out) + more


_MESSAGES = {"missing": "is missing", "model_type": "should be an object", "dict_type": "should be an object"}


def quoted(value: Any) -> str:
    """An untrusted value in the short, printable form that error messages use."""
    if not isinstance(value, (str, int, float, bool, type(None))):
        return f"a {type(value).__name__}"  # it may have very many parts: aliases in YAML multiply
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a very large number"
    return shorten(text, 60)
