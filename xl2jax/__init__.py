"""Video-XL-2 in JAX.

Axis letters, in every docstring and einsum:

    B batch     F frames    G groups of 4 frames    P patches of a frame    C vision width
    V visual tokens of a group    T queries, or frames in DTS    S cache slots    L layers
    D LLM width    N heads    K KV heads    H head width
"""

from xl2jax.api import Answer, Model, load
from xl2jax.bilevel import BilevelConfig
from xl2jax.config import PRESETS, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.generate import SamplingConfig
from xl2jax.layout import PrefillConfig
from xl2jax.relevance import AttentionScorer
from xl2jax.selection import Chunk, RelevanceConfig
from xl2jax.video import SampleConfig
from xl2jax.watched import CacheConfig, WatchedVideo

__all__ = [
    "PRESETS", "Answer", "AttentionScorer", "BilevelConfig", "CacheConfig", "Chunk", "Model", "PrefillConfig", "RelevanceConfig",
    "SampleConfig", "SamplingConfig", "UserError", "VideoXL2Config", "WatchedVideo", "load",
]  # fmt: skip
