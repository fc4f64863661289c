"""Video KV in 8 bits and in host memory: quantisation errors are bounded, and offloading changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import xl2jax
from xl2jax.arithmetic import ceil_div
from xl2jax.commands import infer
from xl2jax.config import PRESETS
from xl2jax.errors import UserError
from xl2jax.inference import memory, selection, session
from xl2jax.inference.bilevel import BilevelConfig, mix, mixed_source
from xl2jax.inference.cache import empty_cache, write
from xl2jax.inference.layout import PrefillConfig, VideoLayout
from xl2jax.inference.offload import fetch, to_host
from xl2jax.inference.prefill import make_plan
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.inference.selection import RelevanceConfig, choose_context
from xl2jax.inference.store import cache_key, load_cache, save_cache
from xl2jax.inference.video_cache import CacheConfig
from xl2jax.models.param_tree import flatten, unflatten
from xl2jax.ops.kv import QuantizedKV, exact_channels, quantize, unpack
from xl2jax.prompt import suffix

QUESTION = "What is shown?"
INT8 = CacheConfig("int8")
arrays = hnp.arrays(np.float32, (3, 5, 8), elements=st.floats(-1e4, 1e4, width=32))


@settings(deadline=None, max_examples=60)
@given(arrays, st.sampled_from(["float32", "bfloat16"]))
@example(np.full((3, 5, 8), 4e-4, np.float32) * np.arange(1, 9, dtype=np.float32), "float32")  # 63.5 steps is a tie
def test_no_element_is_off_by_more_than_half_a_step(x: np.ndarray, dtype: str) -> None:
    given = jnp.asarray(x, dtype)
    packed = quantize(given)
    assert packed.values.dtype == jnp.int8
    step = np.abs(np.asarray(given, np.float32)).max(-1, keepdims=True) / 127
    off = np.abs(np.asarray(unpack(packed), np.float32) - np.asarray(given, np.float32))
    # An element is up to 127 steps of a rounded scale, so that the rounding error of the scale counts up to 127 times.
    # In bfloat16 the scale may be half a percent too small, so that the largest element is clipped at 127 steps.
    slack = 127 * 2**-22 if dtype == "float32" else 0.5 + 127 * 2**-8
    assert (off <= step * (0.5 + slack) + 1e-30).all()


@settings(deadline=None, max_examples=30)
@given(arrays, st.sampled_from(["float32", "bfloat16"]), st.integers(0, 10**6))
def test_kept_channels_are_exact_and_have_no_influence_on_scales(x: np.ndarray, dtype: str, seed: int) -> None:
    """Each head keeps channels of its own; every part of the slots tells which ones."""
    rng = np.random.default_rng(seed)
    channels = np.sort(rng.permuted(np.tile(np.arange(8), (3, 1)), axis=-1)[:, :3]).astype(np.int32)
    kept = (channels[..., None] == np.arange(8)).any(1)[:, None]
    given = jnp.asarray(x, dtype)
    packed = quantize(given, channels)
    assert (np.asarray(exact_channels(jax.tree.map(lambda a: a[:, 2:4], packed))) == channels).all()
    out = np.asarray(unpack(packed), np.float32)
    np.testing.assert_array_equal(out[np.broadcast_to(kept, x.shape)], given[np.broadcast_to(kept, x.shape)])
    others = np.where(kept, 0, np.asarray(given))
    expected = np.where(kept, given, unpack(quantize(jnp.asarray(others))))
    np.testing.assert_array_equal(out, np.asarray(expected, np.float32))


def test_zeros_stay_zeros() -> None:
    assert (np.asarray(unpack(quantize(jnp.zeros((2, 4))))) == 0).all()


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2), st.integers(0, 6), st.integers(1, 4), st.booleans())
def test_what_is_written_is_read_in_its_layer_and_slots(layer: int, slot: int, tokens: int, keep: bool) -> None:
    config = dataclasses.replace(PRESETS["tiny"].llm, layers=3)
    rng = np.random.default_rng(0)
    every = np.tile(np.arange(config.head_width), (3, config.kv_heads, 1))
    channels = np.sort(rng.permuted(every, axis=-1)[..., :4]).astype(np.int32) if keep else None
    cache = empty_cache(config, 10, "float32", quantized=True, key_channels=channels)
    new = rng.standard_normal((2, tokens, config.kv_heads, config.head_width)).astype(np.float32)
    kv = write((cache.k, cache.v), jnp.int32(layer), jnp.asarray(new[0]), jnp.asarray(new[1]), jnp.int32(slot))
    for number in range(3):
        kept = None if channels is None else channels[number]
        for x, expected, exact in ((kv[0], new[0], kept), (kv[1], new[1], None)):
            x = unpack(x)[number]
            wanted = np.zeros_like(x)
            if number == layer:
                wanted[:, slot : slot + tokens] = unpack(quantize(jnp.asarray(expected.transpose(1, 0, 2)), exact))
            np.testing.assert_allclose(x, wanted, rtol=1e-6)


@pytest.fixture(scope="module")
def small(model: xl2jax.Model, clip: Path) -> Callable[..., xl2jax.WatchedVideo]:
    made: dict[CacheConfig, xl2jax.WatchedVideo] = {}

    def watch(cache: CacheConfig) -> xl2jax.WatchedVideo:
        if cache not in made:
            made[cache] = model.watch(clip, cache=cache)
        return made[cache]

    return watch


@pytest.mark.slow
def test_int8_takes_its_bytes_and_is_near(
    model: xl2jax.Model, watched: xl2jax.WatchedVideo, small: Callable[..., xl2jax.WatchedVideo]
) -> None:
    """Keys of the first layer depend on the inputs only, so they are exactly the quantised keys."""
    video = small(INT8)
    assert isinstance(video.kv.cache.k, QuantizedKV)
    size = sum(x.nbytes for x in jax.tree.leaves((video.kv.cache.k, video.kv.cache.v)))
    assert size == video.kv.plan.slots * memory.slot_bytes(model.config, model.dtype, quantized=True)
    full = unpack(watched.kv.cache.k)
    np.testing.assert_allclose(unpack(video.kv.cache.k)[0], unpack(quantize(full))[0], atol=1e-5)
    for layer in range(model.config.llm.layers):
        for name in ("k", "v"):
            a, b = (np.asarray(unpack(getattr(x.kv.cache, name))[layer]) for x in (video, watched))
            assert np.linalg.norm(a - b) <= 1.5e-2 * np.linalg.norm(b)


POOLED = RelevanceConfig(attention=AttentionScorer(keys="pooled"))
"""Gives the same scores whether the dense KV is offloaded or not."""


def context(model: xl2jax.Model, video: xl2jax.WatchedVideo, relevance: RelevanceConfig, top: int) -> Any:
    bilevel = BilevelConfig(2, 4, top)
    text = suffix(model.tokenizer, QUESTION)
    ids = session.suffix_ids(text.ids, text.first, text.last)
    return choose_context(model.network, video, QUESTION, ids, bilevel, relevance)


def assert_same_context(a: Any, b: Any) -> None:
    """The chunks are the same, and so are the bits of every filled slot."""
    assert a[1] == b[1]
    n = int(a[0].length)
    assert int(b[0].length) == n
    for x, y in zip(jax.tree.leaves(a[0][:2]), jax.tree.leaves(b[0][:2]), strict=True):
        assert np.array_equal(np.asarray(x)[:, :, :n], np.asarray(y)[:, :, :n])


@pytest.mark.parametrize("dtype", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_offloaded_kv_is_mixed_to_the_same_cache(
    model: xl2jax.Model, small: Callable[..., xl2jax.WatchedVideo], dtype: Any
) -> None:
    on_device, offloaded = (small(CacheConfig(dtype, offload)) for offload in (False, True))
    assert offloaded.kv.host is not None
    assert isinstance(jax.tree.leaves(offloaded.kv.host)[0], np.ndarray)
    assert offloaded.kv.cache.slots == offloaded.kv.plan.visual_start  # no visual tokens are left on the device
    for relevance in (POOLED, RelevanceConfig("random"), RelevanceConfig("none")):
        for top in (0, 3):
            assert_same_context(*(context(model, video, relevance, top) for video in (on_device, offloaded)))


def test_the_mixed_kv_has_8_bits_too(model: xl2jax.Model, small: Callable[..., xl2jax.WatchedVideo]) -> None:
    """It is what mixing the unpacked cache gives, rounded."""
    kv, config = small(INT8).kv, BilevelConfig(2, 4, 0)
    v, theta = kv.layout.visual_tokens, model.config.llm.rope_theta
    dense = jnp.arange(kv.plan.group_capacity) < 2
    source = mixed_source(kv.table, dense, kv.cache.visual_start, visual_tokens=v, pool=config.pool, slots=512)
    pooled = session.pooled_kv(model.network, kv, config.pool)
    unpacked = kv.cache._replace(k=unpack(kv.cache.k), v=unpack(kv.cache.v))
    mixed, expected = (mix(cache, pooled, source, theta=theta) for cache in (kv.cache, unpacked))
    assert int(mixed.length) > kv.layout.global_tokens
    for got, whole in ((mixed.k, expected.k), (mixed.v, expected.v)):
        assert isinstance(got, QuantizedKV)
        error = np.abs(np.asarray(unpack(got)) - np.asarray(whole))
        assert (error <= 0.51 * np.asarray(got.scale)[..., None] + 1e-6).all()


def test_offloaded_kv_is_scored_by_what_is_left(
    model: xl2jax.Model, small: Callable[..., xl2jax.WatchedVideo], caplog: pytest.LogCaptureFixture
) -> None:
    """By default that is the pooled KV, which is logged once. Asking for the dense KV is an error."""
    offloaded = small(CacheConfig(None, True))
    selection._announce.cache_clear()
    with caplog.at_level("INFO"):
        automatic = [context(model, offloaded, RelevanceConfig(), 3) for _ in range(2)]
    assert [r.message for r in caplog.records].count(
        "the dense KV was offloaded: chunks are scored by the pooled KV"
    ) == 1
    assert_same_context(automatic[0], context(model, offloaded, POOLED, 3))
    caplog.clear()
    with caplog.at_level("INFO"):
        on_device = small(CacheConfig(None, False))
        for _ in range(2):
            context(model, on_device, RelevanceConfig(), 3)
    assert [r.message for r in caplog.records].count("chunks are scored by the dense KV (auto)") == 1
    with pytest.raises(UserError, match="score chunks by the pooled KV"):
        context(model, offloaded, RelevanceConfig(attention=AttentionScorer(keys="dense")), 3)


def test_fetching_takes_the_chosen_groups_alone(model: xl2jax.Model, watched: xl2jax.WatchedVideo) -> None:
    cache, host = to_host(watched.kv.cache, watched.kv.plan.visual_start)
    dense = np.zeros(watched.kv.plan.group_capacity, bool)
    dense[[1, 5, 6]] = True
    v = watched.kv.layout.visual_tokens
    got = unpack(fetch(cache, host, dense, visual_tokens=v).k)
    start = watched.kv.plan.visual_start
    whole = np.asarray(unpack(watched.kv.cache.k))
    assert np.array_equal(got[:, :, :start], whole[:, :, :start])
    for place, group in enumerate((1, 5, 6)):
        expected = whole[:, :, start + group * v : start + (group + 1) * v]
        assert np.array_equal(got[:, :, start + place * v : start + (place + 1) * v], expected)


def test_dense_reading_of_offloaded_kv_is_refused(
    model: xl2jax.Model,
    small: Callable[..., xl2jax.WatchedVideo],
    clip: Path,
    refused: Callable[..., str],
    checkpoint: Path,
) -> None:
    with pytest.raises(UserError, match="offloaded"):
        model.ask(small(CacheConfig(None, True)), QUESTION, bilevel=None)
    with pytest.raises(UserError, match="bi-level"):
        model.watch(clip, bilevel=None, cache=CacheConfig(None, True))
    flags = ("--video", clip, "--checkpoint", checkpoint, "--question", QUESTION)
    assert "--offload" in refused(infer.main, *flags, "--top-chunks", "all", "--offload")
    with pytest.raises(UserError, match="choose int8"):
        model.watch(clip, cache=CacheConfig("bfloat16"))


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_cache_file_keeps_its_bits_and_is_read_to_either_memory(
    model: xl2jax.Model, small: Callable[..., xl2jax.WatchedVideo], clip: Path, tmp_path: Path, dtype: Any
) -> None:
    """A file is saved from the device or the host, and read to the device or the host."""

    def key(cache: CacheConfig) -> dict[str, Any]:
        return cache_key(model, clip, xl2jax.FrameSampling(), 1.0, xl2jax.PrefillConfig(), cache)

    expected = context(model, small(CacheConfig(dtype)), POOLED, 3)
    for source in (False, True):
        path = tmp_path / f"saved{source}"
        cache = CacheConfig(dtype, source)
        save_cache(path, small(cache), key(cache))
        for target in (False, True):
            cache = CacheConfig(dtype, target)
            again = load_cache(path, model, key(cache), clip, BilevelConfig(), cache)
            assert (again.kv.host is not None) == target
            assert_same_context(expected, context(model, again, POOLED, 3))
    assert (tmp_path / "savedFalse").read_bytes() == (tmp_path / "savedTrue").read_bytes()
    other = CacheConfig("int8" if dtype is None else None)
    with pytest.raises(UserError, match=r"made from dtype (int8, not float32|float32, not int8)"):
        load_cache(path, model, key(other), clip, BilevelConfig(), other)


@pytest.mark.slow
def test_infer_offloads(command: Callable[..., tuple[int, str, str]], clip: Path, checkpoint: Path) -> None:
    flags = ("--video", clip, "--checkpoint", checkpoint, "--question", QUESTION, "--max-new-tokens", 2, "--json")
    status, out, err = command(infer.main, *flags, "--cache-dtype", "int8", "--offload")
    assert status == 0, err
    assert json.loads(out)["cache"]["host_bytes"] > 0


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 3000), st.sampled_from([1, 4, 16]), st.booleans(), st.booleans())
def test_options_never_need_more_on_a_gpu(groups: int, pool: int, quantized: bool, offload: bool) -> None:
    """Except with short videos, of which so much stays dense that fetching it costs more than offloading saves."""
    config = PRESETS["video-xl-2"]
    layout = VideoLayout(14, (8,) * groups, config.visual_tokens)
    plan = make_plan(layout, PrefillConfig(), "gpu")

    def need(quantized: bool, offload: bool) -> memory.MemoryNeed:
        bilevel = BilevelConfig(4, pool, min(2, ceil_div(groups, 4)))
        return memory.memory_need(
            config, plan, layout, bilevel, "bfloat16", "gpu", quantized=quantized, offload=offload
        )

    with_it, without = need(quantized, offload), need(False, False)
    assert with_it.cache <= without.cache
    assert with_it.total <= without.total or groups < 200
    if quantized:
        assert with_it.cache == pytest.approx(without.cache * (128 + 2) / 256)
    if offload:
        assert with_it.kept == with_it.cache * plan.visual_start // plan.slots


def test_advice_names_what_would_fit(
    refused: Callable[..., str],
    command: Callable[..., Any],
    clip: Path,
    checkpoint: Path,
    model: xl2jax.Model,
    watched: xl2jax.WatchedVideo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need = memory.memory_need(
        model.config, watched.kv.plan, watched.kv.layout, BilevelConfig(), "float32", "cpu", quantized=True
    )
    monkeypatch.setattr(memory, "available_bytes", lambda *_: need.total)
    flags = ("--video", clip, "--checkpoint", checkpoint, "--max-new-tokens", 2, "--question", QUESTION)
    line = refused(infer.main, *flags)
    assert line.endswith("all fit with --cache-dtype int8")
    assert command(infer.main, *flags, "--cache-dtype", "int8")[0] == 0


@pytest.fixture(scope="module")
def biased(model: xl2jax.Model) -> xl2jax.Model:
    """The model with a key bias of norm 230 in a head of the first and one of the last layer, most of it in 2 channels."""
    params = flatten(model.params)
    bias = np.asarray(params["llm.layers.k.bias"]).copy()
    for layer, first in ((0, 0), (-1, 16)):  # heads have 16 channels
        bias[layer, first + 3], bias[layer, first + 6] = 160, -165
    params["llm.layers.k.bias"] = jnp.asarray(bias)
    return xl2jax.Model(model.config, unflatten(params, model.config), model.tokenizer)


@pytest.mark.slow
def test_channels_with_large_key_biases_are_kept(biased: xl2jax.Model, clip: Path) -> None:
    """Keys with biases of the sizes that are reported of Qwen2.5 lose no more in 8 bits than other keys, wherever they
    are: in the dense KV, in the mixed one, and in host memory."""
    channels = biased.network.exact_key_channels()
    assert channels is not None
    assert {3, 6, 11, 14} <= {*channels[0, 0]}  # with those that are rotated with them
    plain, video, offloaded = (biased.watch(clip, cache=c) for c in (CacheConfig(), INT8, CacheConfig("int8", True)))
    size = sum(x.nbytes for x in jax.tree.leaves((video.kv.cache.k, video.kv.cache.v)))
    per_slot = memory.slot_bytes(biased.config, "float32", quantized=True, key_channels=channels.shape[-1])
    assert size == video.kv.plan.slots * per_slot

    def keys(x: xl2jax.WatchedVideo) -> Any:
        return x.kv.cache.k

    def assert_near(got: QuantizedKV, expected: Any, steps: float) -> None:
        """Kept channels are equal, and others off by as many steps of the largest of them."""
        kept = np.asarray(got.values) == -128
        off = np.abs(np.asarray(unpack(got)) - np.asarray(expected))
        assert (off[kept] <= 1e-5 * np.abs(np.asarray(expected)).max()).all()
        largest = np.abs(np.where(kept, 0, expected)).max(-1, keepdims=True)
        assert largest.max() < 40  # beside biases of 160
        assert (np.where(kept, 0, off) <= steps * largest / 127 + 1e-5).all()

    first = jax.tree.map(lambda a: a[0], keys(video))
    assert_near(first, keys(plain)[0], 0.51)  # keys of the first layer depend on the inputs only
    mixed = [context(biased, x, RelevanceConfig("none"), 1) for x in (plain, video, offloaded)]
    # They were rounded before, and both numbers of a pair are rotated into one.
    assert_near(jax.tree.map(lambda a: a[0], mixed[1][0].k), mixed[0][0].k[0], 0.51 + 0.51 * 2**0.5)
    assert_same_context(mixed[1], mixed[2])
    for x in (plain, video, offloaded):
        x.close()


@pytest.mark.slow
def test_answers_that_are_decoded_together_keep_channels_too(biased: xl2jax.Model, clip: Path) -> None:
    with biased.watch(clip, cache=INT8) as video:
        questions = [QUESTION, "What colour was the star?"]
        alone = [biased.ask(video, q, max_new_tokens=6).text for q in questions]
        together = [a.text for a in biased.ask_many([(video, q) for q in questions], max_new_tokens=6)]
    assert together == alone


def test_the_log_says_once_that_channels_are_kept(
    model: xl2jax.Model, biased: xl2jax.Model, caplog: pytest.LogCaptureFixture
) -> None:
    def lines(model: xl2jax.Model) -> list[str]:
        other = xl2jax.Model(model.config, model.params, model.tokenizer)
        caplog.clear()
        with caplog.at_level("INFO", "xl2jax"):
            for cache in (CacheConfig(), INT8, INT8):
                other.check_cache(cache, BilevelConfig())
        return [r.message for r in caplog.records if "large biases" in r.message]

    assert lines(model) == []
    (line,) = lines(biased)
    assert "keeps 8 channels of each key in float32" in line
    assert "in 2 of 3 layers" in line
