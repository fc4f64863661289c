"""Keeps watched videos: on the device, then in host memory, then as cache files, then not at all.

The least recently used ones move first. Only the engine's thread calls this, but for the writing of files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax

from xl2jax.errors import NotEnoughMemory, UserError
from xl2jax.inference import compiled, memory
from xl2jax.inference.api import Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.pictures import Surroundings
from xl2jax.inference.store import content_key, loading_cache, model_key, save_cache
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo
from xl2jax.serving.metrics import Metrics
from xl2jax.system.atomic import remove_leftovers
from xl2jax.video.clip import Clip, FrameSampling

logger = logging.getLogger(__name__)

type Place = Literal["device", "host", "disk"]

_REMEMBERED = 4096


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Bytes for watched videos by place."""

    device: int
    host: int
    disk: int


@dataclasses.dataclass(frozen=True)
class VideoKey:
    """Everything that a watched video depends on, and a name for it."""

    fields: dict[str, Any]

    @property
    def name(self) -> str:
        text = json.dumps(self.fields, sort_keys=True).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()


@dataclasses.dataclass(eq=False)
class _Kept:
    video: WatchedVideo
    place: Literal["device", "host"]
    users: int = 0

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves((self.video.kv.cache, dict(self.video.kv.pooled))))


class WatchedVideos:
    """The videos that a model has watched.

    `folder` None keeps no files. `prefill` and `cache` hold for all videos.
    """

    def __init__(
        self,
        model: Model,
        budgets: Budgets,
        folder: Path | None,
        metrics: Metrics,
        *,
        prefill: PrefillConfig,
        cache: CacheConfig,
    ):
        self._model, self._budgets, self._folder, self._metrics = model, budgets, folder, metrics
        self.prefill, self.cache = prefill, cache
        self._model_key = model_key(model, cache)
        self._kept: dict[str, _Kept] = {}  # the most recently used one last
        self._by_frames: dict[str, VideoKey] = {}
        self._same: dict[str, VideoKey] = {}
        self._reserved = self._live = 0
        self._writer = ThreadPoolExecutor(1, "write videos")
        self._writing: set[Future[None]] = set()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            self._shrink_folder()

    def key(self, content: str, frames: FrameSampling, folder_fps: float | None) -> VideoKey:
        """The key of a video by its content hash. `folder_fps` is None for a file. Any thread may ask."""
        return VideoKey(content_key(content, frames, folder_fps, self.prefill) | self._model_key)

    def first_key(self, key: VideoKey) -> VideoKey:
        """The key under which the frames of another key are kept, where `same_frames` has found one. Or `key` itself."""
        return self._same.get(key.name, key)

    def same_frames(self, key: VideoKey, clip: Clip) -> VideoKey:
        """`first_key` of a video that has been opened: other settings may have chosen the same frames of it before."""
        fields = {name: value for name, value in key.fields.items() if name != "sampling"}
        fields["frames"] = hashlib.blake2b(clip.indices.tobytes(), digest_size=16).hexdigest()
        fields |= {name: key.fields["sampling"][name] for name in ("folder_fps", "times")}
        first = self._by_frames.setdefault(VideoKey(fields).name, key)
        if first.name != key.name:
            self._same[key.name] = first
        for known in (self._by_frames, self._same):
            if len(known) > _REMEMBERED:
                del known[next(iter(known))]
        return first

    def place(self, key: VideoKey) -> Place | None:
        """Where a video is, if anywhere. Any thread may ask."""
        kept = self._kept.get(key.name)
        if kept is not None:
            return kept.place
        return "disk" if self._folder is not None and self._file(key).is_file() else None

    def get(self, key: VideoKey) -> WatchedVideo:
        """A video that is held."""
        return self._kept[key.name].video

    def hold(self, key: VideoKey) -> None:
        """Keeps a video that is on the device there until `release`."""
        kept = self._kept.pop(key.name)
        self._kept[key.name] = kept
        assert kept.place == "device"
        kept.users += 1
        if self._folder is not None:
            with contextlib.suppress(OSError):  # it may not have been written yet
                os.utime(self._file(key))

    def release(self, key: VideoKey) -> None:
        self._kept[key.name].users -= 1
        self.make_room(0)  # the pooled KV may have been added

    # --- ways to the device ---------------------------------------------------------------------

    def needed(self, clip: Clip | None, around: Surroundings | None) -> int:
        """Bytes of the KV of a clip or pictures that will be watched. Raises NotEnoughMemory where they never fit."""
        model = self._model
        plan = model.plan(model.layout_of(clip, around), self.prefill)
        need = plan.slots * memory.slot_bytes(
            model.config,
            model.dtype,
            quantized=self.cache.quantized,
            key_channels=model.key_channels,
            tensor=model.network.tensor,
        )
        if need > self._budgets.device:
            raise NotEnoughMemory(
                f"{len(clip.indices) if clip else 'the'} {'frames' if clip else 'pictures'} need {need / 2**30:.2f} GiB of KV, more than the "
                f"{self._budgets.device / 2**30:.2f} that this server has for a video: ask for fewer"
            )
        return need

    def make_room(self, need: int, what: str = "the video") -> bool:
        """Moves unused videos off the device until `need` bytes are free there. Returns whether they are.

        Raises NotEnoughMemory where `what` needs more than live videos leave.
        """
        left = self._budgets.device - self._live
        if need > left:
            raise NotEnoughMemory(
                f"{what} needs {need / 2**30:.2f} GiB of device memory, more than the {left / 2**30:.2f} that this server "
                f"has for it (open live videos hold {self._live / 2**30:.2f}): ask for less"
            )
        while self._reserved + self._bytes("device") + need > self._budgets.device:
            if not self.move_oldest():
                return False
        return True

    def reserve(self, need: int) -> None:
        """Counts `need` bytes as used, or frees them where it is negative."""
        self._reserved += need

    def reserve_live(self, need: int) -> None:
        """`reserve` for a live video, which holds its memory until it ends."""
        self._live += need
        self._reserved += need

    def free_some(self) -> bool:
        """Frees memory that the budget would allow to be used, but that is short. Returns whether any was freed."""
        if not self.move_oldest():
            return False
        self.wait_for_writer()
        return True

    def move_oldest(self) -> bool:
        """Moves the least recently used video off the device. Returns False where all are in use."""
        for name, kept in self._kept.items():
            if kept.place == "device" and not kept.users:
                kv = kept.video.kv
                kv.pooled.clear()
                if kept.bytes > self._budgets.host:
                    del self._kept[name]  # its memory is free as soon as its file is written
                else:
                    kv.cache = jax.device_get(kv.cache)
                    kept.place = "host"
                    self._shrink_host()
                return True
        return False

    def wait_for_writer(self) -> None:
        """Waits until all files are written, and so until their memory is free."""
        for writing in list(self._writing):
            writing.result()

    def restore(self, key: VideoKey) -> bool:
        """Brings a video back from host memory. Returns False where there is no room for now."""
        kept = self._kept[key.name]
        kept.users += 1  # what makes room must not drop it
        try:
            if not self.make_room(kept.bytes // self._model.network.tensor):
                return False
        finally:
            kept.users -= 1
        kept.video.kv.cache = compiled.place_cache(kept.video.kv.cache, self._model.network.mesh)
        kept.place = "device"
        return True

    def load(self, key: VideoKey) -> Generator[bool, None, None]:
        """Reads a video from its file, in steps, which yield whether there was room for one.

        Raises UserError where the file cannot be used. It is then removed.
        """
        file = self._file(key)
        try:
            size = file.stat().st_size
        except OSError:
            raise UserError("the video's file is gone") from None
        # The file holds each KV head once, also where several devices have the same one.
        size = size * self._model.network.head_copies // self._model.network.tensor
        while not self.make_room(size):
            yield False
        self.reserve(size)
        try:
            loading = loading_cache(file, self._model, key.fields, Path("video"), BilevelConfig(), self.cache)
            while True:
                try:
                    next(loading)
                except StopIteration as end:
                    video: WatchedVideo = end.value
                    break
                yield True
        except NotEnoughMemory:
            raise
        except UserError as e:
            logger.warning("warning: %s; it is watched again", e)
            file.unlink(missing_ok=True)
            raise
        finally:
            self.reserve(-size)
        self._kept[key.name] = _Kept(video, "device")

    def add(self, key: VideoKey, video: WatchedVideo) -> None:
        """Keeps a video that was just watched, and begins to write its file."""
        self._kept[key.name] = _Kept(self._model.adopt(video), "device")
        if self._folder is not None:
            writing = self._writer.submit(self._write, key, video)
            self._writing.add(writing)
            writing.add_done_callback(self._writing.discard)

    def close(self) -> None:
        """Waits for the files that are being written."""
        self._writer.shutdown()
        self._kept.clear()

    def publish(self) -> None:
        """Sets the gauges."""
        for place in ("device", "host"):
            self._metrics.videos.labels(place).set(sum(kept.place == place for kept in self._kept.values()))
            self._metrics.kv_bytes.labels(place).set(self._bytes(place))

    # --- behind the device ----------------------------------------------------------------------

    def _bytes(self, place: Place) -> int:
        """Bytes on each device, or on the host."""
        total = sum(kept.bytes for kept in self._kept.values() if kept.place == place)
        return total // self._model.network.tensor if place == "device" else total

    def _shrink_host(self) -> None:
        for name, kept in list(self._kept.items()):
            if self._bytes("host") <= self._budgets.host:
                return
            if kept.place == "host" and not kept.users:
                del self._kept[name]

    def _file(self, key: VideoKey) -> Path:
        assert self._folder is not None
        return self._folder / f"{key.name}.kv"

    def _write(self, key: VideoKey, video: WatchedVideo) -> None:
        """Runs in the writing thread."""
        try:
            save_cache(self._file(key), video, key.fields)
        except UserError as e:
            logger.warning("warning: a watched video is not kept on the disk: %s", e)
        self._shrink_folder()

    def _shrink_folder(self) -> None:
        """Removes the least recently used files beyond the budget."""
        assert self._folder is not None
        files = []
        for path in self._folder.glob("*.kv"):
            with contextlib.suppress(OSError):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._budgets.disk:
                break
            path.unlink(missing_ok=True)
            files.remove((_, size, path))
            total -= size
        self._metrics.videos.labels("disk").set(len(files))
        self._metrics.kv_bytes.labels("disk").set(total)
