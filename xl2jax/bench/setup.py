"""The random model and the video of random embeddings that the benchmarks run on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from xl2jax.arithmetic import ceil_div
from xl2jax.config import VideoXL2Config
from xl2jax.inference import session
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.cache import KVCache
from xl2jax.inference.decoding import Decoding, decode_together
from xl2jax.inference.generate import DecodeState, TokenSampling
from xl2jax.inference.layout import PrefillConfig, VideoLayout
from xl2jax.inference.network import Network
from xl2jax.inference.prefill import Step, make_plan, segments, steps
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.models.video_xl2 import VideoXL2

PREFIX, SUFFIX = 14, 20
TIMES = 9
"""Time tokens of a group. The mean of 2,048 frames that are a second apart is 9.4."""
DECODE_TOKENS = 32
_LONG = 8 * DECODE_TOKENS


def random_params(config: VideoXL2Config, dtype: str) -> nnx.State:
    """Random parameters, which are made on the device in one compiled call."""

    @jax.jit
    def init(key: jax.Array) -> nnx.State:
        return nnx.state(VideoXL2(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(key)))

    return init(jax.random.key(0))


def machine() -> str:
    """Device, processor and versions, for the head of a table."""
    device = jax.devices()[0]
    versions = ", ".join(f"{p} {version(p)}" for p in ("jax", "flax"))
    return f"{device.platform} {device.device_kind} x{jax.device_count()}, {platform.machine()}, {versions}"


class Setup:
    """A network and a video of random embeddings, which `xl2jax.inference.session` runs as in infer.py."""

    def __init__(
        self,
        config: VideoXL2Config,
        params: nnx.State,
        groups: int,
        prefill_config: PrefillConfig,
        step_groups: int | None,
        attention: str,
        *,
        quantized: bool = False,
        mesh: Mesh | None = None,
    ):
        """`quantized`: the video's KV is in 8 bits. `mesh`: the devices that `params` are split over."""
        self.quantized = quantized
        self.network = Network.create(config, params, attention, mesh=mesh)
        self.layout = VideoLayout(PREFIX, (TIMES,) * groups, config.visual_tokens)
        self.plan = make_plan(self.layout, prefill_config, self.network.platform, step_groups=step_groups)
        rng = np.random.default_rng(0)
        vocab = config.llm.vocab
        self._time_ids = rng.integers(0, vocab, (groups, TIMES)).tolist()
        self.suffix = session.suffix_ids(rng.integers(0, vocab, SUFFIX).tolist(), 0, SUFFIX // 2)
        shape = (self.plan.segment_groups, config.visual_tokens, config.llm.width)
        visual = jax.random.normal(jax.random.key(1), shape, jnp.dtype(self.network.dtype)) * 0.02
        self.visual = visual if mesh is None else jax.device_put(visual, self.network.whole)

    @property
    def segments(self) -> int:
        """The number of segments of the video."""
        return ceil_div(self.layout.groups, self.plan.segment_groups)

    def start(self) -> session.VideoPrefill:
        """Begins a prefill: the prefix is in the cache."""
        return session.VideoPrefill(
            self.network, self.layout, self.plan, [0] * PREFIX, self._time_ids, quantized=self.quantized
        )

    def prefill(self, segments: int | None = None) -> session.VideoKV:
        """Prefills the whole video, or its first `segments` segments."""
        video = self.start()
        for _ in range(self.segments if segments is None else segments):
            video.add(self.visual)
        return video.finish()

    def last_steps(self) -> Step:
        """The steps of the last segment."""
        *_, last = segments(steps(self.layout, self.plan, self._time_ids), self.plan)
        return last

    def read(self, kv: session.VideoKV, config: BilevelConfig) -> KVCache:
        """The mixed cache of a question: chunks are scored, the best stay dense, all others are pooled."""
        return session.choose_context(self.network, kv, self.suffix, config, AttentionScorer()).context

    def first_token(self, context: KVCache, new_tokens: int = _LONG) -> Decoding:
        """Runs the suffix and samples the first token of an answer of up to `new_tokens` tokens."""
        state = self.first_state(context, new_tokens)
        return Decoding(self.network, context, state, new_tokens=new_tokens, stop=NEVER, sampling=TokenSampling())

    def first_state(self, context: KVCache, new_tokens: int = _LONG) -> DecodeState:
        """What such an answer continues from."""
        state, _ = session.start_answer(
            self.network, context, self.suffix, new_tokens=new_tokens, stop=NEVER, sampling=TokenSampling()
        )
        return state

    def decode(self, answers: Sequence[Decoding]) -> None:
        """Decodes `DECODE_TOKENS` tokens of each answer in one program, so that few transfers to the host are timed."""
        decode_together(self.network, answers, size=DECODE_TOKENS)


NEVER = np.array([-1], np.int32)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    out = jax.block_until_ready(run())
    return time.perf_counter() - started, out
