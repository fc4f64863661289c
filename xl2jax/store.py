"""Video caches on disk: one safetensors file that knows what it was made from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from xl2jax import memory, prefill, runtime
from xl2jax.api import Model, WatchedVideo
from xl2jax.bilevel import BilevelConfig
from xl2jax.cache import KVCache
from xl2jax.checkpoint import DTYPE_NAMES
from xl2jax.errors import UserError
from xl2jax.layout import PrefillConfig, VideoLayout
from xl2jax.tensor_files import ShardWriter, Stored
from xl2jax.video import SampleConfig

_FORMAT = "xl2jax video cache 1"


def content_hash(path: Path) -> str:
    """Hash of a file's bytes, or of the names and bytes of a folder's files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        digest.update(file.name.encode() if path.is_dir() else b"")
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def cache_key(
    model: Model, video: Path, sampling: SampleConfig, folder_fps: float, config: PrefillConfig
) -> dict[str, Any]:
    """Everything a video cache depends on."""
    if not video.exists():
        raise UserError(f"{video}: no such video")
    try:
        content = content_hash(video)
    except OSError as e:
        raise UserError(f"{video}: cannot be read ({e.strerror})") from None
    return {
        "video": content,
        "sampling": {**dataclasses.asdict(sampling), "folder_fps": folder_fps if video.is_dir() else None},
        "dtype": model.dtype,
        "checkpoint": model.fingerprint,
        "prefill": dataclasses.asdict(config),
    }


def save_cache(path: Path, video: WatchedVideo, key: dict[str, Any]) -> None:
    """Writes the filled part of a cache, a layer at a time, beside `path` and renames it."""
    cache, code = video.cache, DTYPE_NAMES[str(video.cache.k.dtype)]
    layers, kv_heads, _, h = cache.k.shape
    counts = {"globals": int(cache.global_length), "visual": int(cache.visual_length)}
    starts = {"globals": 0, "visual": int(cache.visual_start)}
    tensors: list[Stored] = [
        (f"{name}.{part}.{layer}", (kv_heads, counts[part], h), code)
        for layer in range(layers)
        for name in ("k", "v")
        for part in counts
    ]
    features = np.asarray(video.features[: video.layout.groups], np.float32)
    tensors.append(("features", features.shape, "F32"))
    metadata = {
        "format": _FORMAT,
        "key": json.dumps(key, sort_keys=True),
        "video": json.dumps({
            "duration": video.duration, "times": video.times,
            "prefix": video.layout.prefix, "time_lengths": video.layout.time_lengths,
            "visual_tokens": video.layout.visual_tokens, "plan": dataclasses.asdict(video.plan),
        }),
    }  # fmt: skip
    beside = path.with_name(f".{path.name}.incomplete")
    try:
        with ShardWriter(beside, tensors, metadata) as out:
            for layer in range(layers):
                for name, x in (("k", cache.k), ("v", cache.v)):
                    for part, count in counts.items():
                        slots = x[layer, :, starts[part] : starts[part] + count]
                        out.write(f"{name}.{part}.{layer}", np.asarray(slots))
            out.write("features", features)
        os.replace(beside, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(e, OSError):
            raise UserError(f"{path}: cannot write the cache ({e.strerror})") from None
        raise


def load_cache(
    path: Path, model: Model, key: dict[str, Any], video_path: Path, bilevel: BilevelConfig | None
) -> WatchedVideo:
    """Reads a cache made with the same `key`.

    Raises UserError where it is not a cache, or was made from something else: the difference is named.
    """
    try:
        with safe_open(path, framework="np") as f:
            metadata = f.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path}: not a video cache of this version")
            _check_key(path, json.loads(metadata["key"]), key)
            about = json.loads(metadata["video"])
            layout = VideoLayout(about["prefix"], tuple(about["time_lengths"]), about["visual_tokens"])
            plan = about["plan"]
            plan = prefill.PrefillPlan(**{**plan, "config": PrefillConfig(**plan["config"])})
            memory.check_fits(layout, lambda layout: model.need(layout, plan.config, bilevel))
            cache = runtime.new_cache(model.config.llm, plan.slots, model.dtype, plan.visual_start)
            k, v = cache.k, cache.v
            for layer in range(model.config.llm.layers):
                for part, start in (("globals", 0), ("visual", plan.visual_start)):
                    k = _put(k, f.get_tensor(f"k.{part}.{layer}"), layer, start)
                    v = _put(v, f.get_tensor(f"v.{part}.{layer}"), layer, start)
            features = f.get_tensor("features")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as e:
        raise UserError(f"{path}: not a whole video cache ({str(e).splitlines()[0]})") from None
    cache = KVCache(
        k, v, jnp.int32(layout.global_tokens), jnp.int32(plan.visual_start),
        jnp.int32(layout.groups * layout.visual_tokens),
    )  # fmt: skip
    capacity = (plan.slots - plan.visual_start) // plan.visual_tokens
    return WatchedVideo(
        path=str(video_path), duration=about["duration"], times=about["times"], layout=layout, plan=plan,
        cache=cache, features=jnp.pad(jnp.asarray(features), ((0, capacity - len(features)), (0, 0))),
        thumbnails=[], timings={"read": 0.0, "vision": 0.0, "prefill": 0.0},
    )  # fmt: skip


def _put(x: jax.Array, part: np.ndarray, layer: int, start: int) -> jax.Array:
    return _update(x, part[None], np.int32(layer), np.int32(start))


@functools.partial(jax.jit, donate_argnums=0)
def _update(x: jax.Array, part: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, part, (layer, 0, start, 0))


def _check_key(path: Path, made: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if made.get(name) != value:
            old = made.get(name)
            if isinstance(value, dict) and isinstance(old, dict):
                change = ", ".join(f"{k} {old.get(k)} there, {v} here" for k, v in value.items() if old.get(k) != v)
                raise UserError(f"{path}: made with other {name} settings ({change})")
            what = {"video": "another video", "checkpoint": "another checkpoint"}.get(
                name, f"{name} {old}, not {value}"
            )
            raise UserError(f"{path}: made from {what}")
