"""Where a partition starts to be read: a pure function of the log, the commit and the stores."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import orjson

from cerberus import partition, window

_VERSION = 1
_LOOK_BACK = 10
First = tuple[int, int] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Commit:
    """The group's commit of a partition; all but the offset is in its metadata.

    Attributes:
        offset: Effects of records below it are stored.
        frontier_ms: Of that prefix; None when the metadata are not ours.
        moved: As in `partition.Start`.
        epoch: Of the fences.
        count: How many partitions the topic had; None when the metadata are not ours.
        first: Offset and timestamp of the log's first record then, which distinguish the topic
            from a later one of the same name; None when there was no record.
        known_from_ms: As in `partition.Start`; None where an earlier release had seen no record.
        since_epoch: As in `partition.Start`.
    """

    offset: int
    frontier_ms: int | None = None
    moved: partition.Moved | None = None
    epoch: int = 0
    count: int | None = None
    first: First = None
    known_from_ms: int | None = 0
    since_epoch: int | None = None

    def metadata(self, cluster: str, version: int = _VERSION) -> str:
        """Write all but the offset.

        Args:
            cluster: The brokers' name for themselves.
            version: 1 is a JSON object; 0 is the line of numbers that releases before versions
                were introduced wrote, and the only form they read.
        """
        if version >= _VERSION:
            told = {"version": _VERSION, "cluster": cluster, **dataclasses.asdict(self)}
            del told["offset"]
            return orjson.dumps(told).decode()
        moved = self.moved or partition.Moved(0, None)
        numbers = (
            self.frontier_ms,
            moved.until_ms,
            moved.former or 0,
            self.epoch,
            self.count,
        )
        known_from_ms = -1 if self.known_from_ms is None else self.known_from_ms
        later = (*(self.first or (-1, -1)), known_from_ms, self.since_epoch or 0)
        return " ".join(map(str, (cluster, *numbers, *later)))

    @classmethod
    def read(cls, offset: int, metadata: str, cluster: str) -> "Commit":
        """Read what `metadata` wrote in any version; fields that are not known are ignored.

        Of what another cluster, another program or a later version wrote, only the offset is used.
        """
        try:
            told = orjson.loads(metadata) if metadata.startswith("{") else _numbered(metadata)
            first, moved, since_epoch = told["first"], told["moved"], told["since_epoch"]
            known_from_ms = told["known_from_ms"]
            mine = told["version"] in (0, _VERSION) and told["cluster"] == cluster
            commit = cls(
                offset=offset,
                frontier_ms=int(told["frontier_ms"]),
                moved=moved and partition.Moved(moved["until_ms"], moved["former"]),
                epoch=int(told["epoch"]),
                count=int(told["count"]),
                first=None if first is None else _pair(first),
                known_from_ms=None if known_from_ms is None else int(known_from_ms),
                since_epoch=None if since_epoch is None else int(since_epoch),
            )
        except (KeyError, TypeError, ValueError):
            return cls(offset)
        return commit if mine else cls(offset)


def _numbered(metadata: str) -> dict[str, Any]:
    """Read version 0 of a commit's metadata, where 0 and -1 mean unknown."""
    cluster, *numbers = metadata.split()
    frontier_ms, until_ms, former, epoch, count, at, stamp_ms, known_from_ms, since_epoch = map(
        int, numbers
    )
    return {
        "version": 0,
        "cluster": cluster,
        "frontier_ms": frontier_ms,
        "moved": {"until_ms": until_ms, "former": former or None} if until_ms else None,
        "epoch": epoch,
        "count": count,
        "first": (at, stamp_ms) if at >= 0 else None,
        "known_from_ms": None if known_from_ms < 0 else known_from_ms,
        "since_epoch": since_epoch or None,
    }


def _pair(told: Sequence[Any]) -> tuple[int, int]:
    one, other = told
    return int(one), int(other)


@dataclasses.dataclass(frozen=True, slots=True)
class Log:
    """What the brokers say about one partition.

    Attributes:
        begin: Its first offset.
        end: The offset after its last one.
        first: Offset and timestamp of its first record; None when there is none.
        count: How many partitions the topic has.
    """

    begin: int
    end: int
    first: First
    count: int

    def ended(self, commit: Commit) -> bool:
        """Return whether the commit is of a topic that has been deleted and created again."""
        return commit.offset > self.end or differ(commit.first, self.first)


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What the stores know about one partition, and what the brokers were asked for it.

    Attributes:
        epoch: Of the fences from now on.
        moved: As in `partition.Start`.
        replay_span_ms: Longer windows are seeded.
        found: The first offset whose record's time is at or after `replay_from_ms`; None where
            there is none.
        stored: Whether the database has anything of this log to seed from.
        imported_until_ms: As in `partition.Start`.
        now_ms: Wall clock.
    """

    epoch: int
    moved: partition.Moved | None
    replay_span_ms: int
    found: int | None
    stored: bool
    imported_until_ms: int | None
    now_ms: int


def differ(before: First, now: First) -> bool:
    """Return whether a log is another one: the first record of one log only moves forward."""
    if before is None or now is None:
        return False
    return now[0] < before[0] or (now[0] == before[0] and now[1] != before[1])


def replay_from_ms(commit: Commit | None, spans: window.Spans, replay_span_ms: int) -> int | None:
    """Return the record time before which no record can matter to a window that is replayed.

    None where the log is read from its start: nothing says how far the windows reach.
    """
    if commit is None or commit.frontier_ms is None:
        return None
    reach_ms = min(spans.longest_ms, replay_span_ms)
    return max(0, commit.frontier_ms - reach_ms - spans.slack_ms - spans.max_future_skew_ms)


def plan_start(
    log: Log, commit: Commit | None, spans: window.Spans, facts: Facts
) -> partition.Start:
    """Return where to start; never after an offset that can matter to a window at the commit.

    A window that the log alone cannot fill is seeded; `known_from_ms` casts doubt on one that
    nothing can fill.
    """
    frontier_ms = commit.frontier_ms if commit else None
    committed = commit.offset if commit else 0
    if commit is None or frontier_ms is None:
        begin = log.begin
    else:
        found = commit.offset if facts.found is None else facts.found
        begin = max(log.begin, min(commit.offset, found))
    late = begin == log.begin
    # A gap right before it shows only if reading begins at a record that still exists.
    begin = max(log.begin, begin - _LOOK_BACK)
    seeds = frontier_ms is not None and spans.longest_ms > facts.replay_span_ms
    # A database that was lost has nothing to seed from.
    lost = seeds and bool(frontier_ms) and not facts.stored
    # What lies before the log's first record may be missing, unless the store still has it.
    gap = lost or (late and not (seeds and committed >= log.begin))
    # Remembered, because the store never had what was missing at the first reading.
    known_from_ms, floor_ms = commit.known_from_ms if commit else 0, None
    # Until a record gives a bound; lost records may be ahead of the clock by the skew.
    emptied_ms = max(facts.now_ms + spans.max_future_skew_ms, known_from_ms or 0)
    if known_from_ms is None:
        known_from_ms = emptied_ms
    if gap and begin > 0:
        floor_ms = known_from_ms if log.end > log.begin else None
        known_from_ms = emptied_ms
    return partition.Start(
        epoch=facts.epoch,
        begin=begin,
        commit=max(begin, committed),
        count=log.count,
        known_from_ms=known_from_ms,
        moved=facts.moved,
        since_epoch=(commit and commit.since_epoch) or facts.epoch,
        seeded_until_ms=frontier_ms if seeds else None,
        imported_until_ms=facts.imported_until_ms,
        committed_ms=frontier_ms,
        floor_ms=floor_ms,
    )


def lacks_rows(start: partition.Start, commit: Commit | None, spans: window.Spans) -> bool:
    """Return whether the online store cannot have the rows of all whose windows are not empty.

    Those who have not paid since the epoch rose have no row of it yet, and those whose payments
    were only imported have none at all.
    """
    frontier_ms = (commit and commit.frontier_ms) or 0
    risen = bool(start.seeded_until_ms is not None and commit and commit.epoch != start.epoch)
    imported = start.imported_until_ms
    return risen or (imported is not None and imported > frontier_ms - spans.keep_ms)
