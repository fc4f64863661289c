"""The ranges of a layout against upstream's mask rule, written out token by token."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from xl2jax.inference.layout import PrefillConfig, VideoLayout, bucket, dense_mask, natural_ranges, token_ranges
from xl2jax.inference.prefill import Stretch, blocks, make_plan, segments, steps

layouts = st.builds(
    VideoLayout,
    prefix=st.integers(1, 5),
    time_lengths=st.lists(st.integers(1, 5), min_size=1, max_size=9).map(tuple),
    visual_tokens=st.integers(1, 4),
    tail=st.integers(0, 3),
)
configs = st.builds(
    PrefillConfig,
    chunk_groups=st.integers(1, 5),
    window_chunks=st.one_of(st.none(), st.integers(0, 3), st.just(100)),
)


@settings(deadline=None)
@given(layouts, configs, st.integers(0, 4), st.integers(0, 3))
def test_ranges_are_upstreams_mask(layout: VideoLayout, config: PrefillConfig, suffix: int, gap: int) -> None:
    start = layout.global_tokens + suffix + gap
    tokens = natural_ranges(layout, suffix, start, config)
    n = layout.tokens + suffix
    assert tokens.position.tolist() == list(range(n))
    assert len(set(tokens.slot.tolist())) == n
    seen = tokens.ranges.mask(np.arange(start + layout.groups * layout.visual_tokens))
    mask = dense_mask(layout, suffix, config)
    assert np.array_equal(seen[:, tokens.slot], mask)
    assert seen.sum() == mask.sum()  # no query sees an empty slot


@settings(deadline=None, max_examples=25)
@given(layouts, configs)
def test_jnp_gives_the_same(layout: VideoLayout, config: PrefillConfig) -> None:
    group = np.repeat(np.arange(layout.groups), layout.visual_tokens)
    offset = np.tile(np.arange(layout.visual_tokens), layout.groups)
    for is_time in (False, True):
        args = (config, group, offset, np.full(len(group), is_time))
        times = np.array(layout.time_lengths)
        a = token_ranges(layout.prefix, times, layout.visual_tokens, 99, *args)
        b = token_ranges(
            layout.prefix,
            jnp.asarray(times),
            layout.visual_tokens,
            99,
            config,
            jnp.asarray(group),
            jnp.asarray(offset),
            jnp.asarray(args[3]),
            xp=jnp,
        )
        chex.assert_trees_all_equal(a, jax.device_get(b), strict=True)


@settings(deadline=None)
@given(layouts, configs, st.integers(1, 5), st.integers(1, 3))
def test_steps_hold_every_token_once(
    layout: VideoLayout, config: PrefillConfig, step_groups: int, segment_steps: int
) -> None:
    plan = make_plan(layout, config, "cpu", step_groups=step_groups, segment_steps=segment_steps)
    ids = [[100 * g + i for i in range(n)] for g, n in enumerate(layout.time_lengths)]
    expected = natural_ranges(layout, 0, plan.visual_start, config)
    visuals = plan.step_groups * plan.visual_tokens
    positions: list[int] = []
    global_length, visual_length = layout.prefix, 0
    for segment in segments(steps(layout, plan, ids), plan):
        assert segment.time_ids.shape == (plan.segment_steps, plan.step_groups * plan.time_cap)
        for i in range(plan.segment_steps):
            assert segment.global_slot[i] == global_length
            assert segment.visual_slot[i] == plan.visual_start + visual_length or not segment.visuals[i]
            assert segment.global_slot[i] + segment.time_ids.shape[1] <= plan.visual_start
            assert segment.visual_slot[i] + visuals <= plan.slots
            times, real = int(segment.times[i]), int(segment.visuals[i])
            global_length, visual_length = global_length + times, visual_length + real
            used = [*range(real), *range(visuals, visuals + times)]
            positions += segment.position[i, used].tolist()
            for column, wanted in zip(segment.ranges, expected.ranges, strict=True):
                column = column[i]
                assert np.array_equal(column[used], wanted[segment.position[i, used]])
                assert not np.delete(column, used).any()  # padding sees nothing
    assert sorted(positions) == list(range(layout.prefix, layout.tokens - layout.tail))
    assert visual_length == layout.groups * layout.visual_tokens
    assert global_length + layout.tail == layout.global_tokens <= plan.visual_start


@settings(deadline=None)
@given(st.integers(0, 20_000), st.integers(0, 9_000), st.integers(0, 3))
def test_there_is_room_for_the_blocks_of_prefix_and_tail(prefix: int, tail: int, groups: int) -> None:
    """Blocks are padded, and write that many slots."""
    layout = VideoLayout(prefix, (3,) * groups, 4, tail if groups else 0)
    for platform in ("cpu", "gpu"):
        plan = make_plan(layout, PrefillConfig(), platform)
        at = 0
        for length, before in ((prefix, 0), (layout.tail, layout.global_tokens - layout.tail)):
            at = before
            for block, real in blocks(Stretch.of_text([7] * length), platform):
                assert at + len(block.ids) <= plan.visual_start
                assert (block.ids[:real] == 7).all()
                at += real
            assert at == before + length
        assert plan.group_capacity >= groups


@settings(deadline=None)
@given(st.integers(1, 10**6), st.sampled_from([1, 4, 32, 128]))
def test_bucket(n: int, unit: int) -> None:
    b = bucket(n, unit)
    assert b >= n
    assert b % unit == 0
    assert b <= max(1.25 * n + unit, unit)
    assert bucket(b, unit) == b
