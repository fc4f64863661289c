"""The layout of a video: the position and the arena slot of every token, and what each query sees.

A video of G groups is, in natural order, `prefix, (time tokens, V visual tokens) per group, tail, suffix`;
positions count that order. The arena that keys and values live in puts the globals (prefix, then time
tokens) first and the visual tokens behind them, at slot `visual_start`. Then each query sees
`[0, g_end) U [v_lo, v_hi)`:

    query                    g_end                     v_lo                                 v_hi
    prefix token             own slot + 1              empty
    visual token, chunk c    globals before it         first visual of chunk max(c - w, 0)  own slot + 1
    time token               own slot + 1              first visual                         visuals before it

Text and pictures before a video are part of the prefix. Those behind it are its tail: globals behind the time tokens of
all groups, which see everything before them. A prompt without a video is all prefix.

Here c counts chunks of `chunk_groups` groups, and w is `window_chunks`. Dense causal attention (None) has v_lo = first
visual for every query. The suffix and the answer see the whole video and have a cache of their own.

A small example has 2 groups of 1 time token (t) and 2 visual tokens (v), chunks of 1 group, window 0 and a prefix p:

    natural order       arena order
    p  t0 v0 v0 t1 v1 v1    slot    p t0 t1 | v0 v0 v1 v1
    position 0 1 2 3 4 5 6
    v1 (5)                          1  1  1    .  .  1  .       g_end 3, [v_lo, v_hi) = [5, 6)
    t1 (4)                          1  1  1    1  1  .  .       g_end 3, [3, 5)
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from xl2jax.arithmetic import ceil_div, round_up
from xl2jax.errors import require_whole
from xl2jax.ops.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """A visual token sees its own chunk up to itself and `window_chunks` chunks before it; None is dense attention."""

    chunk_groups: int = 4
    window_chunks: int | None = 3

    def __post_init__(self) -> None:
        require_whole("chunk groups", self.chunk_groups, 1)
        if self.window_chunks is not None:
            require_whole("window chunks", self.window_chunks, 0)


class Tokens(NamedTuple):
    """Positions, slots and ranges of tokens, int32 [T]."""

    position: Any
    """In natural order."""
    slot: Any
    """In the arena."""
    ranges: Ranges


def token_ranges(
    prefix: Any,
    time_lengths: Any,
    visual_tokens: int,
    visual_start: Any,
    config: PrefillConfig,
    group: Any,
    offset: Any,
    is_time: Any,
    xp: Any = np,
) -> Tokens:
    """Positions, slots and ranges of tokens given by (group, offset in group, is_time).

    `time_lengths` [G] are the time tokens of each group; `offset` counts from the group's first time
    token or first visual token. `xp` is numpy, or jax.numpy inside a jitted function.
    """
    v = visual_tokens
    ends = xp.cumsum(time_lengths)
    before = (ends - time_lengths)[group]  # time tokens of earlier groups
    times = time_lengths[group]
    global_slot = prefix + before + offset
    visual_slot = visual_start + group * v + offset
    if config.window_chunks is None:
        first_group = xp.zeros_like(group)
    else:
        chunk = group // config.chunk_groups
        first_group = xp.maximum(chunk - config.window_chunks, 0) * config.chunk_groups
    position = prefix + before + group * v + xp.where(is_time, offset, times + offset)
    ranges = Ranges(
        g_end=xp.where(is_time, global_slot + 1, prefix + before + times),
        v_lo=xp.where(is_time, visual_start, visual_start + first_group * v),
        v_hi=xp.where(is_time, visual_start + group * v, visual_slot + 1),
    )
    slot = xp.where(is_time, global_slot, visual_slot)
    return Tokens(position.astype(xp.int32), slot.astype(xp.int32), Ranges(*(x.astype(xp.int32) for x in ranges)))


@dataclasses.dataclass(frozen=True)
class VideoLayout:
    """Numbers of tokens of one video. Group g has `time_lengths[g]` time tokens, then V visual tokens.

    `tail`: tokens of text and pictures behind the video. Without a video there are no groups and no tail.
    """

    prefix: int
    time_lengths: tuple[int, ...]
    visual_tokens: int
    tail: int = 0

    @property
    def groups(self) -> int:
        return len(self.time_lengths)

    @property
    def global_tokens(self) -> int:
        return self.prefix + sum(self.time_lengths) + self.tail

    @property
    def tokens(self) -> int:
        """Tokens of prefix, video and tail, and the position of the first suffix token."""
        return self.global_tokens + self.groups * self.visual_tokens


def natural_ranges(layout: VideoLayout, suffix: int, visual_start: int, config: PrefillConfig) -> Tokens:
    """Positions, slots and ranges of all tokens in natural order, prefix and suffix included.

    The suffix is placed behind the other globals, as if it were kept in the same arena. Tests, `verify` and counts of
    operations use this.
    """
    times = np.asarray(layout.time_lengths, np.int64)
    v = layout.visual_tokens
    group = np.repeat(np.arange(layout.groups), times + v)
    first = np.repeat(np.cumsum(times + v) - (times + v), times + v)
    index = np.arange(len(group)) - first
    is_time = index < times[group]
    video = token_ranges(
        layout.prefix,
        times,
        v,
        visual_start,
        config,
        group,
        np.where(is_time, index, index - times[group]),
        is_time,
    )
    head, tail = np.arange(layout.prefix), np.arange(layout.tail + suffix)
    behind = layout.global_tokens - layout.tail + tail
    end = visual_start + layout.groups * v

    def around(before: np.ndarray, middle: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.concatenate([before, middle, after]).astype(np.int32)

    g_end, v_lo, v_hi = video.ranges
    return Tokens(
        position=around(head, video.position, layout.tokens - layout.tail + tail),
        slot=around(head, video.slot, behind),
        ranges=Ranges(
            g_end=around(head + 1, g_end, behind + 1),
            v_lo=around(head * 0, v_lo, tail * 0 + visual_start),
            v_hi=around(head * 0, v_hi, tail * 0 + end),
        ),
    )


def dense_mask(layout: VideoLayout, suffix: int, config: PrefillConfig) -> np.ndarray:
    """Upstream's rule, token by token, as boolean [N, N] in natural order: the oracle of the tests."""
    chunk, is_global = [-1] * layout.prefix, [True] * layout.prefix
    for g, times in enumerate(layout.time_lengths):
        chunk += [g // config.chunk_groups] * (times + layout.visual_tokens)
        is_global += [True] * times + [False] * layout.visual_tokens
    behind = layout.tail + suffix
    c, glob = np.array(chunk + [-1] * behind), np.array(is_global + [True] * behind)
    causal = np.tri(len(c), dtype=bool)
    if config.window_chunks is None:
        return causal
    distance = c[:, None] - c[None, :]
    near = (distance >= 0) & (distance <= config.window_chunks)
    return causal & (glob[None, :] | glob[:, None] | near)


def bucket(n: int, unit: int = 1) -> int:
    """`n` rounded up to a multiple of `unit` with three significant bits, which adds at most a quarter."""
    units = max(ceil_div(n, unit), 1)
    step = 1 << max(units.bit_length() - 3, 0)
    return round_up(units, step) * unit
