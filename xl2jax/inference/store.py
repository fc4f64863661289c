"""Video caches on disk: one safetensors file that records what it was made from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError, safe_open

from xl2jax.checkpoint.array_checks import checksum
from xl2jax.checkpoint.safetensors_io import DTYPES, ShardWriter, Stored
from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError, shorten
from xl2jax.inference.api import Model
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.cache import KVCache
from xl2jax.inference.layout import PrefillConfig, VideoLayout
from xl2jax.inference.offload import HostKV
from xl2jax.inference.session import VideoKV, empty_video_cache
from xl2jax.inference.video_cache import CacheConfig, WatchedVideo
from xl2jax.ops.kv import KVArray, QuantizedKV
from xl2jax.system.atomic import replacing_file
from xl2jax.system.schema import SMALL_FILE, Schema, parse_json, require_regular, unreadable
from xl2jax.video.clip import FrameSampling

_FORMAT = "xl2jax video cache 3"
_EARLIER = ("xl2jax video cache 1", "xl2jax video cache 2")
_MAX_TOKENS = 2**24
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def content_hash(path: Path) -> str:
    """The hash of a file's bytes, or of the names and bytes of a folder's files."""
    digest = hashlib.blake2b(digest_size=16)
    if not path.is_dir():
        require_regular(path)
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        digest.update(os.fsencode(file.name) if path.is_dir() else b"")
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def cache_key(
    model: Model, video: Path, sampling: FrameSampling, folder_fps: float, config: PrefillConfig, cache: CacheConfig
) -> dict[str, Any]:
    """Everything a video cache depends on."""
    return video_key(video, sampling, folder_fps, config) | model_key(model, cache)


def model_key(model: Model, cache: CacheConfig) -> dict[str, Any]:
    """The part of a cache's key that depends on the model."""
    return {"dtype": "int8" if cache.quantized else model.dtype, "checkpoint": model.fingerprint}


def video_key(video: Path, sampling: FrameSampling, folder_fps: float, config: PrefillConfig) -> dict[str, Any]:
    """The part of a cache's key that is known before a model is loaded."""
    try:
        content = content_hash(video)
    except OSError as e:
        raise UserError(f"{video}: cannot be read ({e.strerror})") from None
    return content_key(content, sampling, folder_fps if video.is_dir() else None, config)


def pictures_key(pictures: Sequence[Path], text: str | None, config: PrefillConfig) -> dict[str, Any]:
    """`video_key` of pictures without a video; what to add to that of a video beside which they stand."""
    try:
        content = [content_hash(picture) for picture in pictures]
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from None
    digest = hashlib.blake2b("".join(content).encode(), digest_size=16).hexdigest()
    return {"pictures": digest, "text": text, "prefill": dataclasses.asdict(config)}


def content_key(
    content: str, sampling: FrameSampling, folder_fps: float | None, config: PrefillConfig
) -> dict[str, Any]:
    """`video_key` of a video whose hash is known. `folder_fps` is None for a file."""
    return {
        "video": content,
        "sampling": {**dataclasses.asdict(sampling), "folder_fps": folder_fps},
        "prefill": dataclasses.asdict(config),
    }


def save_cache(path: Path, video: WatchedVideo, key: dict[str, Any]) -> None:
    """Writes the filled part of a cache, one layer at a time, with a checksum of everything.

    Raises UserError where it cannot be written. An earlier file of that name then stays as it was.
    """
    kv = video.kv
    cache = kv.cache
    kept = _arrays(cache.k, cache.v)
    regions = {
        "globals": {name: (x, 0) for name, x in kept.items()},
        "visual": {name: (x, int(cache.visual_start)) for name, x in kept.items()}
        if kv.host is None
        else {name: (x, 0) for name, x in _arrays(kv.host.k, kv.host.v).items()},
    }
    copies = video.head_copies
    places, tensors = _contents(kept, kv.layout, copies)
    metadata = {
        "format": _FORMAT,
        "key": json.dumps(key, sort_keys=True),
        "video": json.dumps({"duration": video.duration, "times": video.times, **_beside(video)}),
    }
    size = sum(math.prod(shape) * DTYPES[code].itemsize for _, shape, code in tensors)
    with replacing_file(path, need_bytes=size) as beside, ShardWriter(beside, tensors, metadata) as out:
        checksums = [checksum(np.frombuffer(out.header, np.uint8))]

        def write(name: str, array: np.ndarray) -> None:
            out.write(name, array)
            checksums.append(checksum(array))

        for name, part, layer, count in places:
            x, start = regions[part][name]
            write(f"{name}.{part}.{layer}", np.asarray(x[layer, ::copies, start : start + count]))
        out.write("checksums", np.array([list(bytes.fromhex(c)) for c in checksums], np.uint8).view(np.int8))


def _beside(video: WatchedVideo) -> dict[str, Any]:
    """What a file says of text and pictures beside a video, or without one."""
    layout = video.kv.layout
    about = {"prefix": layout.prefix, "tail": layout.tail, "lead": video.lead}
    return about | {"picture_tokens": video.picture_tokens}


def _contents(
    arrays: dict[str, Any], layout: VideoLayout, copies: int
) -> tuple[list[tuple[str, str, int, int]], list[Stored]]:
    """The contents of a file in order: (array, region, layer, slots) of the KV, and all tensors.

    A file holds each KV head once, also where devices have copies of it.
    """
    counts = {"globals": layout.global_tokens, "visual": layout.groups * layout.visual_tokens}
    layers = len(next(iter(arrays.values())))
    places = [
        (name, part, layer, count) for layer in range(layers) for name in arrays for part, count in counts.items()
    ]
    tensors: list[Stored] = [
        (
            f"{name}.{part}.{layer}",
            (arrays[name].shape[1] // copies, count, *arrays[name].shape[3:]),
            _CODES[arrays[name].dtype],
        )
        for name, part, layer, count in places
    ]
    tensors.append(("checksums", (len(tensors) + 1, 16), "I8"))  # of the header, then of each tensor
    return places, tensors


def _arrays(k: KVArray, v: KVArray) -> dict[str, Any]:
    """The arrays [L, K, S, ...] of a cache by name."""
    if isinstance(k, QuantizedKV) and isinstance(v, QuantizedKV):
        exact = {} if k.exact is None else {"k_exact": k.exact}
        return {"k": k.values, "v": v.values, "k_scale": k.scale, "v_scale": v.scale, **exact}
    return {"k": k, "v": v}


def _cache_of(arrays: dict[str, Any]) -> tuple[KVArray, KVArray]:
    """The inverse of `_arrays`."""
    if "k_scale" in arrays:
        k = QuantizedKV(arrays["k"], arrays["k_scale"], arrays.get("k_exact"))
        return k, QuantizedKV(arrays["v"], arrays["v_scale"])
    return arrays["k"], arrays["v"]


def load_cache(
    path: Path,
    model: Model,
    key: dict[str, Any],
    video_path: Path,
    bilevel: BilevelConfig | None,
    cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
) -> WatchedVideo:
    """Reads a cache made with the same `key`. With `cache.offload` its visual KV is never on the device.

    Raises UserError where the file is not a cache or is damaged, or where it was made from something else. The message
    then names the difference.
    """
    loading = loading_cache(path, model, key, video_path, bilevel, cache)
    while True:
        try:
            next(loading)
        except StopIteration as end:
            watched: WatchedVideo = end.value
            return watched


def loading_cache(
    path: Path,
    model: Model,
    key: dict[str, Any],
    video_path: Path,
    bilevel: BilevelConfig | None,
    cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
) -> Generator[None, None, WatchedVideo]:
    """`load_cache` in steps: yields behind every tensor of the file, and returns the video."""
    with _CacheFile(path) as file:
        file.check_key(key)
        about = file.about
        layout = model.layout(model.tokenizer.time_ids(about.times), about.prefix, about.tail)
        config = PrefillConfig(**key["prefill"])
        model.check_cache(cache, bilevel)
        model.check_fits(layout, config, bilevel, cache, loaded=True)
        plan = model.plan(layout, config)
        slots = plan.visual_start if cache.offload else plan.slots
        empty = empty_video_cache(model.network, slots, plan.visual_start, quantized=cache.quantized)
        arrays, visual = _arrays(empty.k, empty.v), {}
        copies = model.network.head_copies
        places, tensors = _contents(arrays, layout, copies)
        file.check_tensors(tensors)
        if cache.offload:
            visual = {
                n: np.zeros((*a.shape[:2], plan.slots - plan.visual_start, *a.shape[3:]), a.dtype)
                for n, a in arrays.items()
            }
        for name, part, layer, count in places:
            array = np.repeat(file.read(f"{name}.{part}.{layer}"), copies, axis=0)
            if part == "globals":
                arrays[name] = _put(arrays[name], array, layer, 0)
            elif cache.offload:
                visual[name][layer, :, :count] = array
            else:
                arrays[name] = _put(arrays[name], array, layer, plan.visual_start)
            yield
    filled = KVCache(
        *_cache_of(arrays),
        jnp.int32(layout.global_tokens),
        jnp.int32(plan.visual_start),
        jnp.int32(layout.groups * layout.visual_tokens),
    )
    host = HostKV(*_cache_of(visual)) if cache.offload else None
    watched = WatchedVideo(
        path=str(video_path),
        duration=about.duration,
        times=about.times,
        kv=VideoKV(layout, plan, filled, host),
        head_copies=copies,
        thumbnails=[],
        timings={"read": 0.0, "compute": 0.0},
        lead=about.lead,
        picture_tokens=about.picture_tokens,
    )
    return model.adopt(watched)


def check_cache_file(path: Path, key: dict[str, Any] | None = None) -> None:
    """Raises UserError for a file that is not a cache of this version, or whose key differs from `key`.

    It needs no model: `key` may be the part that is known before (`video_key`).
    """
    with _CacheFile(path) as file:
        file.check_key(key or {})


class _About(Schema):
    """The description of the video in a file, and of what stands beside it."""

    duration: Annotated[float, Field(ge=0)]
    times: Annotated[list[Annotated[float, Field(ge=0)]], Field(max_length=2**20)]
    prefix: Annotated[int, Field(ge=1, le=_MAX_TOKENS)] | None = None
    tail: Annotated[int, Field(ge=0, le=_MAX_TOKENS)] = 0
    lead: str = "\n"
    picture_tokens: Annotated[int, Field(ge=0, le=_MAX_TOKENS)] = 0

    @field_validator("times")
    @classmethod
    def _whole_groups(cls, times: list[float]) -> list[float]:
        if len(times) % FRAMES_PER_GROUP:
            raise ValueError(f"should hold whole groups of {FRAMES_PER_GROUP} frames")
        return times

    @model_validator(mode="after")
    def _holds_something(self) -> _About:
        if not self.times and (self.prefix is None or self.tail):
            raise ValueError("should have times, or a prefix alone")
        if self.picture_tokens > (self.prefix or 0) + self.tail:
            raise ValueError("should hold no more picture tokens than tokens")
        return self


class _CacheFile:
    """Reads a cache file in the order in which it was written. All damage raises UserError."""

    def __init__(self, path: Path):
        self._path = path
        try:
            header = _header(path)
            self._file = safe_open(path, framework="np").__enter__()
        except OSError as e:
            raise unreadable(path, e) from None
        except SafetensorError as e:
            raise self._damaged(f"not a complete video cache: {e}") from None
        metadata = self._file.metadata() or {}
        if metadata.get("format") in _EARLIER:
            raise self._damaged("it was made by an earlier version")
        if metadata.get("format") != _FORMAT:
            raise UserError(f"{path}: not a video cache of this version")
        self._names = [n for n in self._file.offset_keys() if n != "checksums"]
        checksums = self._tensor("checksums")
        if checksums.dtype != np.int8 or checksums.shape != (len(self._names) + 1, 16):
            raise self._damaged("its checksums are incomplete")
        wanted = [row.tobytes().hex() for row in checksums]
        if checksum(np.frombuffer(header, np.uint8)) != wanted[0]:
            raise self._damaged("the checksum of its header does not match")
        self._wanted = dict(zip(self._names, wanted[1:], strict=True))
        self._key = parse_json(metadata.get("key", ""), dict[str, Any], f"{path}: key")
        self.about = parse_json(metadata.get("video", ""), _About, f"{path}: video")

    def check_key(self, key: dict[str, Any]) -> None:
        """Raises UserError where the file was made from something else."""
        _check_key(self._path, self._key, key)

    def check_tensors(self, tensors: list[Stored]) -> None:
        """Raises UserError where the file holds other tensors."""
        parts = {name: self._file.get_slice(name) for name in [*self._names, "checksums"]}
        if [(n, tuple(p.get_shape()), str(p.get_dtype())) for n, p in parts.items()] != tensors:
            raise self._damaged("its tensors do not match its description of the video")

    def read(self, name: str) -> np.ndarray:
        array = self._tensor(name)
        if checksum(array) != self._wanted[name]:
            raise self._damaged(f"the checksum of {name} does not match")
        return array

    def _tensor(self, name: str) -> np.ndarray:
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise self._damaged(str(e)) from None

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self._path}: cannot be used ({shorten(reason)}): remove the file, and watch the video again"
        )

    def __enter__(self) -> _CacheFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)


def _header(path: Path) -> bytes:
    """The bytes of the header. safetensors checks that they are a header."""
    require_regular(path)
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return f.read(min(size, SMALL_FILE))


def _put(x: jax.Array, part: np.ndarray, layer: int, start: int) -> jax.Array:
    return _update(x, part[None], np.int32(layer), np.int32(start))


@functools.partial(jax.jit, donate_argnums=0)
def _update(x: jax.Array, part: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, part, (layer, 0, start, 0)[: x.ndim])


def _check_key(path: Path, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    if wanted:  # those of a video alone name no pictures, and those of pictures no video
        wanted = {"video": None, "pictures": None} | wanted
    for name, value in wanted.items():
        if made.get(name) != value:
            old = made.get(name)
            if isinstance(value, dict) and isinstance(old, dict):
                change = ", ".join(
                    f"{k} was {shorten(str(old.get(k)))}, now it is {v}" for k, v in value.items() if old.get(k) != v
                )
                raise UserError(f"{path}: made with other {name} settings ({change}); remove it or name another file")
            what = {"video": "another video", "pictures": "other pictures", "checkpoint": "another checkpoint"}.get(
                name, f"{name} {shorten(str(old))}, not {value}"
            )
            raise UserError(f"{path}: made from {what}; remove it or name another file")
