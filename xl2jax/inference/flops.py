"""Floating-point operations of the networks, for MFU and for `xl2jax plan`. A multiply-add counts as two."""

from __future__ import annotations

import numpy as np

from xl2jax.config import FRAMES_PER_GROUP, LLMConfig, VideoXL2Config
from xl2jax.inference.layout import PrefillConfig, VideoLayout, natural_ranges
from xl2jax.models.dts import STAGES


def vision(config: VideoXL2Config) -> float:
    """The vision tower on one frame."""
    c = config.vision
    patches = c.patch_grid**2
    layer = patches * (4 * c.width**2 + 2 * c.width * c.mlp_width) + 2 * patches**2 * c.width
    return 2.0 * (c.run_layers * layer + patches * 3 * c.patch_size**2 * c.width)


def dts_and_projector(config: VideoXL2Config) -> float:
    """DTS and projector on one group."""
    c, d, pixels = config.vision.width, config.llm.width, config.grid**2
    total, frames = 0.0, FRAMES_PER_GROUP
    for _ in range(STAGES):
        spatial = frames * (4 * pixels * c**2 + 2 * pixels**2 * c)
        temporal = pixels * (4 * frames * c**2 + 2 * 2 * frames**2 * c)
        frames //= 2
        total += spatial + temporal + frames * pixels * 27 * c**2
    return 2.0 * (total + pixels * (c * d + d**2))


def llm_linear(config: LLMConfig) -> float:
    """The decoder layers' linear maps on one token, without lm_head and attention."""
    c = config
    heads = c.heads * c.head_width
    return 2.0 * c.layers * (c.width * (2 * heads + 2 * c.kv_heads * c.head_width) + 3 * c.width * c.mlp_width)


def attention(config: LLMConfig, pairs: float) -> float:
    """Attention in all layers over `pairs` (query, visible key) pairs."""
    return 4.0 * config.layers * config.heads * config.head_width * pairs


def visible_pairs(layout: VideoLayout, config: PrefillConfig, suffix: int = 0) -> float:
    """(query, key) pairs that the mask rule lets through."""
    g_end, v_lo, v_hi = (
        x.astype(np.int64) for x in natural_ranges(layout, suffix, layout.global_tokens + suffix, config).ranges
    )
    return float((g_end + np.maximum(v_hi - v_lo, 0)).sum())


def prefill(config: VideoXL2Config, layout: VideoLayout, prefill: PrefillConfig) -> float:
    """The LLM over prefix and video."""
    return llm_linear(config.llm) * layout.tokens + attention(config.llm, visible_pairs(layout, prefill))
