"""Video caches on disk: one safetensors file that knows what it was made from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from xl2jax import prefill, runtime
from xl2jax.api import Model
from xl2jax.bilevel import BilevelConfig
from xl2jax.cache import KVArray, KVCache, QuantizedKV
from xl2jax.errors import UserError
from xl2jax.layout import PrefillConfig, VideoLayout
from xl2jax.offload import HostKV
from xl2jax.tensor_files import DTYPES, ShardWriter, Stored
from xl2jax.video import SampleConfig
from xl2jax.watched import CacheConfig, WatchedVideo

_FORMAT = "xl2jax video cache 1"
_CODES = {dtype: code for code, dtype in DTYPES.items()}


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
    model: Model, video: Path, sampling: SampleConfig, folder_fps: float, config: PrefillConfig, cache: CacheConfig
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
        "dtype": "int8" if cache.quantized else model.dtype,
        "checkpoint": model.fingerprint,
        "prefill": dataclasses.asdict(config),
    }


def save_cache(path: Path, video: WatchedVideo, key: dict[str, Any]) -> None:
    """Writes the filled part of a cache, a layer at a time, beside `path` and renames it."""
    cache = video.cache
    counts = {"globals": int(cache.global_length), "visual": int(cache.visual_length)}
    kept = _arrays(cache.k, cache.v)
    regions = {
        "globals": {name: (x, 0) for name, x in kept.items()},
        "visual": {name: (x, int(cache.visual_start)) for name, x in kept.items()}
        if video.host is None
        else {name: (x, 0) for name, x in _arrays(video.host.k, video.host.v).items()},
    }
    layers, kv_heads = cache.shape[:2]
    places = [(name, part, layer) for layer in range(layers) for name in kept for part in regions]
    tensors: list[Stored] = [
        (f"{name}.{part}.{layer}", (kv_heads, counts[part], *kept[name].shape[3:]), _CODES[kept[name].dtype])
        for name, part, layer in places
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
            for name, part, layer in places:
                x, start = regions[part][name]
                out.write(f"{name}.{part}.{layer}", np.asarray(x[layer, :, start : start + counts[part]]))
            out.write("features", features)
        os.replace(beside, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(e, OSError):
            raise UserError(f"{path}: cannot write the cache ({e.strerror})") from None
        raise


def _arrays(k: KVArray, v: KVArray) -> dict[str, Any]:
    """The arrays [L, K, S, ...] that a cache is made of, by name."""
    if isinstance(k, QuantizedKV) and isinstance(v, QuantizedKV):
        return {"k": k.values, "v": v.values, "k_scale": k.scale, "v_scale": v.scale}
    return {"k": k, "v": v}


def _cache_of(arrays: dict[str, Any]) -> tuple[KVArray, KVArray]:
    """`_arrays`' inverse."""
    if "k_scale" in arrays:
        return QuantizedKV(arrays["k"], arrays["k_scale"]), QuantizedKV(arrays["v"], arrays["v_scale"])
    return arrays["k"], arrays["v"]


def load_cache(
    path: Path, model: Model, key: dict[str, Any], video_path: Path, bilevel: BilevelConfig | None,
    cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
) -> WatchedVideo:  # fmt: skip
    """Reads a cache made with the same `key`. With `cache.offload` its visual KV never sees the device.

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
            model.check_cache(cache, bilevel)
            model.check_fits(layout, plan.config, bilevel, cache, loaded=True)
            slots = plan.visual_start if cache.offload else plan.slots
            empty = runtime.new_cache(
                model.config.llm, slots, model.dtype, plan.visual_start, quantized=cache.quantized
            )
            arrays, visual = _arrays(empty.k, empty.v), {}
            if cache.offload:
                visual = {
                    n: np.zeros((*a.shape[:2], plan.slots - plan.visual_start, *a.shape[3:]), a.dtype)
                    for n, a in arrays.items()
                }
            for layer, name in itertools.product(range(model.config.llm.layers), list(arrays)):
                arrays[name] = _put(arrays[name], f.get_tensor(f"{name}.globals.{layer}"), layer, 0)
                part = f.get_tensor(f"{name}.visual.{layer}")
                if cache.offload:
                    visual[name][layer, :, : part.shape[1]] = part
                else:
                    arrays[name] = _put(arrays[name], part, layer, plan.visual_start)
            features = f.get_tensor("features")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as e:
        raise UserError(f"{path}: not a whole video cache ({str(e).splitlines()[0]})") from None
    kv = KVCache(
        *_cache_of(arrays), jnp.int32(layout.global_tokens), jnp.int32(plan.visual_start),
        jnp.int32(layout.groups * layout.visual_tokens),
    )  # fmt: skip
    capacity = (plan.slots - plan.visual_start) // plan.visual_tokens
    watched = WatchedVideo(
        path=str(video_path), duration=about["duration"], times=about["times"], layout=layout, plan=plan,
        cache=kv, host=HostKV(*_cache_of(visual)) if cache.offload else None, features=jnp.pad(jnp.asarray(features), ((0, capacity - len(features)), (0, 0))),
        thumbnails=[], timings={"read": 0.0, "compute": 0.0},
    )  # fmt: skip
    return model.adopt(watched)


def _put(x: jax.Array, part: np.ndarray, layer: int, start: int) -> jax.Array:
    return _update(x, part[None], np.int32(layer), np.int32(start))


@functools.partial(jax.jit, donate_argnums=0)
def _update(x: jax.Array, part: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, part, (layer, 0, start, 0)[: x.ndim])


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
