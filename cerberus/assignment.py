"""Where a newly assigned partition starts to read, and from where on it has effects."""

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from cerberus import kafka, offline, partition, settings, window

_CALL_S = 10.0
_VERSION = 1
First = tuple[int, int] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """An assignment, understood: `count` partitions has the topic, `parts` start as they are."""

    count: int
    parts: Mapping[TopicPartition, partition.Partition]


@dataclasses.dataclass(frozen=True, slots=True)
class Commit:
    """What the group's commit of a partition says; all but the offset stand in its metadata.

    Attributes:
        offset: Effects of records below it are stored.
        frontier_ms: Of that prefix; None when the metadata are not ours.
        moved: As in `partition.Partition`.
        epoch: Of the fences.
        count: How many partitions the topic had.
        first: Offset and timestamp of the log's first record then, which tell a topic from
            another that was made later under its name; None when there was no record.
        known_from_ms: As in `partition.Partition`.
        since_epoch: As in `partition.Partition`.
    """

    offset: int
    frontier_ms: int | None = None
    moved: tuple[int, int] = (0, 0)
    epoch: int = 0
    count: int = 0
    first: First = None
    known_from_ms: int = 0
    since_epoch: int = 0

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
        numbers = (self.frontier_ms, *self.moved, self.epoch, self.count)
        later = (*(self.first or (-1, -1)), self.known_from_ms, self.since_epoch)
        return " ".join(map(str, (cluster, *numbers, *later)))

    @classmethod
    def read(cls, offset: int, metadata: str, cluster: str) -> "Commit":
        """Read what `metadata` wrote in any version; fields that are not known are ignored.

        Of what another cluster, another hand or a later version wrote only the offset stands.
        """
        try:
            told = orjson.loads(metadata) if metadata.startswith("{") else _numbered(metadata)
            first = told["first"]
            mine = told["version"] in (0, _VERSION) and told["cluster"] == cluster
            commit = cls(
                offset=offset,
                frontier_ms=told["frontier_ms"],
                moved=_pair(told["moved"]),
                epoch=int(told["epoch"]),
                count=int(told["count"]),
                first=None if first is None else _pair(first),
                known_from_ms=int(told["known_from_ms"]),
                since_epoch=int(told["since_epoch"]),
            )
        except (KeyError, TypeError, ValueError):
            return cls(offset)
        return commit if mine else cls(offset)


def _numbered(metadata: str) -> dict[str, Any]:
    """Read version 0 of a commit's metadata."""
    cluster, *numbers = metadata.split()
    frontier_ms, until_ms, former, epoch, count, at, stamp_ms, known_from_ms, since_epoch = map(
        int, numbers
    )
    return {
        "version": 0,
        "cluster": cluster,
        "frontier_ms": frontier_ms,
        "moved": (until_ms, former),
        "epoch": epoch,
        "count": count,
        "first": (at, stamp_ms) if at >= 0 else None,
        "known_from_ms": known_from_ms,
        "since_epoch": since_epoch,
    }


def _pair(told: Sequence[Any]) -> tuple[int, int]:
    one, other = told
    return int(one), int(other)


@dataclasses.dataclass(frozen=True, slots=True)
class _Log:
    """What the brokers and the store say of one partition; offsets are exclusive ends."""

    tp: TopicPartition
    begin: int
    end: int
    first: First
    commit: Commit | None
    epoch: int
    count: int
    moved: tuple[int, int]


class Resolver:
    """Finds the start of partitions from the group's commit and the log's extent.

    Args:
        config: Settings.
        spans: The window definition.
        offline_store: Knows the epochs.
    """

    def __init__(
        self, config: settings.Settings, spans: window.Spans, offline_store: offline.OfflineStore
    ) -> None:
        self._config = config
        self._spans = spans
        self._offline = offline_store
        self._topic = config.kafka.topic(kafka.TRANSACTIONS)
        self._cluster = ""
        self._firsts: dict[TopicPartition, First] = {}

    def metadata(self, tp: TopicPartition, part: partition.Partition, version: int) -> str:
        """Return what to write beside the commit of a partition's present offset."""
        return Commit(
            part.offset,
            part.windows.frontier_ms,
            part.moved,
            part.epoch,
            part.count,
            self._firsts.get(tp),
            part.known_from_ms,
            part.since_epoch,
        ).metadata(self._cluster, version)

    def ended(self, firsts: Mapping[TopicPartition, First]) -> set[TopicPartition]:
        """Return the partitions whose log is another than when they were resolved.

        Args:
            firsts: Offset and timestamp of their first records now.
        """
        over = {tp for tp, first in firsts.items() if _differ(self._firsts.get(tp), first)}
        # Where retention has taken the first record away, the next one stands for it.
        self._firsts |= {tp: first for tp, first in firsts.items() if first and tp not in over}
        return over

    def begins(
        self, tp: TopicPartition, part: partition.Partition, record: partition.Record
    ) -> None:
        """Let a record stand for the first of a log that was empty when it was resolved.

        Only where reading began: what a writer took back before it is found by asking alone.
        """
        if self._firsts.get(tp) is None and record.offset == part.begin:
            self._firsts[tp] = record.offset, record.timestamp

    async def resolve(
        self,
        client: Any,
        tps: Collection[TopicPartition],
        parked: Mapping[TopicPartition, partition.Partition],
    ) -> Resolved:
        """Resolve an assignment; `parked` is state from an earlier ownership.

        Deadline: 10 s a call, a handful of calls.

        Raises:
            StoreUnavailable: A store did not answer.
            TimeoutError, KafkaError: The brokers did not.
        """
        wanted = sorted(tps)
        async with kafka.admin(self._config.kafka) as admin, asyncio.timeout(_CALL_S):
            self._cluster = await kafka.cluster_id(admin)
            count = await kafka.partition_count(admin, self._topic)
            commits = await self._commits(admin, wanted, count)
            begins = await client.beginning_offsets(wanted)
            ends = await client.end_offsets(wanted)
            firsts = await first_records(client, wanted)
        epoch = await self._offline.epoch(self._cluster, self._topic, count)
        moved = max(self._moved(commits.values(), count), default=(0, 0))
        parts = {}
        for tp in wanted:
            commit = commits[tp]
            log = _Log(tp, begins[tp], ends[tp], firsts[tp], commit, epoch, count, moved)
            if commit is None or _is_over(log, commit):
                if await self._offline.has_rows(self._topic, epoch, tp.partition):
                    epoch = await self._offline.epoch(
                        self._cluster, self._topic, count, ended=epoch
                    )
                log = dataclasses.replace(log, epoch=epoch, commit=None)
            elif commit.count == count:
                # Its rows stand, also where other partitions had to begin anew.
                log = dataclasses.replace(log, epoch=commit.epoch, moved=commit.moved)
            parts[tp] = _kept(log, parked.get(tp)) or await self._fresh(client, log)
        self._firsts |= firsts
        return Resolved(count, parts)

    async def _commits(
        self, admin: Any, wanted: Iterable[TopicPartition], count: int
    ) -> dict[TopicPartition, Commit | None]:
        """Return the group's commits of the wanted and all other partitions."""
        everyone = {*wanted, *(TopicPartition(self._topic, p) for p in range(count))}
        stored = await admin.list_consumer_group_offsets(
            self._config.kafka.topic(kafka.GROUP), partitions=sorted(everyone)
        )
        if missing := everyone - stored.keys():
            # A coordinator that still loads answers with nothing, which is not "no commit".
            raise KafkaError(f"the group's coordinator says nothing of {sorted(missing)}")
        return {
            tp: Commit.read(found.offset, found.metadata, self._cluster)
            if found.offset >= 0
            else None
            for tp, found in stored.items()
        }

    def _moved(self, commits: Iterable[Commit | None], count: int) -> Iterator[tuple[int, int]]:
        """Yield until when each commit's topic had another number of partitions, and which."""
        now_ms = time.time_ns() // 1_000_000
        for commit in commits:
            if commit is None or not commit.count:
                continue
            if commit.count == count:
                yield commit.moved
            else:
                # Of two changes within a window nothing tells who stayed.
                once = commit.moved[0] < now_ms - self._spans.keep_ms
                yield now_ms + self._spans.max_future_skew_ms, commit.count if once else 0

    async def _fresh(self, client: Any, log: _Log) -> partition.Partition:
        spans, commit, now_ms = self._spans, log.commit, time.time_ns() // 1_000_000
        frontier_ms = commit.frontier_ms if commit else None
        committed = commit.offset if commit else 0
        start = await self._start(client, log)
        seeds = frontier_ms is not None and spans.longest_ms > self._config.replay_span_ms
        since_epoch = (commit and commit.since_epoch) or log.epoch
        # A database that was lost has nothing to seed from.
        lost = (
            seeds
            and bool(frontier_ms)
            and not await self._offline.has_rows(
                self._topic, log.epoch, log.tp.partition, since_epoch=since_epoch
            )
        )
        # What lies before the log's first record may be missing, unless the store still has it.
        gap = lost or (start == log.begin and not (seeds and committed >= log.begin))
        # Remembered, because the store never had what was missing at the first reading.
        known_from_ms = commit.known_from_ms if commit else 0
        if (gap and start > 0) or known_from_ms < 0:
            known_from_ms = -1 if log.end > log.begin else max(now_ms, known_from_ms)
        imported_until_ms = await self._offline.imported_until(
            self._topic, since_epoch, log.tp.partition, log.first[1] if log.first else now_ms
        )
        part = partition.Partition(
            log.tp.partition,
            spans,
            log.epoch,
            start,
            max(start, committed),
            count=log.count,
            known_from_ms=known_from_ms,
            moved=log.moved,
            since_epoch=since_epoch,
            seeded_until_ms=(frontier_ms or 0) if seeds else 0,
            imported_until_ms=imported_until_ms,
            rebuilding=commit is None,
        )
        # Those who have not paid since have no row of this epoch yet.
        anew = seeds and commit is not None and commit.epoch != log.epoch
        part.restoring = anew or 0 < imported_until_ms > (frontier_ms or 0) - spans.keep_ms
        return part

    async def _start(self, client: Any, log: _Log) -> int:
        """Return the first offset that may matter to a window at the commit."""
        commit = log.commit
        if commit is None or commit.frontier_ms is None:
            return log.begin
        spans = self._spans
        reach_ms = min(spans.longest_ms, self._config.replay_span_ms)
        since_ms = commit.frontier_ms - reach_ms - spans.slack_ms - spans.max_future_skew_ms
        async with asyncio.timeout(_CALL_S):
            found = (await client.offsets_for_times({log.tp: max(0, since_ms)}))[log.tp]
        return max(log.begin, min(commit.offset, found.offset) if found else commit.offset)


async def seed(
    store: offline.OfflineStore,
    topic: str,
    part: partition.Partition,
    next_ms: int,
    user_ids: Collection[int] | None = None,
) -> AsyncGenerator[None, None]:
    """Let what the log's replay does not reach take effect on a partition; of all users when None.

    In pages, so that any amount of it costs the memory of the windows alone. The partition may go
    on reading between two: a user counts as seeded when the last one is in. Repeating any part of
    it changes nothing. Deadline: 10 s a page.

    Args:
        store: Knows it.
        topic: Of the partition.
        part: Whose windows.
        next_ms: Event time of the next valid record.
        user_ids: Whose events.

    Yields:
        After each page.

    Raises:
        StoreUnavailable: Postgres did not answer; seed again.
    """
    met = set(user_ids or ())
    after_ms = sys.maxsize
    # Once more where the first record was read in between, and lies further back.
    while (reach_ms := part.seed_after_ms(next_ms)) < after_ms:
        after_ms = reach_ms
        if part.seeds_log:
            told = store.seed(
                topic, part.origin, part.number, after_ms, user_ids, since_epoch=part.since_epoch
            )
            async with contextlib.aclosing(told):
                async for past in told:
                    part.seed((), past)
                    met.update(each.user_id for each in past)
                    yield
        if part.seeds_imported:
            told = store.imported(after_ms, part.imported_until_ms, user_ids)
            async with contextlib.aclosing(told):
                async for imported in told:
                    part.seed((), (), imported)
                    met.update(each.user_id for each in imported if part.at_home(each.user_id))
                    yield
    part.seed(met)


async def first_records(
    client: Any, tps: Collection[TopicPartition]
) -> dict[TopicPartition, First]:
    """Ask for offset and timestamp of each log's first record.

    Raises:
        KafkaError: The brokers do not answer.
    """
    found = await client.offsets_for_times(dict.fromkeys(tps, 0)) if tps else {}
    return {tp: (first.offset, first.timestamp) if first else None for tp, first in found.items()}


def _differ(before: First, now: First) -> bool:
    """Say whether a log is another than before: a first record only ever moves forward."""
    if before is None or now is None:
        return False
    return now[0] < before[0] or (now[0] == before[0] and now[1] != before[1])


def _is_over(log: _Log, commit: Commit) -> bool:
    """Say whether the commit is of a topic that was deleted and made again since."""
    return commit.offset > log.end or _differ(commit.first, log.first)


def _kept(log: _Log, part: partition.Partition | None) -> partition.Partition | None:
    """Return state from an earlier ownership if all its effects are stored."""
    if part is None or log.commit is None or part.epoch != log.epoch:
        return None
    if not log.begin <= part.offset <= log.commit.offset:
        return None
    part.begin, part.commit = part.offset, log.commit.offset
    return part
