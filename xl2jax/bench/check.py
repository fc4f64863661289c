"""Checks that the fast programs are accurate, at full width with few layers, on a short video and random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from xl2jax.bench.setup import SUFFIX, Setup, random_params
from xl2jax.config import FRAMES_PER_GROUP, VideoXL2Config
from xl2jax.inference import session
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.cache import KVCache
from xl2jax.inference.layout import PrefillConfig
from xl2jax.models.param_tree import cast
from xl2jax.ops.kv import unpack

_GROUPS, _LAYERS = 24, 3


def _filled(cache: KVCache) -> np.ndarray:
    """Keys and values of all tokens of a cache, float32."""
    first, start = int(cache.global_length), int(cache.visual_start)
    parts = [
        unpack(x)[:, :, a:b]
        for x in (cache.k, cache.v)
        for a, b in ((0, first), (start, start + int(cache.visual_length)))
    ]
    return np.concatenate([np.asarray(x, np.float32) for x in parts], axis=2)


def _relative_l2(x: Any, y: Any) -> float:
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def check_rows(config: VideoXL2Config, dtype: str, frames: np.ndarray, attention: str) -> list[dict[str, Any]]:
    """Compares `dtype` with float32, the kernel with XLA, and bi-level decoding with dense decoding, by relative L2.

    `frames` uint8 [F, H, W, 3] are repeated to fill the video.
    """
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=_LAYERS),
        llm=dataclasses.replace(config.llm, layers=_LAYERS),
    )
    exact = random_params(config, "float32")
    pixels = np.resize(frames, (_GROUPS * FRAMES_PER_GROUP, *frames.shape[1:]))
    chunked = PrefillConfig(4, 3)

    def run(params: nnx.State, implementation: str) -> tuple[Setup, jax.Array, session.VideoKV]:
        setup = Setup(config, params, _GROUPS, chunked, _GROUPS, implementation)
        visual = session.encode(setup.network, setup.plan, pixels)
        video = setup.start()
        video.add(visual)
        return setup, visual, video.finish()

    with jax.default_matmul_precision("highest"):
        _, visual, kv = run(exact, "blockwise")
        expected, expected_visual = _filled(kv.cache), np.asarray(visual)
    params = cast(exact, dtype)
    rows, caches = [], {}
    for implementation in dict.fromkeys((attention, "blockwise")):
        setup, visual, kv = run(params, implementation)
        caches[implementation] = _filled(kv.cache)
        error = _relative_l2(caches[implementation], expected)
        rows.append({"check": f"KV cache, {dtype} ({implementation}) against float32", "relative_l2": error})
    error = _relative_l2(visual, expected_visual)
    rows.insert(0, {"check": f"visual tokens, {dtype} against float32", "relative_l2": error})
    error = _relative_l2(caches[attention], caches["blockwise"])
    rows.append({"check": f"KV cache, {attention} against blockwise, {dtype}", "relative_l2": error})
    whole = BilevelConfig(4, 4, _GROUPS // 4)
    mixed = setup.read(kv, whole)
    dense, bilevel = (
        np.asarray(unpack(setup.first_state(c).text.v)[:, :, :SUFFIX], np.float32) for c in (kv.cache, mixed)
    )
    rows.append(
        {
            "check": "suffix values, bi-level with every chunk dense against dense",
            "relative_l2": _relative_l2(bilevel, dense),
        }
    )
    return rows
