"""The files of /v1/files: a folder with the bytes of each file, and what is known about it."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from xl2jax.errors import UserError, shorten
from xl2jax.serving.addresses import too_large
from xl2jax.serving.errors import RequestError
from xl2jax.system.atomic import remove_leftovers, replacing_file
from xl2jax.system.schema import Schema, read_json

_ID = re.compile(r"file-[0-9a-f]{32}")

_LEFT_SECONDS = 60


class Readable(Protocol):
    """What is read like a file."""

    def read(self, size: int, /) -> bytes: ...


class _About(Schema):
    bytes: int
    created_at: int
    filename: str
    purpose: str


class Uploads:
    """Keeps files in `folder`, of at most `max_bytes` each and `total_bytes` together.

    Its methods block, and several threads may call them.
    """

    def __init__(self, folder: Path, max_bytes: int, total_bytes: int):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self._folder, self.max_bytes, self._total_bytes = folder, max_bytes, total_bytes
        for path in folder.glob("file-*.data"):
            with contextlib.suppress(FileNotFoundError):
                old = time.time() - path.stat().st_mtime > _LEFT_SECONDS  # other replicas write to the folder too
                if old and not path.with_suffix(".json").exists():  # a server was killed before it had written both
                    path.unlink()

    def room(self) -> int:
        """Bytes that further files can have together."""
        return self._total_bytes - sum(path.stat().st_size for path in self._folder.glob("file-*.data"))

    def add(self, source: Readable, filename: str, purpose: str) -> dict[str, Any]:
        """Stores a file and returns its description. Raises RequestError where it is too large or does not fit."""
        name = f"file-{secrets.token_hex(16)}"
        count = 0
        try:
            with replacing_file(self._folder / f"{name}.data") as beside, open(beside, "wb") as out:
                left = self.room()
                while block := source.read(1 << 20):
                    count += len(block)
                    if count > left:
                        raise no_room()
                    if count > self.max_bytes:
                        raise too_large(self.max_bytes)
                    out.write(block)
            about = {
                "bytes": count,
                "created_at": int(time.time()),
                "filename": shorten(filename, 200),
                "purpose": shorten(purpose, 40),
            }
            with replacing_file(self._folder / f"{name}.json") as beside:  # last: a file without it is not listed
                beside.write_text(json.dumps(about))
        except BaseException as e:
            self._path(name, "data").unlink(missing_ok=True)
            if isinstance(e, UserError):
                raise no_room() from None
            raise
        return _described(name, about)

    def describe(self, name: str) -> dict[str, Any]:
        """The description of a file. Raises RequestError with status 404."""
        path = self._path(name, "json")
        try:
            about = read_json(path, _About)
        except UserError:
            raise _unknown() from None
        return _described(name, about.model_dump())

    def list(self) -> list[dict[str, Any]]:
        """The descriptions of all files, the newest first."""
        found = []
        for path in self._folder.glob("file-*.json"):
            with contextlib.suppress(RequestError):
                found.append(self.describe(path.stem))
        return sorted(found, key=lambda about: about["created_at"], reverse=True)

    def path(self, name: str) -> Path:
        """Where the bytes of a file are. Raises RequestError with status 404."""
        self.describe(name)
        return self._path(name, "data")

    def remove(self, name: str) -> None:
        """Removes a file. Raises RequestError with status 404."""
        self.describe(name)
        for suffix in ("json", "data"):
            self._path(name, suffix).unlink(missing_ok=True)

    def _path(self, name: str, suffix: str) -> Path:
        if not _ID.fullmatch(name):
            raise _unknown()
        return self._folder / f"{name}.{suffix}"


def no_room() -> RequestError:
    """The error for a file that does not fit."""
    return RequestError(507, "the server has no room for the file: delete others", code="no_space")


def _unknown() -> RequestError:
    return RequestError(404, "there is no file of this id", code="file_not_found")


def _described(name: str, about: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "file", "status": "processed", **about}
