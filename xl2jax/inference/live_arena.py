"""The KV of a live video on the device, in arrays whose sizes never change.

Their capacity is there from the start, so that nothing is compiled anew and nothing is copied because the video grows.
Where groups leave, one compiled program moves the rest to the start of the arrays. Half of the dense groups leave at a
time, so that a group is moved about once. A ring would need no move, but what a query sees of it would be two intervals of
slots, and attention reads one (`xl2jax.ops.ranges`).

The time tokens of groups whose dense KV has left stay in the arena as globals. New groups are therefore laid out as if the
video began with the first dense group, behind a longer prefix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xl2jax.arithmetic import round_up
from xl2jax.errors import UserError
from xl2jax.inference import compiled, live_programs, prefill, session
from xl2jax.inference.bilevel import BilevelConfig, GroupTable, PooledKV, mixed_slots, table_of
from xl2jax.inference.cache import KVCache
from xl2jax.inference.layout import PrefillConfig, VideoLayout, bucket
from xl2jax.inference.live_blocks import BlockStore
from xl2jax.inference.live_ledger import Ledger, Move
from xl2jax.inference.network import Network
from xl2jax.inference.offload import HostKV, placed_like
from xl2jax.inference.prefill import PrefillPlan, Stretch
from xl2jax.ops.kv import quantized_zeros

_FEWEST_GROUPS = 64
"""Questions about fewer groups run the programs of so many: compiling another size would take longer."""


def live_plan(
    prefix: int, time_cap: int, visual_tokens: int, config: PrefillConfig, ledger: Ledger, step_groups: int
) -> PrefillPlan:
    """The sizes of an arena for the ledger's limits. A segment is one step, so that a group waits for few others."""
    layout = VideoLayout(prefix, (time_cap,) * ledger.group_limit, visual_tokens)
    # The platform would choose the numbers of groups and steps, which are given.
    plan = prefill.make_plan(layout, config, "cpu", step_groups=step_groups, segment_steps=1)
    dense = (ledger.dense_limit + step_groups) * visual_tokens  # a padded step needs room behind the last group
    return dataclasses.replace(plan, slots=round_up(plan.visual_start + dense, 128))


def group_capacity(plan: PrefillPlan, ledger: Ledger) -> int:
    """Groups that the pooled KV and the tables have room for: a padded step needs room behind the last group."""
    return ledger.group_limit + plan.segment_groups


@dataclasses.dataclass(eq=False, kw_only=True)
class LiveKV(session.VideoKV):
    """The KV of all groups that a live video remembers at one moment. It is valid while the video's lock is held."""

    capacity: int
    most_groups: int
    """The most groups that there were at any moment. Sizes follow from them, so that they change seldom."""
    evicted: int
    first_block: int
    """Number of the block that the first group belongs to."""
    unit: int
    """Groups of a block."""
    times: np.ndarray
    visuals: np.ndarray
    """Positions [Gcap] to which the keys of each group's first time and visual token are rotated."""
    blocks: BlockStore
    _read: dict[int, HostKV] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def table(self) -> GroupTable:
        lengths = np.zeros(self.capacity, np.int32)
        lengths[: self.layout.groups] = self.layout.time_lengths
        return table_of(self.layout, lengths, self.times, self.visuals)

    @property
    def grows(self) -> bool:
        return True

    @property
    def group_capacity(self) -> int:
        return self.capacity

    @property
    def on_device(self) -> bool:
        return self.evicted == 0

    def make_pooled(self, network: Network, pool: int) -> PooledKV:
        made = ", ".join(map(str, self.pooled))
        raise UserError(f"a live video keeps the pooled KV that it was started with (pool {made}), not pool {pool}")

    def readable(self, dense: jax.Array | np.ndarray) -> np.ndarray:
        """Reads the blocks of groups that are not on the device. Groups whose blocks were dropped are left out.

        `with_dense` then takes these, and no others.
        """
        wanted = np.array(dense)
        self._read = {}
        for at in range(0, self.evicted, self.unit):
            if wanted[at : at + self.unit].any():
                block = self.blocks.get(self.first_block + at // self.unit)
                if block is None:
                    wanted[at : at + self.unit] = False
                else:
                    self._read[at] = block
        return wanted

    def with_dense(self, dense: jax.Array | np.ndarray, limit: int) -> KVCache:
        if self.on_device:
            return self.cache
        v = self.layout.visual_tokens
        chosen = np.flatnonzero(np.asarray(dense)[: self.layout.groups])
        count = bucket(min(limit, self.capacity))
        index, on_host = np.zeros(count, np.int32), np.zeros(count, bool)
        index[: len(chosen)] = np.maximum(chosen - self.evicted, 0)
        on_host[: len(chosen)] = chosen < self.evicted
        host = None
        if on_host.any():
            host = jax.tree.map(
                lambda a: np.zeros((*a.shape[:2], count * v, *a.shape[3:]), a.dtype), (self.cache.k, self.cache.v)
            )
            for place, group in enumerate(chosen[on_host[: len(chosen)]].tolist()):
                block, offset = self._read[group // self.unit * self.unit], group % self.unit * v

                def put(out: np.ndarray, x: np.ndarray, at: int = place * v, offset: int = offset) -> None:
                    out[:, :, at : at + v] = x[:, :, offset : offset + v]

                jax.tree.map(put, host, tuple(block))
            host = jax.tree.map(placed_like, (self.cache.k, self.cache.v), host)
        start = self.plan.visual_start
        return live_programs.gather_groups(self.cache, index, host, on_host, start=start, visual_tokens=v)

    def mixed_slots(self, dense_limit: int, bilevel: BilevelConfig) -> int:
        groups = min(max(1 << (self.most_groups - 1).bit_length(), _FEWEST_GROUPS), self.capacity)
        layout = VideoLayout(self.layout.prefix, (self.plan.time_cap,) * groups, self.layout.visual_tokens)
        return mixed_slots(layout, dense_limit, bilevel)


class LiveArena:
    """The arrays of a live video, and how groups enter and leave them. One thread may use it at a time.

    Attributes:
      ledger: how many groups are where.
      cache, pooled: the dense KV of the newest groups, and the pooled KV of all that are remembered.
      finite: whether the KV of all groups that were ever added is finite. It is ready when the last ones are prefilled.
    """

    def __init__(
        self,
        network: Network,
        prefix: Stretch,
        plan: PrefillPlan,
        ledger: Ledger,
        blocks: BlockStore,
        *,
        pool: int,
        quantized: bool = False,
        quantized_pooled: bool = False,
        renumber: bool = True,
        piece_groups: int,
    ):
        """`piece_groups`: see `VideoKV`. `renumber`: where groups leave, the keys of the rest are rotated to positions
        without a gap. Otherwise positions count on for ever."""
        self._network, self.plan, self.ledger, self._blocks = network, plan, ledger, blocks
        self._pool, self._renumber, self._piece_groups = pool, renumber, piece_groups
        self._prefix, self._shift, self._most = len(prefix.ids), 0, 0
        self._capacity = group_capacity(plan, ledger)
        self._lengths, self._times, self._visuals = (np.zeros(self._capacity, np.int32) for _ in range(3))
        self.finite = jnp.bool_(True)
        self.cache = session.empty_video_cache(network, plan.slots, plan.visual_start, quantized=quantized)
        for block, length in prefill.blocks(prefix, network.platform):
            self.cache, _ = compiled.prefill_globals(network, self.cache, block, None, np.int32(length))
        self.pooled = self._empty_pooled(quantized_pooled)
        self._compile_moves()

    def _empty_pooled(self, quantized: bool) -> PooledKV:
        layers, kv_heads, _, h = self.cache.shape
        shape = (layers, kv_heads, self._capacity * (self.plan.visual_tokens // self._pool), h)
        if not quantized:
            return PooledKV(*(jnp.zeros(shape, self._network.dtype) for _ in range(2)))
        channels = self._network.exact_key_channels()
        return PooledKV(
            quantized_zeros(shape, self._network.dtype, channels), quantized_zeros(shape, self._network.dtype)
        )

    def _compile_moves(self) -> None:
        """Moves nothing, so that the programs that move groups are there when a camera cannot wait for them."""
        self._read_block(0)
        self._move_arrays(0, 0, np.zeros(0, np.int32), np.zeros(0, np.int32))
        self.pooled = live_programs.shift_pooled(self.pooled, np.int32(0))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves((self.cache.k, self.cache.v, self.pooled)))

    def add(self, visual: jax.Array, time_ids: Sequence[Sequence[int]]) -> int:
        """Prefills the next groups from visual tokens [segment_groups, V, D], of which those with time tokens are real.

        Returns how many of the oldest groups were forgotten for that. Raises UserError where a time has too many tokens.
        """
        new, plan, ledger = len(time_ids), self.plan, self.ledger
        if max(map(len, time_ids)) > plan.time_cap:
            raise UserError("the video has run for so long that its times no longer fit: start to watch anew")
        move = ledger.make_room(new)
        if any(move):
            self._move(move)
        first, groups = ledger.groups, ledger.groups + new
        self._lengths[first:groups] = [len(ids) for ids in time_ids]
        lengths, evicted, v = self._lengths[:groups], ledger.evicted, plan.visual_tokens
        layout = VideoLayout(self._prefix + int(lengths[:evicted].sum()), tuple(lengths[evicted:].tolist()), v)
        ids = [list(x) for x in time_ids]
        segment = prefill.steps(layout, plan, ids, ledger.dense, self._shift)
        self.cache, _ = compiled.prefill_segment(self._network, self.cache, visual, segment)
        self._number(first, groups)
        start = np.int32(plan.visual_start + ledger.dense * v)
        positions = np.zeros(plan.segment_groups, np.int32)
        positions[:new] = self._visuals[first:groups]
        self.pooled, self.finite = live_programs.pool_new(
            self._network.config.llm,
            self.cache,
            self.pooled,
            self.finite,
            start,
            positions,
            np.int32(first),
            visual_tokens=v,
            pool=self._pool,
        )
        ledger.add(new)
        self._most = max(self._most, ledger.groups)
        return move.forgotten

    def _number(self, first: int, last: int) -> None:
        """Notes the positions of groups `first` to `last`, which are dense or whose time tokens moved."""
        lengths, evicted, v = self._lengths[:last].astype(np.int64), self.ledger.evicted, self.plan.visual_tokens
        times = self._prefix + np.cumsum(lengths) - lengths + np.maximum(np.arange(last) - evicted, 0) * v + self._shift
        self._times[first:last] = times[first:]
        dense = max(first, evicted)
        self._visuals[dense:last] = (times + lengths)[dense:]

    def _move(self, move: Move) -> None:
        """Stores the groups that leave, and moves all others to the start of the arrays."""
        ledger, v = self.ledger, self.plan.visual_tokens
        evicted_before = ledger.evicted + move.forgotten - move.evicted
        before = ledger.forgotten - move.forgotten
        for at in range(0, move.evicted, ledger.unit):
            number = (before + evicted_before + at) // ledger.unit
            self._blocks.put(number, self._read_block(at))
        gone = int(self._lengths[: move.forgotten].sum())
        groups = ledger.groups
        for x in (self._lengths, self._times, self._visuals):
            x[:groups] = x[move.forgotten : move.forgotten + groups].copy()
        old_times, old_visuals = self._times[:groups].copy(), self._visuals[:groups].copy()
        if self._renumber:
            self._shift = 0
            self._number(0, groups)
        else:
            self._shift += move.evicted * v + gone
        times = np.repeat(self._times[:groups] - old_times, self._lengths[:groups])
        visuals = np.repeat((self._visuals[:groups] - old_visuals)[ledger.evicted :], v)
        self._move_arrays(gone, move.evicted * v, times, visuals)
        if move.forgotten:
            kept = v // self._pool
            self.pooled = live_programs.shift_pooled(self.pooled, np.int32(move.forgotten * kept))
            self._blocks.forget(ledger.forgotten // ledger.unit)

    def _read_block(self, group: int) -> HostKV:
        """The dense KV of a unit of groups, from place `group` of the arena on."""
        v = self.plan.visual_tokens
        slot = np.int32(self.plan.visual_start + group * v)
        block = live_programs.slots((self.cache.k, self.cache.v), slot, size=self.ledger.unit * v)
        return HostKV(*jax.tree.map(lambda x: np.array(x), block))

    def _move_arrays(self, gone: int, left: int, times: np.ndarray, visuals: np.ndarray) -> None:
        """Drops the first `gone` time tokens and the first `left` visual tokens of the cache. Those that stay are rotated by
        `times` and `visuals` positions."""
        plan = self.plan
        source, turn = np.arange(plan.slots), np.zeros(plan.slots, np.int64)
        source[self._prefix : plan.visual_start] += gone
        source[plan.visual_start :] += left
        end = self._prefix + len(times)
        turn[self._prefix : end] = times
        turn[plan.visual_start : plan.visual_start + len(visuals)] = visuals
        source = np.minimum(source, plan.slots - 1)
        counts = np.int32(end), np.int32(len(visuals))
        self.cache = live_programs.move_slots(
            self._network.config.llm,
            self.cache,
            source.astype(np.int32),
            turn.astype(np.int32),
            counts,
            rotated=self._renumber,
        )

    def kv(self) -> LiveKV:
        """The groups that are remembered now. Raises UserError where their KV is not finite."""
        if not bool(self.finite):
            raise self._network.not_finite("the video's KV")
        ledger, v = self.ledger, self.plan.visual_tokens
        lengths = tuple(self._lengths[: ledger.groups].tolist())
        return LiveKV(
            VideoLayout(self._prefix, lengths, v),
            self.plan,
            self.cache,
            pooled={self._pool: self.pooled},
            capacity=self._capacity,
            most_groups=self._most,
            piece_groups=self._piece_groups,
            evicted=ledger.evicted,
            first_block=ledger.forgotten // ledger.unit,
            unit=ledger.unit,
            times=self._times.copy(),
            visuals=self._visuals.copy(),
            blocks=self._blocks,
        )
