"""Which prefix of a partition's log a row describes, and what a partition's owner says about it."""

from dataclasses import dataclass
from typing import NamedTuple

import orjson

from cerberus import transactions

SPOKEN = 1
"""The newest version of claims and commits that this release reads; owners say so in their states.

A claim or a commit is written in version 0, which every release reads, until all owners have read
this version for an hour without interruption. So two releases that follow each other work side by
side, and the older one can come back within the hour.
"""

LIVE = "live"
"""The state of a partition whose rows are those of its log's end."""


class Fence(NamedTuple):
    """Which prefix of a partition's log a row is a function of; greater is newer.

    Attributes:
        epoch: Which life of the topic, from Postgres.
        offset: Where the prefix ends (exclusive).
        as_of_ms: The frontier of that prefix.
    """

    epoch: int
    offset: int
    as_of_ms: int


@dataclass(frozen=True, slots=True)
class PartitionState:
    """What the owner of a partition says about it, refreshed at least each second.

    Attributes:
        epoch: As in `Fence`.
        offset: Where the owner's prefix ends (exclusive).
        state: `LIVE`, or the `Doubt` that it is replaying (windows up to the commit), rebuilding (a
            new epoch) or restoring (what the store has lost).
        caught_up_ms: Wall clock at which the owner was last at the log's end.
        known_from_ms: Events at or before this time may be missing, because the log began later.
        progress: Share of the replay that is done, 0..1.
        moved_ms: Events at or before it may be in another partition, if the user's was another
            when there were `former` partitions.
        former: How many partitions there were before the number last changed; 0 when unknown.
        count: How many there are.
        version: `SPOKEN` of its owner; 0 for releases that do not write it.
        split_ms: The newest event here of a user whose home is another partition; 0 when none is
            known.
    """

    epoch: int
    offset: int
    state: str
    caught_up_ms: int
    known_from_ms: int = 0
    progress: float = 1.0
    moved_ms: int = 0
    former: int = 0
    count: int = 0
    version: int = 0
    split_ms: int = 0

    def pack(self) -> bytes:
        """Write it as JSON, readable by people and by Redis' Lua."""
        return orjson.dumps(self)

    def known_from(self, user_id: int, partition: int) -> int:
        """Return the time, ms, at or before which events of a user may be missing."""
        stayed = self.former and transactions.partition_of(user_id, self.former) == partition
        return self.known_from_ms if stayed else max(self.known_from_ms, self.moved_ms)

    @classmethod
    def unpack(cls, value: bytes) -> "PartitionState":
        """Read what `pack` wrote, of a later version too.

        Raises:
            ValueError, TypeError: It is no state.
        """
        told = orjson.loads(value)
        state = cls(**{name: told[name] for name in cls.__slots__ if name in told})
        if not isinstance(state.version, int):
            raise TypeError(f"version: {state.version!r} is not a whole number")
        return state
