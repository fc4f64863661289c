"""The unfinished uploads of /v1/uploads: a folder for each, with its parts and what is known about it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from xl2jax.errors import UserError, shorten
from xl2jax.serving.addresses import too_large
from xl2jax.serving.errors import RequestError
from xl2jax.serving.uploads import FILE_ID, ExpiresAfter, Readable, Uploads, new_id, no_room, size_of
from xl2jax.system.atomic import remove_leftovers, replacing_file, replacing_folder
from xl2jax.system.schema import Schema, read_json

LIFETIME = 3600
"""Seconds until an upload that was not completed is removed."""

MOST_PARTS = 10_000
MOST_UPLOADS = 64

_ID = re.compile(r"upload_[0-9a-f]{32}")
_PART = re.compile(r"part_[0-9a-f]{32}")
_ABOUT, _ORDER, _JOINED = "about.json", "order.json", "joined"


class Start(Schema):
    """The body of a request that begins an upload."""

    bytes: Annotated[int, Field(ge=1)]
    filename: str
    purpose: str = "user_data"
    mime_type: str | None = None
    expires_after: ExpiresAfter | None = None


class Completion(Schema):
    """The body of a request that completes an upload."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=MOST_PARTS)]
    md5: str | None = None


class _About(Schema):
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_after: ExpiresAfter | None = None


class _Order(Schema):
    """The parts that are being joined, in order, their bytes, and the id of the file that they become."""

    ids: list[str]
    sizes: list[int]
    file: Annotated[str, Field(pattern=FILE_ID)]


class PartialUploads:
    """Uploads in parts, which become files of `uploads`. A restarted server finds them in `folder`.

    Its methods block, and several threads may call them. Several servers may share the folder, if the parts of one upload
    go to one of them.
    """

    def __init__(self, folder: Path, uploads: Uploads):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._uploads = folder, uploads
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}  # of parts that are stored or on their way, by upload
        remove_leftovers(folder)
        for name in self._names():
            with contextlib.suppress(FileNotFoundError):  # another server may have completed it
                remove_leftovers(folder / name)
        self._remove_expired()
        uploads.remove_orphans(self._awaited)

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
                expires_after=asked.expires_after,
            )
            try:
                with replacing_folder(self._folder / name) as beside:
                    (beside / _ABOUT).write_text(json.dumps(about.model_dump()))
            except UserError:
                raise no_room() from None
        return _described(name, about, "pending")

    def add(self, name: str, source: Readable) -> dict[str, Any]:
        """Stores a part. Raises RequestError for one that is empty, or with which the parts are more than the
        upload was said to have."""
        about = self._about(name)
        part, count, stored = f"part_{secrets.token_hex(16)}", 0, False
        try:
            with replacing_file(self._folder / name / part) as beside, open(beside, "wb") as out:
                while block := source.read(1 << 20):
                    self._reserve(name, about, len(block))
                    count += len(block)
                    out.write(block)
                if not count:
                    raise RequestError(400, "data: an empty part", param="data")
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
            if (self._folder / name / _ORDER).exists():
                raise _busy()
            sizes = [size_of(path) for path in self._folder.glob(f"{name}/part_*")]
            if len(sizes) >= MOST_PARTS:
                raise RequestError(400, f"an upload has at most {MOST_PARTS:,} parts", param="data")
            held = self._bytes.get(name, sum(sizes)) + count
            if held > about.bytes:
                raise _wrong_size(about)
            self._bytes[name] = held

    def complete(self, name: str, asked: Completion) -> dict[str, Any]:
        """Makes a file of the parts, in the order of their ids. Its space is needed once, and that of one part beside it.

        Raises RequestError where they are not of this upload, or where size or MD5 are not what was said. The upload
        can then be completed again, as it can after a kill: the id of the file is on the disk before anything is moved.
        """
        with self._alone(name) as about:
            folder = self._folder / name
            order = self._order(folder, asked.part_ids)
            data = self._uploads.place(order.file)
            moved = data.exists()
            sources = [data] if moved else _sources(folder, order)
            if sum(map(size_of, sources)) != about.bytes:
                raise _wrong_size(about)
            if asked.md5 is not None and _md5(sources) != asked.md5.lower():
                raise RequestError(400, "the parts do not have this MD5", code="wrong_md5", param="md5")
            if not moved:
                try:
                    with replacing_file(folder / _ORDER) as beside:
                        beside.write_text(json.dumps(order.model_dump()))
                    _join(folder, sources)
                except (OSError, UserError):
                    raise no_room() from None
            file = self._uploads.adopt(order.file, folder / _JOINED, about.filename, about.purpose, about.expires_after)
            _delete(folder)
        return _described(name, about, "completed") | {"file": file}

    def _order(self, folder: Path, ids: list[str]) -> _Order:
        """The parts to join: those that are asked for, of which an earlier attempt may have joined some."""
        if (folder / _ORDER).exists():
            order = read_json(folder / _ORDER, _Order)
            if order.ids != ids:
                raise RequestError(400, "the upload was being completed with other parts", param="part_ids")
            return order
        if any(not _PART.fullmatch(part) or not (folder / part).is_file() for part in ids):
            raise RequestError(400, "a part is not one of this upload", param="part_ids")
        if len(set(ids)) < len(ids):
            raise RequestError(400, "a part is named twice", param="part_ids")
        return _Order(ids=ids, sizes=[size_of(folder / part) for part in ids], file=new_id())

    def cancel(self, name: str) -> dict[str, Any]:
        """Removes an upload and its parts. A file stays that a killed server had completed already."""
        with self._alone(name) as about:
            self._remove(name)
        return _described(name, about, "cancelled")

    def part_limit(self, name: str) -> int:
        """Bytes that a part can have at most."""
        return self._about(name).bytes

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[_About]:
        """While an upload is completed or cancelled, no other request and no other server does that."""
        self._about(name)
        with _locked(self._folder / name) as free:
            about = self._about(name)  # it may have been completed meanwhile
            if not free:
                raise _busy()
            yield about
            with self._lock:
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

    def _read_order(self, name: str) -> _Order | None:
        try:
            return read_json(self._folder / name / _ORDER, _Order)
        except UserError:
            return None

    def _awaited(self) -> set[str]:
        """The ids of files that unfinished uploads are about to become."""
        return {order.file for order in map(self._read_order, self._names()) if order is not None}

    def _remove(self, name: str) -> None:
        if (order := self._read_order(name)) is not None:
            self._uploads.abandon(order.file)
        _delete(self._folder / name)

    def _names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir() if _ID.fullmatch(path.name)]

    def _remove_expired(self) -> None:
        for name in self._names():
            about = self._read(name)
            if about is None or _expired(about):
                with _locked(self._folder / name) as free:
                    if free:
                        self._remove(name)
                        self._bytes.pop(name, None)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks an upload for this request. Gives whether that was possible, which it is where its description is missing."""
    try:
        file = open(folder / _ABOUT, "r+b")  # noqa: SIM115 (closed below)
    except OSError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _delete(folder: Path) -> None:
    """Removes an upload. What a kill leaves of it is no upload any more: its description goes first."""
    with contextlib.suppress(OSError):
        (folder / _ABOUT).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sources(folder: Path, order: _Order) -> list[Path]:
    """The files whose bytes are the upload: what was joined before, if anything, and the parts behind it.

    A part goes only when its bytes have been joined. What was joined of a part that is still there is cut off.
    """
    parts = [folder / part for part in order.ids]
    joined = folder / _JOINED
    if not joined.exists():
        return parts
    count = next((i for i, part in enumerate(parts) if part.exists()), len(parts))
    os.truncate(joined, min(sum(order.sizes[:count]), joined.stat().st_size))
    return [joined, *parts[count:]]


def _join(folder: Path, sources: Sequence[Path]) -> None:
    """Appends files to the first one, and removes each of them as soon as its bytes are on the disk."""
    first, *others = sources
    joined = folder / _JOINED
    first.replace(joined)
    with open(joined, "ab") as out:
        for path in others:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
            path.unlink()


def _md5(parts: Sequence[Path]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for path in parts:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _expired(about: _About) -> bool:
    return time.time() > about.created_at + LIFETIME


def _wrong_size(about: _About) -> RequestError:
    return RequestError(400, f"the upload was said to have {about.bytes:,} bytes", code="wrong_size")


def _busy() -> RequestError:
    return RequestError(409, "the upload is being completed", code="upload_busy")


def _described(name: str, about: _About, status: str) -> dict[str, Any]:
    known = about.model_dump(exclude={"expires_after"})
    return {"id": name, "object": "upload", "status": status, "expires_at": about.created_at + LIFETIME, **known}
