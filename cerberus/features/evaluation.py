"""From windows to model inputs: the one definition that stream, request and replay share.

The online row of a user carries its own window, packed (`Recent`), so the reader computes the
aggregates as of its own clock and adds the transaction in hand exactly once, whether or not the
stream has counted it. A silent user's count falls to zero by itself.
"""

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from cerberus import transactions, window
from cerberus.features import declared

RECENT_EVENTS = 256
TILES_A_SPAN = 600
STALE_MS = 5_000
SPOKEN = 1
"""The newest version of claims and commits that this release reads; owners tell it in their states.

A claim or a commit is written in this version once every owner reads it, and in version 0, which
every release reads, until then. So two releases that follow each other work side by side.
"""
_TILES_KEPT = 30_000  # twice as many can be packed, as far as a window may reach ahead of its row

_VERSION = 1
# version, epoch, offset, as_of_ms, partition, complete, lower_ms, events, tiles
_HEADER = struct.Struct(">BIqqI?qHH")
_EVENT = np.dtype(
    [("age_ms", ">u4"), ("amount_minor", ">i8"), ("id_hash64", ">u8"), ("merchant_hash32", ">u4")]
)
_TILE = np.dtype([("age_ms", ">i8"), ("count", ">u4"), ("total_minor", ">i8")])


LIVE = "live"
"""The state of a partition whose rows are those of its log's end."""


class Doubt(enum.StrEnum):
    """Why values may be wrong: the reasons in `degraded`, explained in docs/windowing.md."""

    OWNER_MISSING = "owner_missing"
    REPLAYING = "replaying"
    REBUILDING = "rebuilding"
    RESTORING = "restoring"
    STALE = "stale"
    WARMING = "warming"
    AS_OF_TOO_OLD = "as_of_too_old"
    SPLIT_USER = "split_user"
    RECENT_UNREADABLE = "recent_unreadable"
    CREDIT_SCORE_UNREADABLE = "credit_score_unreadable"


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
    """What the owner of a partition says of it, refreshed at least each second.

    Attributes:
        epoch: As in `Fence`.
        offset: Where the owner stands.
        state: `LIVE`, or the `Doubt` that it is replaying (windows up to the commit), rebuilding (a
            new epoch) or restoring (what the store has lost).
        caught_up_ms: Wall clock at which the owner last stood at the log's end.
        known_from_ms: Events at or before this time may be missing, because the log began later.
        progress: Share of the replay that is done, 0..1.
        moved_ms: Events at or before it may be in another partition, if the user's was another
            when there were `former` partitions.
        former: How many partitions there were before the number last changed; 0 when unknown.
        count: How many there are.
        version: As `SPOKEN` of its owner; 0 for releases that do not tell it.
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

    def pack(self) -> bytes:
        """Write it as JSON, readable by people and by Redis' Lua."""
        return orjson.dumps(self)

    def known_from(self, user_id: int, partition: int) -> int:
        """Return the time, ms, at or before which events of a user may be missing."""
        stayed = self.former and transactions.partition_of(user_id, self.former) == partition
        return self.known_from_ms if stayed else max(self.known_from_ms, self.moved_ms)

    @classmethod
    def unpack(cls, value: bytes) -> "PartitionState":
        """Read what `pack` wrote, of a later version too."""
        told = orjson.loads(value)
        return cls(**{name: told[name] for name in cls.__slots__ if name in told})


@dataclass(frozen=True, slots=True)
class Recent:
    """One user's packed window at one prefix of the log.

    Attributes:
        fence: The prefix.
        partition: Of the log that the prefix belongs to.
        complete: False while the log did not reach back over the longest span.
        lower_ms: Every event after it, up to the prefix, is here.
        events: Shape (n ≤ 256,), the newest, in order of time.
        tiles: Shape (m,), older events summed over slices of longest span / 600.
        tile_ms: Length of a tile.
    """

    fence: Fence
    partition: int
    complete: bool
    lower_ms: int
    events: npt.NDArray[np.void]
    tiles: npt.NDArray[np.void]
    tile_ms: int

    def stats(
        self, after_ms: int, until_ms: int, without: int | None = None
    ) -> tuple[window.WindowStats, bool, bool]:
        """Summarise `(after_ms, until_ms]`, leaving out the event with identity hash `without`.

        Returns:
            The stats; whether they are approximate (an edge cuts a tile, which then counts
            whole); whether `without` was met.
        """
        ages = self.events["age_ms"].astype(np.int64)
        start = int(ages.searchsorted(after_ms - self.lower_ms, side="right"))
        stop = max(start, int(ages.searchsorted(until_ms - self.lower_ms, side="right")))
        count, total = stop - start, int(self.events["amount_minor"][start:stop].sum())
        approximate = met = False
        if without is not None:
            hits = np.flatnonzero(self.events["id_hash64"][start:stop] == np.uint64(without))
            if met := bool(hits.size):
                count -= 1
                total -= int(self.events["amount_minor"][start + int(hits[0])])
        if self.tiles.size:
            begin = self.tiles["age_ms"] + self.lower_ms
            end = begin + self.tile_ms
            inside = (end > after_ms + 1) & (begin <= until_ms)
            count += int(self.tiles["count"][inside].sum())
            total += int(self.tiles["total_minor"][inside].sum())
            # `without` was not met among the events: the tile at `until_ms` may have counted it.
            sure = without is None or met
            cut = inside & ((begin <= after_ms) | (end > until_ms + sure))
            approximate = bool(cut.any())
        return window.WindowStats(count, total), approximate, met


def tile_ms(spans: window.Spans) -> int:
    """Return the length of a tile: the longest span / 600, or what is kept / 30,000 if longer."""
    return max(1, spans.longest_ms // TILES_A_SPAN, spans.keep_ms // _TILES_KEPT)


def pack(
    user: window.UserWindow, fence: Fence, partition: int, lower_ms: int, spans: window.Spans
) -> bytes:
    """Pack one user's window; `lower_ms` is the later of what is kept and what is known.

    Cost: about 20 µs, and 100 µs above 256 events, however many there are.
    """
    # A log of old times may have what was imported far ahead; nobody reads the row as of then.
    kept = user.columns(lower_ms, fence.as_of_ms + spans.keep_ms)
    edge = max(0, len(kept.times) - RECENT_EVENTS)
    events = np.empty(len(kept.times) - edge, _EVENT)
    if len(events):
        events["age_ms"] = kept.times[edge:] - lower_ms
        events["amount_minor"] = np.diff(kept.total(np.arange(edge, len(kept.times) + 1)))
        events["id_hash64"] = kept.ids[edge:]
        events["merchant_hash32"] = kept.merchants[edge:]
    tiles = _tiles(kept, edge, lower_ms, tile_ms(spans))
    header = _HEADER.pack(
        _VERSION,
        *fence,
        partition,
        lower_ms <= fence.as_of_ms - spans.longest_ms,
        lower_ms,
        len(events),
        len(tiles),
    )
    return header + events.tobytes() + tiles.tobytes()


def _tiles(kept: window.Columns, edge: int, lower_ms: int, length_ms: int) -> npt.NDArray[np.void]:
    """Sum up the events before index `edge`, one tile a slice that has any."""
    if not edge:
        return np.empty(0, _TILE)
    times = kept.times[:edge]
    begins = np.arange(times[0] // length_ms, times[-1] // length_ms + 1) * length_ms
    bounds = np.append(times.searchsorted(begins), edge)
    tiles = np.empty(len(begins), _TILE)
    tiles["age_ms"] = begins - lower_ms
    tiles["count"] = np.diff(bounds)
    tiles["total_minor"] = np.diff(kept.total(bounds))
    return tiles[tiles["count"] > 0]


def unpack(value: bytes, spans: window.Spans) -> Recent:
    """Read what `pack` wrote. Cost: about 2 µs.

    Raises:
        ValueError: The bytes are not a packed window of this format.
    """
    if len(value) < _HEADER.size or value[0] != _VERSION:
        raise ValueError("recent: not a packed window of format 1")
    _, epoch, offset, as_of_ms, partition, complete, lower_ms, n, m = _HEADER.unpack_from(value)
    tiles_at = _HEADER.size + n * _EVENT.itemsize
    if len(value) != tiles_at + m * _TILE.itemsize:
        raise ValueError(f"recent: {len(value)} bytes do not hold {n} events and {m} tiles")
    return Recent(
        fence=Fence(epoch, offset, as_of_ms),
        partition=partition,
        complete=complete,
        lower_ms=lower_ms,
        events=np.frombuffer(value, _EVENT, n, _HEADER.size),
        tiles=np.frombuffer(value, _TILE, m, tiles_at),
        tile_ms=tile_ms(spans),
    )


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """The inputs of one decision, with all that is needed to judge and repeat it.

    Attributes:
        user_id: Whose.
        as_of_ms: The moment that the values describe.
        stats: One entry a span, exact integers; None when they cannot be had.
        credit_score: 300 to 850; None when unknown or expired.
        amount_minor: Of the transaction in hand; None when a user alone is asked about.
        fence: The prefix of the log behind `stats`; None when no row was there.
        degraded: Why the values may be wrong, by `Doubt`; empty when they are exact.
        approximate: An edge of a window cut a tile.
    """

    user_id: int
    as_of_ms: int
    stats: tuple[window.WindowStats, ...] | None
    credit_score: int | None
    amount_minor: int | None = None
    fence: Fence | None = None
    degraded: tuple[str, ...] = ()
    approximate: bool = False


@dataclass(frozen=True, slots=True)
class OnlineRow:
    """What the online store holds of one user: either part may be missing, or `unreadable`.

    `unreadable` holds the doubts of parts that cannot be read.
    `split_ms` is the newest of the user's events that came in another partition than `partition`.
    """

    user_id: int
    recent: Recent | None
    credit_score: int | None
    partition: int
    state: PartitionState | None
    unreadable: tuple[Doubt, ...] = ()
    split_ms: int = 0


@dataclass(frozen=True, slots=True)
class Rules:
    """By what rows are evaluated.

    Attributes:
        spans: The window definition.
        max_staleness_ms: How long the owner may be silent before streamed values are refused.
    """

    spans: window.Spans
    max_staleness_ms: int


def as_of(
    online: OnlineRow,
    as_of_ms: int,
    in_hand: transactions.Transaction | None,
    *,
    now_ms: int,
    rules: Rules,
) -> FeatureRow:
    """Evaluate an online row at `as_of_ms`, with the transaction in hand counted exactly once.

    A missing row of a live partition is a true zero. Where the owner is silent for longer than
    `max_staleness_ms`, or unknown with no row, the streamed values are None, never zero.
    """
    recent, state, spans = online.recent, online.state, rules.spans
    if state is not None and recent is not None and recent.fence.epoch < state.epoch:
        recent = recent if state.state != LIVE else None
    stats: tuple[window.WindowStats, ...] | None = None
    approximate = False
    silent_ms = now_ms - state.caught_up_ms if state else 0
    unreadable = Doubt.RECENT_UNREADABLE in online.unreadable
    known = recent is not None or (state is not None and not unreadable)
    if known and silent_ms <= rules.max_staleness_ms:
        stats, approximate = _stats(recent, as_of_ms, in_hand, spans)
    return FeatureRow(
        user_id=online.user_id,
        as_of_ms=as_of_ms,
        stats=stats,
        credit_score=online.credit_score,
        amount_minor=in_hand.amount_minor if in_hand else None,
        fence=recent.fence if recent else None,
        degraded=_doubts(online, recent, as_of_ms, now_ms, spans),
        approximate=approximate,
    )


def _doubts(
    online: OnlineRow, recent: Recent | None, as_of_ms: int, now_ms: int, spans: window.Spans
) -> tuple[str, ...]:
    """Say why values computed from `recent`, None for no row, may be wrong."""
    doubts: list[str] = [*online.unreadable]
    state, after_ms = online.state, as_of_ms - spans.longest_ms
    elsewhere = online.recent is not None and online.recent.partition != online.partition
    if elsewhere or after_ms < online.split_ms:
        doubts.append(Doubt.SPLIT_USER)
    if state is None:
        return (*doubts, Doubt.OWNER_MISSING)
    if state.state != LIVE:
        doubts.append(state.state)
    if now_ms - state.caught_up_ms > STALE_MS:
        doubts.append(Doubt.STALE)
    if after_ms < state.known_from(online.user_id, online.partition):
        doubts.append(Doubt.WARMING)
    elif recent is None:
        # A row is dropped when a kept length has passed: until then nobody has an older event.
        if as_of_ms < now_ms - spans.slack_ms:
            doubts.append(Doubt.AS_OF_TOO_OLD)
    elif after_ms < recent.lower_ms:
        doubts.append(Doubt.AS_OF_TOO_OLD if recent.complete else Doubt.WARMING)
    return tuple(doubts)


def _stats(
    recent: Recent | None,
    as_of_ms: int,
    in_hand: transactions.Transaction | None,
    spans: window.Spans,
) -> tuple[tuple[window.WindowStats, ...], bool]:
    without = in_hand.id_hash64 if in_hand else None
    approximate = False
    result = []
    for span_ms in spans.spans_ms:
        stats = window.EMPTY
        if recent is not None:
            stats, rough, _ = recent.stats(as_of_ms - span_ms, as_of_ms, without)
            approximate |= rough
        if in_hand is not None:
            stats = window.WindowStats(stats.count + 1, stats.total_minor + in_hand.amount_minor)
        result.append(stats)
    return tuple(result), approximate


def matrix(rows: Sequence[FeatureRow], spans: Sequence[str]) -> npt.NDArray[np.float32]:
    """Lay rows out for the model: missing is NaN, never zero; amounts are in major units.

    Returns:
        Shape (len(rows), inputs), float32, C-contiguous, columns as in `declared.inputs`.
    """
    nan = float("nan")
    streamed = len(declared.OfWindow._fields) * len(spans)
    unknown = [nan] * streamed
    table = [
        (
            *(unknown if row.stats is None else declared.values(row.stats)),
            nan if row.credit_score is None else row.credit_score,
            nan if row.amount_minor is None else row.amount_minor / 100,
        )
        for row in rows
    ]
    width = streamed + len(declared.BATCH) + len(declared.REQUEST)
    return np.array(table, dtype=np.float32).reshape(len(rows), width)
