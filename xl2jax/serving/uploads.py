"""The files of /v1/files: a folder with the bytes of each file, and what is known about it."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from xl2jax.errors import UserError, shorten
from xl2jax.serving.addresses import too_large
from xl2jax.serving.errors import RequestError
from xl2jax.system.atomic import remove_leftovers, replacing_file
from xl2jax.system.schema import Schema, read_json

_ID = re.compile(r"file-[0-9a-f]{32}")

FILE_ID = rf"^{_ID.pattern}$"
"""The pattern of a file's id, for fields of schemas."""

_LEFT_SECONDS = 60


class Readable(Protocol):
    """What is read like a file."""

    def read(self, size: int, /) -> bytes: ...


class ExpiresAfter(Schema):
    """When a file is removed, in the limits that OpenAI gives."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class _About(Schema):
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None


class Uploads:
    """Keeps files in `folder`, of at most `max_bytes` each and `total_bytes` together.

    Its methods block, and several threads may call them. Several servers may share the folder.
    """

    def __init__(self, folder: Path, max_bytes: int, total_bytes: int):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self._folder, self.max_bytes, self._total_bytes = folder, max_bytes, total_bytes

    def remove_orphans(self, awaited: Callable[[], set[str]]) -> None:
        """Removes bytes without a description, which a server left that was killed before it had written both.

        `awaited` gives the ids of files that unfinished uploads are still to describe; these are spared. It is called
        after the bytes were listed: an upload names its file before it moves the bytes and until it has described them.
        """
        old = []
        for data in self._folder.glob("file-*.data"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - data.stat().st_mtime > _LEFT_SECONDS:  # other servers write to the folder too
                    old.append(data)
        spared = awaited()
        for data in old:
            if data.stem not in spared:
                _remove_undescribed(data)

    def room(self) -> int:
        """Bytes that further files can have together. Removes files that have expired."""
        for path in self._folder.glob("file-*.json"):
            self._read(path.stem)
        return self._total_bytes - sum(map(size_of, self._folder.glob("file-*.data")))

    def add(
        self, source: Readable, filename: str, purpose: str, expires_after: ExpiresAfter | None = None
    ) -> dict[str, Any]:
        """Stores a file and returns its description. Raises RequestError where it is too large or does not fit."""
        name, count = new_id(), 0
        try:
            with replacing_file(self._path(name, "data")) as beside, open(beside, "wb") as out:
                left = self.room()
                while block := source.read(1 << 20):
                    count += len(block)
                    if count > left:
                        raise no_room()
                    if count > self.max_bytes:
                        raise too_large(self.max_bytes)
                    out.write(block)
            return self._describe_new(name, count, filename, purpose, expires_after)
        except BaseException as e:
            self._path(name, "data").unlink(missing_ok=True)
            if isinstance(e, UserError):
                raise no_room() from None
            raise

    def adopt(
        self, name: str, path: Path, filename: str, purpose: str, expires_after: ExpiresAfter | None = None
    ) -> dict[str, Any]:
        """Moves a complete file of the same file system here, as the file of id `name`, and returns its description.

        The same call goes on from where an earlier one was cut off. Raises RequestError where the file does not fit.
        """
        if (about := self._read(name)) is not None:
            return _described(name, about)
        data = self._path(name, "data")
        if not data.exists():
            if path.stat().st_size > self.room():
                raise no_room()
            path.replace(data)
        try:
            return self._describe_new(name, data.stat().st_size, filename, purpose, expires_after)
        except UserError:
            raise no_room() from None

    def place(self, name: str) -> Path:
        """Where the bytes of a file are, or will be when `adopt` has moved them."""
        return self._path(name, "data")

    def abandon(self, name: str) -> None:
        """Removes what `adopt` moved here and did not describe. A described file stays."""
        _remove_undescribed(self._path(name, "data"))

    def _describe_new(
        self, name: str, count: int, filename: str, purpose: str, expires_after: ExpiresAfter | None
    ) -> dict[str, Any]:
        """Describes a file whose bytes are there. This comes last: a file without a description is not listed."""
        now = int(time.time())
        about = _About(
            bytes=count,
            created_at=now,
            filename=shorten(filename, 200),
            purpose=shorten(purpose, 40),
            expires_at=None if expires_after is None else now + expires_after.seconds,
        )
        with replacing_file(self._path(name, "json")) as beside:
            beside.write_text(json.dumps(about.model_dump()))
        return _described(name, about)

    def describe(self, name: str) -> dict[str, Any]:
        """The description of a file. Raises RequestError with status 404."""
        if (about := self._read(name)) is None:
            raise _unknown()
        return _described(name, about)

    def list(self) -> list[dict[str, Any]]:
        """The descriptions of all files, the newest first."""
        read = ((path.stem, self._read(path.stem)) for path in self._folder.glob("file-*.json"))
        found = [_described(name, about) for name, about in read if about is not None]
        return sorted(found, key=lambda about: about["created_at"], reverse=True)

    def path(self, name: str) -> Path:
        """Where the bytes of a file are. Raises RequestError with status 404."""
        self.describe(name)
        return self._path(name, "data")

    def remove(self, name: str) -> None:
        """Removes a file. Raises RequestError with status 404."""
        self.describe(name)
        self._remove(name)

    def _remove(self, name: str) -> None:
        for suffix in ("json", "data"):
            self._path(name, suffix).unlink(missing_ok=True)

    def _read(self, name: str) -> _About | None:
        """What is known about a file. None if there is none, or if it has expired, when it is removed."""
        try:
            about = read_json(self._path(name, "json"), _About)
        except UserError:
            return None
        if about.expires_at is not None and time.time() > about.expires_at:
            self._remove(name)
            return None
        return about

    def _path(self, name: str, suffix: str) -> Path:
        if not _ID.fullmatch(name):
            raise _unknown()
        return self._folder / f"{name}.{suffix}"


def no_room() -> RequestError:
    """The error for a file that does not fit."""
    return RequestError(507, "the server has no room for the file: delete others", code="no_space")


def _unknown() -> RequestError:
    return RequestError(404, "there is no file of this id", code="file_not_found")


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where it was removed meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def new_id() -> str:
    """An id that no file has."""
    return f"file-{secrets.token_hex(16)}"


def _remove_undescribed(data: Path) -> None:
    if not data.with_suffix(".json").exists():
        data.unlink(missing_ok=True)


def _described(name: str, about: _About) -> dict[str, Any]:
    return {"id": name, "object": "file", "status": "processed", **about.model_dump(exclude_none=True)}
