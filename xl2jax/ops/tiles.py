"""How the GPU kernels divide arena attention: tiles of rows, runs of key blocks, and splits.

The query heads of a KV head are folded into rows, so that a tile spans few tokens and even a single decoded token reads
every key once. The rows of a tile see at most two runs of key blocks. Six integers a tile say where the runs start and
end, and which of their blocks need no mask:

    blocks      0 ... a_full ... a        b ... b_full ... c_full ... c
    needed      [0, a)                    [b, c)
    unmasked    [0, a_full)               [b_full, c_full)

Unmasked blocks are visited first. Where there are few tiles, each tile's blocks are split over several programs, whose
results are merged by their log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from xl2jax.arithmetic import ceil_div, round_up
from xl2jax.errors import UserError
from xl2jax.ops.kv import KVArray, Source, channel_mask, exact_channels
from xl2jax.ops.ranges import NEGATIVE, Ranges

HEAD_WIDTHS = (64, 128)


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Sizes that a kernel is compiled for."""

    tile: int = 128
    """Rows of a program."""
    block: int = 128
    """Slots of a key block."""
    stages: int = 2
    """Key blocks in shared memory."""
    splits: tuple[int, ...] = (1,)
    """Programs that share the blocks that a tile visits in each source."""


def unsupported(
    head_width: int, queries: jax.typing.DTypeLike, keys: jax.typing.DTypeLike, slots: int = 64
) -> str | None:
    """Why the GPU kernels do not support such arrays, or None."""
    if head_width not in HEAD_WIDTHS:
        return f"head width {head_width} is not supported (only {' and '.join(map(str, HEAD_WIDTHS))})"
    if queries not in (jnp.bfloat16, jnp.float16) or keys != queries:
        return f"{jnp.dtype(queries)} queries and {jnp.dtype(keys)} keys are not supported (only 16 bit)"
    if slots % 64:
        return f"{slots} cache slots are not a multiple of 64"
    return None


def split_counts(programs: int, slots: tuple[int, ...], block: int, wanted: int) -> tuple[int, ...]:
    """How many programs share a tile's blocks in each source, where there are `programs` tiles.

    About `wanted` programs run, and each has four blocks of work or more.
    """
    each = max(wanted // programs, len(slots))
    return tuple(min(max(each * n // sum(slots), 1), max(n // (4 * block), 1)) for n in slots)


def tile_blocks(ranges: Ranges, block: int, tile: int) -> jax.Array:
    """Ranges of rows [..., R] -> int32 [..., R / tile, 6]: a_full, a, b, b_full, c_full, c (in blocks).

    Rows that see nothing have no influence on a tile's blocks. The kernels set their results to zero.
    """
    g_end, v_lo, v_hi = (x.reshape(*x.shape[:-1], -1, tile) for x in ranges)
    big = jnp.iinfo(jnp.int32).max // 2
    seen = v_hi > v_lo
    alive = seen | (g_end > 0)
    any_alive = alive.any(-1)

    def lowest(x: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(where, x, big), axis=-1)

    def highest(x: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(where, x, 0), axis=-1)

    a = ceil_div(highest(g_end, alive), block)
    a_full = jnp.where(any_alive, lowest(g_end, alive) // block, 0)
    any_seen = seen.any(-1)
    b = jnp.where(any_seen, jnp.maximum(lowest(v_lo, seen) // block, a), a)
    c = jnp.where(any_seen, jnp.maximum(ceil_div(highest(v_hi, seen), block), b), b)
    # An unmasked block lies inside the interval of every row that sees something.
    all_seen = (seen | ~alive).all(-1) & any_seen
    b_full = jnp.clip(ceil_div(highest(v_lo, seen), block), b, c)
    c_full = jnp.where(all_seen, jnp.clip(lowest(v_hi, seen) // block, b_full, c), b_full)
    return jnp.stack([jnp.minimum(a_full, a), a, b, b_full, c_full, c], axis=-1).astype(jnp.int32)


class Work(NamedTuple):
    """What a program computes: the `first` to `last` of the blocks that a tile visits in a source."""

    batch_row: Any
    kv_head: Any
    tile: Any
    part: Any
    """The program's number among all that share the tile, of all sources."""
    source: Any
    bounds: tuple[Any, ...]
    """a_full, a, b, b_full, c_full, c (see the module's docstring)."""
    unmasked: Any
    """How many of the tile's blocks need no mask. They are visited first."""
    first: Any
    last: Any

    @classmethod
    def of_program(cls, blocks: Any, splits: tuple[int, ...]) -> Work:
        """The work of the program at the grid's axes; `blocks` [sources, B, tiles, 6]."""
        program, kv_head, tile = lax.axis_index("program"), lax.axis_index("kv_head"), lax.axis_index("tile")
        batch_row, part = lax.div(program, sum(splits)), lax.rem(program, sum(splits))
        source, split, count = jnp.int32(0), part, jnp.int32(splits[0])
        for number in range(1, len(splits)):
            before = sum(splits[:number])
            here = part >= before
            source = jnp.where(here, number, source)
            split = jnp.where(here, part - before, split)
            count = jnp.where(here, splits[number], count)
        bounds = tuple(blocks[source, batch_row, tile, i] for i in range(6))
        a_full, a, b, b_full, c_full, c = bounds
        unmasked, total = a_full + c_full - b_full, a + c - b
        first, last = lax.div(total * split, count), lax.div(total * (split + 1), count)
        return cls(batch_row, kv_head, tile, part, source, bounds, unmasked, first, last)

    def of_source(self, run: Callable[[int], None], sources: int) -> None:
        """Runs `run(number)` for the program's source, whose number is then static."""
        if sources == 1:
            run(0)
            return
        for number in range(sources):
            pl.when(self.source == number)(functools.partial(run, number))

    @property
    def first_masked(self) -> Any:
        """Where the program's masked blocks begin, between `first` and `last`."""
        return jnp.clip(self.unmasked, self.first, self.last)

    def block_at(self, i: Any) -> Any:
        """The i-th block of the tile: the unmasked ones, then the three masked runs."""
        a_full, a, b, b_full, c_full, _ = self.bounds
        masked = i - self.unmasked
        left, middle = a - a_full, b_full - b
        unmasked_id = jnp.where(i < a_full, i, b_full + i - a_full)
        masked_id = jnp.where(
            masked < left,
            a_full + masked,
            jnp.where(masked < left + middle, b + masked - left, c_full + masked - left - middle),
        )
        return jnp.where(i < self.unmasked, unmasked_id, masked_id)


class ExactQueries(NamedTuple):
    """The queries of a source with channels that are kept exactly (`QuantizedKV.exact`)."""

    rest: jax.Array
    """[B, K, R, H]: the queries, with zeros in those channels, whose codes are no numbers."""
    exact: jax.Array
    """[B, K, R, C]: those channels of the queries."""


class Tiles(NamedTuple):
    """The arguments of a kernel."""

    q: jax.Array
    """[B, K, R, H]: folded and padded, R a multiple of the tile."""
    exact_q: tuple[ExactQueries | None, ...]
    """Of each source, where its keys have channels that are kept exactly."""
    k: tuple[KVArray, ...]
    """[rows, K, S, H] of each source."""
    v: tuple[KVArray, ...]
    rows: jax.Array
    """int32 [sources, B]"""
    ranges: Ranges
    """int32 [sources, B, R] each."""
    blocks: jax.Array
    """int32 [sources, B, tiles, 6]"""


class Refs(NamedTuple):
    """Arguments and results of a kernel in global memory."""

    tiles: Any
    """`Tiles` of references."""
    out: Any
    """[parts, B, K, R, H], with a part for every split."""
    lse: Any
    """[parts, B, K, R]"""


def launch_kernel(
    tiles: Tiles,
    config: KernelConfig,
    program: Callable[[Refs], None],
    interpret: Any,
    *,
    results: int = 1,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs `program` for each KV head, tile and split: (out, lse) of `Refs`, with `results` for each row of a tile.

    `options` are those of plgpu.kernel.
    """
    batch, kv_heads, padded, h = tiles.q.shape
    flat, tree = jax.tree.flatten(tiles)

    def kernel(*refs: Any) -> None:
        program(Refs(jax.tree.unflatten(tree, refs[: len(flat)]), *refs[len(flat) :]))

    parts = sum(config.splits)
    shape = (parts, batch, kv_heads, results * padded)
    run = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((*shape, h), tiles.q.dtype), jax.ShapeDtypeStruct(shape, jnp.float32)),
        grid=(kv_heads, padded // config.tile, batch * parts),
        grid_names=("kv_head", "tile", "program"),
        **options,
        **({} if interpret is None else {"interpret": interpret}),
    )
    out, lse = run(*flat)
    return out, lse


type Launch = Callable[[Tiles, KernelConfig], tuple[jax.Array, jax.Array]]
"""Runs a kernel: `out` of `Refs` in q's dtype, `lse` in float32."""


def attend_tiles(
    name: str,
    q: jax.Array,
    sources: tuple[Source, ...],
    choose: Callable[[int, int, tuple[int, ...]], KernelConfig],
    launch: Launch,
) -> tuple[jax.Array, jax.Array]:
    """The arena op by a kernel. `choose(rows, B * K, slots of each source)` gives its sizes.

    Raises UserError for shapes and dtypes that the kernel `name` does not support.
    """
    batch, tokens, heads, h = q.shape
    kv_heads = sources[0].shape[1]
    group = heads // kv_heads
    rows = tokens * group
    for source in sources:
        reason = unsupported(h, q.dtype, source.dtype, source.shape[2])
        if reason:
            raise UserError(f"attention {name!r}: {reason}")
    config = choose(rows, batch * kv_heads, tuple(s.shape[2] for s in sources))
    padding = round_up(rows, config.tile) - rows
    ranges: Ranges = jax.tree.map(lambda *x: jnp.stack(x), *(s.ranges for s in sources))

    def fold(x: jax.Array) -> jax.Array:  # [sources, B, T] -> [sources, B, R]
        return jnp.pad(jnp.repeat(x, group, axis=2), ((0, 0), (0, 0), (0, padding)))

    folded = Ranges(*map(fold, ranges))
    # All rows of a single token have the same ranges, so that one row stands for the tile.
    one = tokens == 1 and rows <= config.tile
    blocks = tile_blocks(ranges, config.block, 1) if one else tile_blocks(folded, config.block, config.tile)
    queries = q.reshape(batch, tokens, kv_heads, group, h).transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, rows, h)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding), (0, 0)))
    arguments = Tiles(
        queries,
        tuple(_exact_queries(queries, s) for s in sources),
        tuple(s.k for s in sources),
        tuple(s.v for s in sources),
        jnp.stack([s.rows for s in sources]),
        folded,
        blocks,
    )
    out, lse = launch(arguments, config)
    out, lse = _merge_parts(out[:, :, :, :rows], lse[:, :, :, :rows])
    out = out.reshape(batch, kv_heads, tokens, group, h).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(batch, kv_heads, tokens, group).transpose(0, 2, 1, 3)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, tokens, heads)


def _exact_queries(queries: jax.Array, source: Source) -> ExactQueries | None:
    channels = exact_channels(source.k)  # [rows, K, C]
    if channels is None:
        return None
    channels = channels[source.rows]
    rest = jnp.where(channel_mask(channels, queries.shape[-1])[:, :, None], 0, queries)
    return ExactQueries(rest, jnp.take_along_axis(queries, channels[:, :, None], axis=-1))


def _merge_parts(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Parts [parts, ...] -> attention over all of their slots."""
    if len(out) == 1:
        return out[0], lse[0]
    top = lse.max(0)
    # A part that sees nothing has NEGATIVE, whose share is 0 unless all parts see nothing.
    shares = jnp.exp(lse - top)
    total = shares.sum(0)
    merged = jnp.sum(out.astype(jnp.float32) * shares[..., None], axis=0) / total[..., None]
    return merged, jnp.where(top <= NEGATIVE / 2, NEGATIVE, top + jnp.log(total))  # NaN stays NaN
