"""Predicted memory and time against the compiler's analysis and against measurements."""

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
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from xl2jax.commands import plan
from xl2jax.commands.flags import BilevelFlags, TensorFlags
from xl2jax.commands.plan import DEVICES, PlanArgs, alternatives, largest, layout_of, predict
from xl2jax.config import PRESETS, Weights
from xl2jax.inference import compiled, memory, prefill, session
from xl2jax.inference.generate import SuffixIds
from xl2jax.inference.layout import PrefillConfig
from xl2jax.inference.network import Network
from xl2jax.inference.relevance import AttentionScorer
from xl2jax.models.video_xl2 import abstract_model
from xl2jax.ops.attention import BLOCKWISE

RELEASED = PRESETS["video-xl-2"]


@pytest.mark.parametrize(
    ("frames", "prefill_s", "vision_s", "step_s"),
    [(512, 0.48, 0.76, 6.0e-3), (2048, 2.12, 3.03, 6.4e-3), (4096, 5.54, 6.07, 6.8e-3), (10000, 14.2, 14.8, 7.5e-3)],
)
def test_times_are_near_those_measured(frames: int, prefill_s: float, vision_s: float, step_s: float) -> None:
    """The measurements are those of one H200 in docs/performance.md. Fixed costs show at 512 frames."""
    prediction = predict(RELEASED, layout_of(RELEASED, None, frames, 1.0), PlanArgs(device="h200"))
    assert prediction.seconds is not None
    vision, llm, step = prediction.seconds.values()
    assert vision == pytest.approx(vision_s, rel=0.1)
    assert llm == pytest.approx(prefill_s, rel=0.3)
    assert step == pytest.approx(step_s, rel=0.2)


def test_memory_is_near_that_measured() -> None:
    """10,000 frames took 57.5 GiB on an H200."""
    prediction = predict(RELEASED, layout_of(RELEASED, None, 10000, 1.0), PlanArgs(device="h200"))
    assert prediction.total == pytest.approx(57.5 * 2**30, rel=0.15)


@pytest.mark.parametrize(
    ("name", "quantized", "weights"),
    [
        pytest.param("tiny", False, None, marks=pytest.mark.slow),
        pytest.param("small", False, None, marks=pytest.mark.slow),
        ("tiny", True, None),
        pytest.param("small", False, "int8", marks=pytest.mark.slow),
        pytest.param("tiny", True, "int4", marks=pytest.mark.slow),
    ],
)
def test_the_compiler_needs_no_more_than_predicted(name: str, quantized: bool, weights: Weights | None) -> None:
    """The bytes of the cache are exact, and temporaries of encoder, prefill and scores fit into the workspace."""
    config = PRESETS[name].with_weights(weights)
    layout = layout_of(config, None, 256, 1.0)
    step = prefill.make_plan(layout, PrefillConfig(), "cpu")
    frames_at_once = 4 * prefill.default_steps("cpu")[0]
    need = memory.memory_need(config, step, layout, None, "float32", "cpu", quantized=quantized)
    params = nnx.state(abstract_model(config, jnp.float32))
    network = Network(config, params, BLOCKWISE, "cpu")
    cache = jax.eval_shape(
        lambda: compiled.new_cache(config.llm, step.slots, "float32", step.visual_start, quantized=quantized)
    )
    assert need.cache == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
    size = config.vision.image_size
    frames = jax.ShapeDtypeStruct((step.segment_groups * 4, size, size, 3), np.uint8)
    encode = compiled.encode.lower(network, frames, frames_at_once=frames_at_once).compile()
    visual = jax.ShapeDtypeStruct((step.segment_groups, config.visual_tokens, config.llm.width), jnp.float32)
    segment = next(prefill.segments(prefill.steps(layout, step, [[0] * t for t in layout.time_lengths]), step))
    extend = compiled.prefill_segment.lower(network, cache, visual, segment).compile()
    slots, ids = jax.ShapeDtypeStruct((step.slots,), jnp.int32), jax.ShapeDtypeStruct((32,), jnp.int32)
    text = jax.eval_shape(lambda: compiled.new_cache(config.llm, 128, "float32"))
    suffix = SuffixIds(ids, np.int32(1), np.int32(25), np.int32(30))
    score = compiled.attention_scores.lower(
        network, cache, slots, text, suffix, scorer=AttentionScorer(), groups=layout.groups
    ).compile()
    temporaries = max(c.memory_analysis().temp_size_in_bytes for c in (encode, extend, score))
    assert temporaries <= need.workspace


@pytest.mark.slow
def test_the_compiler_needs_no_more_than_predicted_for_a_picture() -> None:
    """A picture of 6 x 6 tiles: its tower, and the blocks in which its tokens go through the LLM."""
    config = PRESETS["small"]
    layout = layout_of(config, None, 0, 1.0, 36)
    assert layout.tokens == 14 + 36 * 144
    step = prefill.make_plan(layout, PrefillConfig(), "cpu")
    need = memory.memory_need(config, step, layout, None, "float32", "cpu", tiles=36)
    network = Network(config, nnx.state(abstract_model(config, jnp.float32)), BLOCKWISE, "cpu")
    cache = jax.eval_shape(lambda: compiled.new_cache(config.llm, step.slots, "float32", step.visual_start))
    assert need.cache == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
    tokens = jax.eval_shape(lambda: session.TileTokens(network, 36).tokens)
    size = config.vision.image_size
    tiles = jax.ShapeDtypeStruct((session.tiles_at_once("cpu"), size, size, 3), np.uint8)
    encode = compiled.encode_tiles.lower(network, tokens, tiles, np.int32(0), pool=2).compile()
    column = jax.ShapeDtypeStruct((prefill.global_tokens_at_once("cpu"),), np.int32)
    block = prefill.Stretch(column, column)
    extend = compiled.prefill_globals.lower(network, cache, block, tokens, np.int32(9)).compile()
    temporaries = max(c.memory_analysis().temp_size_in_bytes for c in (encode, extend))
    assert temporaries + tokens.size * tokens.dtype.itemsize <= need.workspace


@pytest.mark.parametrize(("weights", "dtype"), [("int8", "float32"), ("int4", "bfloat16")])
def test_unpacked_matrices_are_counted(weights: Weights, dtype: str) -> None:
    """At sizes where they are most of the workspace: a wide MLP and few tokens at a time."""
    config = PRESETS["tiny"]
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, mlp_width=65536)).with_weights(weights)
    layout = layout_of(config, None, 16, 1.0)
    plan_ = prefill.make_plan(layout, PrefillConfig(), "cpu")
    need = memory.memory_need(config, plan_, layout, None, dtype, "cpu")
    plain = memory.memory_need(config.with_weights(None), plan_, layout, None, dtype, "cpu")
    assert need.workspace - plain.workspace == jnp.dtype(dtype).itemsize * 64 * (3 * 65536 + 2 * (64 + 32))
    network = Network(config, nnx.state(abstract_model(config, jnp.dtype(dtype))), BLOCKWISE, "cpu")
    cache = jax.eval_shape(lambda: compiled.new_cache(config.llm, plan_.slots, dtype, plan_.visual_start))
    visual = jax.ShapeDtypeStruct((plan_.segment_groups, config.visual_tokens, config.llm.width), dtype)
    segment = next(prefill.segments(prefill.steps(layout, plan_, [[0] * t for t in layout.time_lengths]), plan_))
    used = compiled.prefill_segment.lower(network, cache, visual, segment).compile().memory_analysis()
    assert used.temp_size_in_bytes <= need.workspace - memory._WORKSPACE


@pytest.mark.parametrize(
    ("device", "weights", "cache_dtype", "offload", "frames"),
    [("rtx4090", "int8", None, False, 2500), ("rtx4090", "int8", "int8", True, 7000), ("rtx3060-12g", "int4", None, False, 512)],
)  # fmt: skip
def test_quantised_weights_fit_smaller_cards(
    device: Any, weights: Weights, cache_dtype: Any, offload: bool, frames: int
) -> None:
    """Of a card, XLA gets 95 % of what CUDA leaves."""
    args = PlanArgs(device=device, weights=weights, cache_dtype=cache_dtype, offload=offload)
    layout = layout_of(RELEASED, None, 20000, 1.0)
    assert DEVICES[device].available < 0.94 * (DEVICES[device].memory_mib << 20)
    assert largest(RELEASED, layout, args) >= frames
    assert largest(RELEASED, layout, dataclasses.replace(args, weights=None)) < frames


def test_four_bits_are_the_last_resort() -> None:
    config = RELEASED

    def offered(device: Any, frames: int) -> list[str]:
        return alternatives(config, layout_of(config, None, frames, 1.0), PlanArgs(device=device, frames=frames))

    assert offered("rtx3060-12g", 512) == ["--weights int4"]
    assert offered("rtx3060-12g", 1024) == ["--weights int4 --cache-dtype int8", "--weights int4 --offload"]
    assert offered("rtx4090", 2048)[0] == "--weights int8"
    assert not any("int4" in flags for flags in offered("rtx4090", 2048))
    assert offered("rtx4090", 8192) == ["--weights int8 --cache-dtype int8 --offload"]
    assert offered("rtx4060", 64) == []


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(list(DEVICES)), st.sampled_from([512, 4096, 20000]), st.sampled_from([1, 4, 16]))
def test_what_is_said_to_fit_fits_and_no_more_does(device: Any, frames: int, pool: int) -> None:
    args = PlanArgs(device=device, decode=BilevelFlags(pool=pool))
    layout = layout_of(RELEASED, None, frames, 1.0)
    limit = largest(RELEASED, layout, args)

    def fits(n: int) -> bool:
        return predict(RELEASED, dataclasses.replace(layout, time_lengths=layout.time_lengths[: n // 4]), args).fits

    assert 0 <= limit <= frames
    assert limit == 0 or fits(limit)
    assert limit == frames or not fits(limit + 4)


def test_the_page_about_several_cards_says_what_plan_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    head, _, *rows = page[page.index("| `--tensor` | default |") :].split("\n\n")[0].splitlines()
    layout = layout_of(RELEASED, None, 120_000, 1.0)
    changes: dict[str, dict[str, Any]] = {
        "default": {},
        "`--pool 16`": {"decode": BilevelFlags(pool=16)},
        "`--weights int8`": {"weights": "int8"},
        "`--offload`": {"offload": True},
        "`--cache-dtype int8`": {"cache_dtype": "int8"},
    }
    for row in rows:
        tensor, *cells = row.strip("| ").split(" | ")
        args = PlanArgs(device="rtx4090", split=TensorFlags(int(tensor)))
        for column, cell in zip(head.strip("| ").split(" | ")[1:], cells, strict=True):
            limit = largest(RELEASED, layout, dataclasses.replace(args, **changes[column]))
            assert cell == f"{limit:,}", (tensor, column)


def test_command(checkpoint: Path, command: Callable[..., tuple[int, str, str]], refused: Callable[..., str]) -> None:
    status, out, err = command(plan.main, "--frames", 10000, "--device", "h200", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["fits"]
    assert report["frames_that_fit"] == 10000
    status, out, _ = command(plan.main, "--frames", 10000, "--device", "rtx4090")
    assert status == 1
    assert "it does not fit: 1024 frames would" in out
    status, out, _ = command(plan.main, "--frames", 64, "--checkpoint", checkpoint, "--dtype", "float32")
    assert status == 0
    assert "it fits" in out
    assert "multiple of 4" in refused(plan.main, "--frames", 30)
    assert "--offload has no use" in refused(plan.main, "--offload", "--top-chunks", "all")
    assert "no such checkpoint" in refused(plan.main, "--checkpoint", "/none")
    assert "pool must be a whole number from 1" in refused(plan.main, "--pool", 0)


def test_pictures_are_planned(command: Callable[..., tuple[int, str, str]], refused: Callable[..., str]) -> None:
    """A picture of 6 x 6 tiles alone, and others beside a video."""
    status, out, err = command(plan.main, "--image", "2304x2304", "--device", "rtx4090", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["tokens"] == 14 + 36 * 144
    assert "pooled KV" not in report["memory"]
    assert report["memory"]["KV cache"] >= report["tokens"] * 57_344
    status, beside, _ = command(plan.main, "--image", "2304x2304", "--frames", 64, "--device", "rtx4090", "--json")
    video = json.loads(command(plan.main, "--frames", 64, "--device", "rtx4090", "--json")[1])
    assert json.loads(beside)["tokens"] == video["tokens"] + 36 * 144
    # Two devices share frames, but each encodes all tiles.
    split = json.loads(command(plan.main, "--image", "2304x2304", "--device", "rtx4090", "--json", "--tensor", 2)[1])
    vision, prefill = "vision, DTS, projector", "prefill"
    assert split["seconds"][vision] == report["seconds"][vision]
    assert split["seconds"][prefill] == pytest.approx(report["seconds"][prefill] / 2)
    status, out, _ = command(plan.main, "--image", "2304x2304", "--device", "rtx3060-12g")
    assert status == 1
    assert "it does not fit" in out
    assert "all fits with --weights int4" in out
    assert "--pool" not in out
    for size in ("12", "0x5", "99999x99999"):
        assert "WIDTHxHEIGHT" in refused(plan.main, "--image", size)


def test_options_that_would_fit_do(command: Callable[..., tuple[int, str, str]]) -> None:
    """6,000 frames are a little too many for an A100 with 40 GB, of which the weights take 16."""
    flags = ("--device", "a100-40g", "--json")
    status, out, _ = command(plan.main, "--frames", 6000, *flags)
    assert status == 1
    offered = json.loads(out)["would_fit_with"]
    assert "--cache-dtype int8" in offered
    for option in offered:
        assert command(plan.main, "--frames", 6000, *flags, *option.split())[0] == 0
    assert offered[0] == "--weights int8"
    assert not any("--weights int8" in o for o in offered[1:])
    for option in {"--pool 16", "--cache-dtype int8", "--offload"} - set(offered):
        assert command(plan.main, "--frames", 6000, *flags, *option.split())[0] == 1
