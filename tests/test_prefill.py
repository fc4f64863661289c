from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xl2jax
from xl2jax.config import PRESETS
from xl2jax.inference import compiled, prefill, session
from xl2jax.inference.cache import KVCache
from xl2jax.inference.generate import extend
from xl2jax.inference.layout import PrefillConfig, VideoLayout, dense_mask
from xl2jax.inference.network import Network
from xl2jax.models.qwen2 import Qwen2
from xl2jax.models.video_xl2 import abstract_model
from xl2jax.ops.attention import BLOCKWISE
from xl2jax.ops.dense import dense_attention

CONFIG = PRESETS["tiny"]


def run(
    model: xl2jax.Model, layout: VideoLayout, config: PrefillConfig, visual: np.ndarray, **plan_options: int
) -> KVCache:
    plan = prefill.make_plan(layout, config, "cpu", **plan_options)
    ids = [[(7 * g + i) % 90 for i in range(n)] for g, n in enumerate(layout.time_lengths)]
    video = session.VideoPrefill(model.network, layout, plan, range(layout.prefix), ids)
    step = plan.segment_groups
    for first in range(0, layout.groups, step):
        part = visual[first : first + step]
        video.add(jnp.asarray(np.pad(part, ((0, step - len(part)), (0, 0), (0, 0)))))
    return video.finish().cache


def masked_forward(
    llm: Qwen2, layout: VideoLayout, config: PrefillConfig, visual: np.ndarray, suffix: list[int]
) -> jax.Array:
    """Hidden states of the suffix when the whole sequence runs at once under upstream's N x N mask."""
    embeddings = [llm.embed_tokens(jnp.arange(layout.prefix))]
    for g, n in enumerate(layout.time_lengths):
        embeddings += [llm.embed_tokens(jnp.array([(7 * g + i) % 90 for i in range(n)])), jnp.asarray(visual[g])]
    x = jnp.concatenate([*embeddings, llm.embed_tokens(jnp.array(suffix))])
    mask = jnp.asarray(dense_mask(layout, len(suffix), config))

    def attend(state: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, jax.Array]:
        return state, jax.nn.dot_product_attention(q[None], k[None], v[None], mask=mask[None, None])[0]

    return llm.forward(x, jnp.arange(len(x)), attend, None)[0][-len(suffix) :]


@pytest.mark.parametrize(
    ("times", "config", "options"),
    [
        ((2, 1, 3, 2, 2, 1, 3), PrefillConfig(2, 0), {"step_groups": 1}),
        ((2, 1, 3, 2, 2, 1, 3), PrefillConfig(3, 1), {"step_groups": 6}),
        ((2, 1, 3, 2, 2, 1, 3), PrefillConfig(1, 2), {"step_groups": 2, "segment_steps": 3}),
        ((3,), PrefillConfig(4, 3), {}),
        ((2, 2, 1), PrefillConfig(2, 99), {"step_groups": 1, "segment_steps": 2}),
        ((2, 2, 1, 4, 1), PrefillConfig(2, None), {}),
    ],
)
def test_against_the_mask(
    model: xl2jax.Model, times: tuple[int, ...], config: PrefillConfig, options: dict[str, int]
) -> None:
    """With all steps and segments, the suffix gets the hidden states that the N x N mask gives."""
    layout = VideoLayout(3, times, CONFIG.visual_tokens)
    rng = np.random.default_rng(0)
    visual = rng.standard_normal((len(times), CONFIG.visual_tokens, CONFIG.llm.width)).astype(np.float32) * 0.1
    cache = run(model, layout, config, visual, **options)
    assert (int(cache.length), int(cache.global_length)) == (layout.tokens, layout.global_tokens)
    llm = model.network.model.llm
    suffix = [5, 6, 7, 8]
    text = compiled.new_cache(model.config.llm, 16, "float32")
    _, hidden = extend(llm, cache, text, jnp.array(suffix), jnp.int32(4), attention=BLOCKWISE)
    expected = masked_forward(llm, layout, config, visual, suffix)
    assert np.linalg.norm(hidden - expected) <= 1e-4 * np.linalg.norm(expected)


def test_a_second_length_in_the_bucket_compiles_nothing(model: xl2jax.Model) -> None:
    def once(groups: int, prefix: int) -> tuple[int, ...]:
        layout = VideoLayout(prefix, tuple(1 + g % 3 for g in range(groups)), CONFIG.visual_tokens)
        visual = np.zeros((groups, CONFIG.visual_tokens, CONFIG.llm.width), np.float32)
        run(model, layout, PrefillConfig(), visual)
        fns = (compiled.new_cache, compiled.prefill_globals, compiled.prefill_segment)
        return tuple(f._cache_size() for f in fns)

    first = once(38, 5)
    assert once(33, 9) == first
    assert once(40, 7) == first
    assert once(100, 7) > first  # the counter works


def temporaries(groups: int, config: PrefillConfig) -> tuple[int, int]:
    """Bytes of a prefill segment: (temporaries, output besides the donated cache and the hidden states)."""
    layout = VideoLayout(5, (3,) * groups, CONFIG.visual_tokens)
    plan = prefill.make_plan(layout, config, "cpu")
    params = nnx.state(abstract_model(CONFIG, jnp.float32))
    network = Network(CONFIG, params, BLOCKWISE, "cpu")
    cache = jax.eval_shape(lambda: compiled.new_cache(CONFIG.llm, plan.slots, "float32", plan.visual_start))
    segment = next(prefill.segments(prefill.steps(layout, plan, [[1, 2, 3]] * groups), plan))
    visual = jax.ShapeDtypeStruct((plan.segment_groups, CONFIG.visual_tokens, CONFIG.llm.width), jnp.float32)
    lowered = compiled.prefill_segment.lower(network, cache, visual, segment)
    memory = lowered.compile().memory_analysis()
    tokens = plan.segment_groups * (CONFIG.visual_tokens + plan.time_cap)
    hidden = tokens * CONFIG.llm.width * 4
    return memory.temp_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes - hidden


@pytest.mark.parametrize("window", [3, None])
def test_no_n_by_n_array_and_no_second_cache(window: int | None) -> None:
    """Temporaries are the same at 10 times the length, far below one N x N mask, and the cache is
    updated in place."""
    short, extra = temporaries(400, PrefillConfig(4, window))
    long, extra_long = temporaries(4000, PrefillConfig(4, window))
    assert long <= short * 1.01 + 4096
    n = 4000 * (CONFIG.visual_tokens + 3)
    assert long < n * n / 16
    assert extra == extra_long < 4096


def test_truncated_video_equals_the_shorter_one(model: xl2jax.Model) -> None:
    """Cutting a layout where a file ended early gives the ranges of the shorter video."""
    layout = VideoLayout(4, (2, 3, 1, 2, 2, 3), CONFIG.visual_tokens)
    plan = prefill.make_plan(layout, PrefillConfig(), "cpu", step_groups=4, segment_steps=1)
    ids = [[1] * n for n in layout.time_lengths]
    video = session.VideoPrefill(model.network, layout, plan, range(4), ids)
    visual = jnp.zeros((plan.segment_groups, CONFIG.visual_tokens, CONFIG.llm.width))
    video.add(visual)
    steps, _ = video.add(visual, 1)
    assert video.finish().layout == video.layout == dataclasses.replace(layout, time_lengths=(2, 3, 1, 2, 2))
    assert int(steps.visuals[0]) == CONFIG.visual_tokens
    assert int(steps.times[0]) == 2


def test_dense_attention_is_causal() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 6, n, 8)), jnp.float32) for n in (4, 2, 2))
    full = dense_attention(q, k, v, causal=True)
    assert np.allclose(full[:, :3], dense_attention(q[:, :3], k[:, :3], v[:, :3], causal=True), atol=1e-6)
    assert not np.allclose(full, dense_attention(q, k, v), atol=1e-3)
