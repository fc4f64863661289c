"""Which groups of a live video are where, in numbers alone.

Groups are numbered in the order in which they were seen. The oldest were forgotten, those behind them are remembered by
their time tokens and pooled KV, and the newest are on the device with their dense KV as well:

    0 ............. forgotten ............. forgotten + evicted ............. forgotten + groups
       (nothing)               (pooled KV)                       (dense KV)

Groups are moved out by whole units, which hold whole prefill chunks and whole selection blocks.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from xl2jax.arithmetic import ceil_div, round_up


class Move(NamedTuple):
    """How many of the oldest dense groups leave the device, and how many of the oldest groups are forgotten after that."""

    evicted: int
    forgotten: int


@dataclasses.dataclass
class Ledger:
    """The numbers of groups, and the rule by which old ones make room for new ones.

    Half of the dense groups leave the device at a time, and an eighth of all groups is forgotten at a time, so that what
    stays is moved seldom.

    Attributes:
      dense_limit, group_limit: the most groups that are dense on the device, and that are remembered.
      unit: groups that leave together.
      keep: the newest groups, which never leave: new groups see them in prefill.
      groups: how many are remembered.
      evicted: how many of these, the oldest, are not on the device.
      forgotten: how many were forgotten.
    """

    dense_limit: int
    group_limit: int
    unit: int
    keep: int
    groups: int = 0
    evicted: int = 0
    forgotten: int = 0

    @classmethod
    def of_limits(cls, dense: int, remembered: int, unit: int, keep: int, most_new: int) -> Ledger:
        """Limits of about `dense` and `remembered` groups, raised so that up to `most_new` always find room."""
        keep = round_up(keep, unit)
        # Half of the limit has to be enough for what comes, and to be more than what has to stay.
        dense = max(round_up(dense, unit), 2 * round_up(max(keep, most_new) + most_new, unit) + unit)
        return cls(dense, max(round_up(remembered, unit), dense), unit, keep)

    @property
    def dense(self) -> int:
        """Groups on the device."""
        return self.groups - self.evicted

    def piece(self, parts: int) -> int:
        """Groups of each of so many parts, but no fewer than fit on the device."""
        return max(self.dense_limit, round_up(ceil_div(self.group_limit, parts), self.unit))

    def make_room(self, new: int) -> Move:
        """What has to leave before `new` groups are added. Counts it as gone."""
        leaving = 0
        half = min(self.dense_limit // 2, self.dense - self.keep) // self.unit * self.unit
        if self.dense + new > self.dense_limit:
            leaving = half
        forgotten = 0
        excess = self.groups + new - self.group_limit
        if excess > 0:
            if self.evicted + leaving < round_up(excess, self.unit):
                leaving = half
            wanted = round_up(max(excess, ceil_div(self.group_limit, 8)), self.unit)
            forgotten = min(wanted, self.evicted + leaving)
        self.evicted += leaving - forgotten
        self.groups -= forgotten
        self.forgotten += forgotten
        return Move(leaving, forgotten)

    def add(self, new: int) -> None:
        """Counts `new` groups, for which `make_room` made room."""
        self.groups += new
        assert self.dense <= self.dense_limit
        assert self.groups <= self.group_limit
