"""Brings the video of a request into a local file or a folder of frames, and knows it by its content."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from xl2jax.errors import UserError
from xl2jax.inference.store import content_hash
from xl2jax.serving.addresses import Downloads, too_large
from xl2jax.serving.errors import RequestError
from xl2jax.serving.limits import Limits
from xl2jax.serving.protocol import Source
from xl2jax.serving.uploads import Uploads
from xl2jax.video.clip import Clip, FrameSampling, open_video
from xl2jax.video.pictures import Picture

_REMEMBERED = 4096
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]*)*);base64,")


class Media:
    """A local video: a file, or a folder of frames. It is removed, if it was made for a request, with the last `release`.

    Attributes:
      path: the file or folder.
      content: its hash.
    """

    def __init__(self, path: Path, content: str, temporary: Path | None = None):
        self.path, self.content, self._temporary = path, content, temporary
        self._holders, self._lock = 1, threading.Lock()

    def hold(self) -> Media:
        """Keeps the file until one more `release`."""
        with self._lock:
            self._holders += 1
        return self

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last and self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def open(self, frames: FrameSampling, folder_fps: float, limits: Limits) -> Clip:
        """Opens the video and reads its first frame. Raises UserError where it cannot be read or is beyond the limits."""
        clip = open_video(self.path, frames, folder_fps=folder_fps, max_pixels=limits.frame_pixels)
        if clip.duration > limits.video_seconds:
            raise UserError(
                f"the video has {clip.duration:.0f} s, more than the {limits.video_seconds:g} that are read"
            )
        clip.check()
        return clip

    def pictures(self, limits: Limits) -> list[Picture]:
        """Reads the images as pictures. Raises UserError where one cannot be read or is beyond the limits."""
        return [Picture.read(path, limits.frame_pixels) for path in sorted(self.path.iterdir())]


@dataclasses.dataclass(frozen=True)
class MediaRules:
    """What `Library` may read.

    roots: folders below which `file://` addresses may lie. downloads: None refuses http and https.
    """

    roots: tuple[Path, ...] = ()
    downloads: Downloads | None = None


class Library:
    """Finds the videos of requests. `spool` is a folder for what is downloaded or comes with a request."""

    def __init__(self, rules: MediaRules, limits: Limits, uploads: Uploads, spool: Path):
        self._roots = tuple(root.resolve() for root in rules.roots)
        self._downloads, self._limits, self._uploads, self._spool = rules.downloads, limits, uploads, spool
        self._hashes: dict[tuple[int, ...], str] = {}

    async def find(self, source: Source) -> Media:
        """The video of a source that is not only a name. Raises RequestError."""
        if source.file_id is not None:
            return await asyncio.to_thread(self._local, self._uploads.path(source.file_id))
        if images := source.frames or source.pictures:
            return await self._frames(images)
        url = source.url or ""
        if source.data is not None:
            url = source.data if source.data.startswith("data:") else f"data:;base64,{source.data}"
        if url.startswith("file:"):
            return await asyncio.to_thread(self._local, self._below_root(url))
        if url.startswith("data:image/jpeg") or url.startswith("data:video/jpeg"):
            head, _, data = url.partition(",")
            pictures = data.split(",")
            if len(pictures) > self._limits.frames:
                raise RequestError(400, f"the video has more than the {self._limits.frames} frames that are read")
            return await self._frames([f"{head.replace('video/jpeg', 'image/jpeg')},{picture}" for picture in pictures])
        folder = await asyncio.to_thread(self._new_folder)
        with _removed_on_error(folder):
            await self._write(url, folder / "video")
            content = await asyncio.to_thread(content_hash, folder / "video")
        return Media(folder / "video", content, folder)

    async def _frames(self, urls: list[str] | tuple[str, ...]) -> Media:
        folder = await asyncio.to_thread(self._new_folder)
        with _removed_on_error(folder):
            frames = folder / "frames"
            frames.mkdir()
            left = self._limits.video_bytes
            for number, url in enumerate(urls):
                target = frames / f"{number:06d}.jpg"  # read by its content, whatever its format
                if url.startswith("file:"):
                    source = self._below_root(url)
                    await asyncio.to_thread(self._check_size, source)
                    await asyncio.to_thread(shutil.copyfile, source, target)
                else:
                    await self._write(url, target)
                left -= target.stat().st_size
                if left < 0:
                    raise too_large(self._limits.video_bytes)
            content = await asyncio.to_thread(content_hash, frames)
        return Media(frames, content, folder)

    async def _write(self, url: str, target: Path) -> None:
        """Writes what a data, http or https address holds."""
        if url.startswith("data:"):
            if (head := _DATA.match(url[:256])) is None:
                raise RequestError(400, "a data address should be data:TYPE;base64,...", code="media_refused")
            try:
                data = await asyncio.to_thread(base64.b64decode, url[head.end() :], validate=True)
            except (binascii.Error, ValueError):
                raise RequestError(400, "a data address holds no valid base64", code="media_refused") from None
            if len(data) > self._limits.video_bytes:
                raise too_large(self._limits.video_bytes)
            await asyncio.to_thread(target.write_bytes, data)
            return
        if not url.startswith(("http://", "https://")):
            raise RequestError(
                400, "the video's address should begin with https:, http:, file: or data:", code="media_refused"
            )
        await self.downloads.fetch(url, target)

    @property
    def downloads(self) -> Downloads:
        """Which addresses may be read. Raises RequestError where none may."""
        if self._downloads is None:
            raise RequestError(
                400,
                "this server downloads nothing (--allow-media-domain or --allow-any-media allow it)",
                code="media_refused",
            )
        return self._downloads

    def _below_root(self, url: str) -> Path:
        """The path of a file address, with all links resolved. Raises RequestError unless it lies below a root."""
        refused = RequestError(400, "there is no such file below a --media-root of the server", code="media_refused")
        try:
            parts = urlsplit(url)
            path = Path(os.path.realpath(unquote(parts.path, errors="strict"), strict=True))
        except (OSError, ValueError):
            raise refused from None  # the same words whether or not a file exists
        if parts.netloc not in ("", "localhost") or not any(path.is_relative_to(root) for root in self._roots):
            raise refused
        return path

    def _local(self, path: Path) -> Media:
        """A file that stays where it is. Its hash is remembered until it changes."""
        about = self._check_size(path)
        identity = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        content = self._hashes.get(identity)
        if content is None:
            try:
                content = content_hash(path)
            except (UserError, OSError):
                raise _unreadable() from None
            if len(self._hashes) >= _REMEMBERED:
                self._hashes.clear()
            self._hashes[identity] = content
        return Media(path, content)

    def _check_size(self, path: Path) -> os.stat_result:
        try:
            about = os.stat(path)
        except OSError:
            raise _unreadable() from None
        if not stat.S_ISREG(about.st_mode):
            raise _unreadable()
        if about.st_size > self._limits.video_bytes:
            raise too_large(self._limits.video_bytes)
        return about

    def _new_folder(self) -> Path:
        try:
            return Path(tempfile.mkdtemp(dir=self._spool))
        except OSError:
            raise _no_room() from None


def _no_room() -> RequestError:
    return RequestError(507, "the server has no room for the video", code="no_space")


def _unreadable() -> RequestError:
    return RequestError(400, "the video is not a regular file that can be read", code="media_refused")


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as e:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, OSError):
            raise _no_room() from None
        raise
