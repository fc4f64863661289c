"""The unfinished uploads of /v1/uploads: a folder for each, with its parts and what is known about it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from xl2jax.errors import UserError, shorten
from xl2jax.serving.addresses import too_large
from xl2jax.serving.errors import RequestError
from xl2jax.serving.uploads import Readable, Uploads, no_room
from xl2jax.system.atomic import remove_leftovers, replacing_file
from xl2jax.system.schema import Schema, read_json

LIFETIME = 3600
"""Seconds until an upload that was not completed is removed."""

MOST_PARTS = 10_000
MOST_UPLOADS = 64

_ID = re.compile(r"upload_[0-9a-f]{32}")
_PART = re.compile(r"part_[0-9a-f]{32}")
_ABOUT = "about.json"


class Start(Schema):
    """The body of a request that begins an upload."""

    bytes: Annotated[int, Field(ge=1)]
    filename: str
    purpose: str = "user_data"
    mime_type: str | None = None


class Completion(Schema):
    """The body of a request that completes an upload."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=MOST_PARTS)]
    md5: str | None = None


class _About(Schema):
    bytes: int
    created_at: int
    filename: str
    purpose: str


class PartialUploads:
    """Uploads in parts, which become files of `uploads`. A restarted server finds them in `folder`.

    Its methods block, and several threads may call them.
    """

    def __init__(self, folder: Path, uploads: Uploads):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._uploads = folder, uploads
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._bytes: dict[str, int] = {}  # of parts that are stored or on their way, by upload
        for path in folder.iterdir():
            remove_leftovers(path)
        self._remove_expired()

    def start(self, asked: Start) -> dict[str, Any]:
        """Begins an upload, and removes those that have expired.

        Raises RequestError where the file is too large or there is no room for it.
        """
        if asked.bytes > self._uploads.max_bytes:
            raise too_large(self._uploads.max_bytes)
        with self._lock:
            self._remove_expired()
            pending = [about.bytes for about in map(self._read, self._names()) if about is not None]
            if len(pending) >= MOST_UPLOADS:
                raise RequestError(
                    429, f"{len(pending)} uploads are unfinished: complete or cancel them", code="too_many_uploads"
                )
            if asked.bytes + sum(pending) > self._uploads.room():
                raise no_room()
            name = f"upload_{secrets.token_hex(16)}"
            about = _About(
                bytes=asked.bytes,
                created_at=int(time.time()),
                filename=shorten(asked.filename, 200),
                purpose=shorten(asked.purpose, 40),
            )
            try:
                (self._folder / name).mkdir()
                with replacing_file(self._folder / name / _ABOUT) as beside:
                    beside.write_text(json.dumps(about.model_dump()))
            except (OSError, UserError):
                shutil.rmtree(self._folder / name, ignore_errors=True)
                raise no_room() from None
        return _described(name, about, "pending")

    def add(self, name: str, source: Readable) -> dict[str, Any]:
        """Stores a part. Raises RequestError where the parts are more than the upload was said to have."""
        about = self._about(name)
        part, count, stored = f"part_{secrets.token_hex(16)}", 0, False
        try:
            with replacing_file(self._folder / name / part) as beside, open(beside, "wb") as out:
                while block := source.read(1 << 20):
                    self._reserve(name, about, len(block))
                    count += len(block)
                    out.write(block)
            stored = True
        except (OSError, UserError):
            self._about(name)  # it may have been cancelled meanwhile
            raise no_room() from None
        finally:
            with self._lock:
                if not stored and name in self._bytes:
                    self._bytes[name] -= count
        return {"id": part, "object": "upload.part", "created_at": int(time.time()), "upload_id": name}

    def _reserve(self, name: str, about: _About, count: int) -> None:
        """Counts bytes of a part before they are written, so that parts that come together keep to the size too."""
        with self._lock:
            self._about(name)  # it may have been cancelled meanwhile
            sizes = [path.stat().st_size for path in self._folder.glob(f"{name}/part_*")]
            if len(sizes) >= MOST_PARTS:
                raise RequestError(400, f"an upload has at most {MOST_PARTS:,} parts", param="data")
            held = self._bytes.get(name, sum(sizes)) + count
            if held > about.bytes:
                raise _wrong_size(about)
            self._bytes[name] = held

    def complete(self, name: str, asked: Completion) -> dict[str, Any]:
        """Makes a file of the parts, in the order of their ids.

        Raises RequestError where they are not of this upload, or where size or MD5 are not what was said. The upload
        can then be completed again.
        """
        with self._alone(name) as about:
            parts = [self._folder / name / part for part in asked.part_ids]
            if any(not _PART.fullmatch(path.name) or not path.is_file() for path in parts):
                raise RequestError(400, "a part is not one of this upload", param="part_ids")
            if len(set(parts)) < len(parts):
                raise RequestError(400, "a part is named twice", param="part_ids")
            if sum(path.stat().st_size for path in parts) != about.bytes:
                raise _wrong_size(about)
            if asked.md5 is not None and _md5(parts) != asked.md5.lower():
                raise RequestError(400, "the parts do not have this MD5", code="wrong_md5", param="md5")
            with contextlib.closing(_Joined(parts)) as joined:
                file = self._uploads.add(joined, about.filename, about.purpose)
            shutil.rmtree(self._folder / name, ignore_errors=True)
        return _described(name, about, "completed") | {"file": file}

    def cancel(self, name: str) -> dict[str, Any]:
        """Removes an upload and its parts."""
        with self._alone(name) as about:
            shutil.rmtree(self._folder / name, ignore_errors=True)
        return _described(name, about, "cancelled")

    def part_limit(self, name: str) -> int:
        """Bytes that a part can have at most."""
        return self._about(name).bytes

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[_About]:
        """While an upload is completed or cancelled, it is not completed or cancelled by another request."""
        with self._lock:
            about = self._about(name)
            if name in self._busy:
                raise RequestError(409, "the upload is being completed", code="upload_busy")
            self._busy.add(name)
        try:
            yield about
        finally:
            with self._lock:
                self._busy.remove(name)
                if not (self._folder / name).exists():
                    self._bytes.pop(name, None)

    def _about(self, name: str) -> _About:
        about = self._read(name) if _ID.fullmatch(name) else None
        if about is None or _expired(about):
            raise RequestError(404, "there is no unfinished upload of this id", code="upload_not_found")
        return about

    def _read(self, name: str) -> _About | None:
        try:
            return read_json(self._folder / name / _ABOUT, _About)
        except UserError:
            return None

    def _names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir() if _ID.fullmatch(path.name)]

    def _remove_expired(self) -> None:
        for name in self._names():
            about = self._read(name)
            if name not in self._busy and (about is None or _expired(about)):
                shutil.rmtree(self._folder / name, ignore_errors=True)
                self._bytes.pop(name, None)


class _Joined:
    """Parts as one file to read, in blocks of any size."""

    def __init__(self, parts: Sequence[Path]):
        self._blocks = _blocks(parts)

    def read(self, size: int, /) -> bytes:
        return next(self._blocks, b"")

    def close(self) -> None:
        self._blocks.close()


def _blocks(parts: Sequence[Path]) -> Generator[bytes]:
    for path in parts:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                yield block


def _md5(parts: Sequence[Path]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for block in _blocks(parts):
        digest.update(block)
    return digest.hexdigest()


def _expired(about: _About) -> bool:
    return time.time() > about.created_at + LIFETIME


def _wrong_size(about: _About) -> RequestError:
    return RequestError(400, f"the upload was said to have {about.bytes:,} bytes", code="wrong_size")


def _described(name: str, about: _About, status: str) -> dict[str, Any]:
    known = about.model_dump()
    return {"id": name, "object": "upload", "status": status, "expires_at": about.created_at + LIFETIME, **known}
