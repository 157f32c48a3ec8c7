"""Finds where a newly assigned partition starts to read, and where its effects begin."""

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, LeaderNotAvailableError

from cerberus import batches, judging, kafka, partition
from cerberus.postgres import facts, stores
from cerberus.stream import dependencies, ownership, starts

_CALL_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """An assignment, resolved: how many partitions the topic has, and those that are owned."""

    count: int
    owned: Mapping[TopicPartition, ownership.Owned]


class _Life(NamedTuple):
    """The epoch and the commit from which a partition continues; None: from the log's start."""

    epoch: int
    moved: partition.Moved | None
    commit: starts.Commit | None


class Resolver:
    """Finds the start of partitions from the group's commit and the log's extent.

    Args:
        given: Settings, stores and model.

    Attributes:
        firsts: Offset and timestamp of each log's first record.
    """

    def __init__(self, given: dependencies.Dependencies) -> None:
        self._clock = given.clock
        self._config = given.config
        self._spans = given.spans
        self._postgres = given.postgres
        self._topic = given.config.kafka.topic(kafka.TRANSACTIONS)
        self._cluster = ""
        self.firsts: dict[TopicPartition, starts.First] = {}

    def metadata(self, tp: TopicPartition, part: partition.Partition, version: int) -> str:
        """Return what to write beside the commit of a partition's present offset."""
        return starts.Commit(
            part.offset,
            part.windows.frontier_ms,
            part.moved,
            part.epoch,
            part.count,
            self.firsts.get(tp),
            part.known_from_ms,
            part.since_epoch,
        ).metadata(self._cluster, version)

    def ended(self, firsts: Mapping[TopicPartition, starts.First]) -> set[TopicPartition]:
        """Return the partitions whose log is not the one on which they were resolved.

        Args:
            firsts: Offset and timestamp of their first records now.
        """
        over = {tp for tp, first in firsts.items() if starts.differ(self.firsts.get(tp), first)}
        # Where retention has deleted the first record, the next one replaces it.
        self.firsts |= {tp: first for tp, first in firsts.items() if first and tp not in over}
        return over

    def begins(self, tp: TopicPartition, part: partition.Partition, record: judging.Record) -> None:
        """Take a record as the first one of a log that was empty when it was resolved.

        Only where reading began: an aborted record before it is found only by asking.
        """
        if self.firsts.get(tp) is None and record.offset == part.begin:
            self.firsts[tp] = record.offset, record.timestamp

    async def resolve(
        self,
        client: Any,
        tps: Collection[TopicPartition],
        parked: Mapping[TopicPartition, ownership.Owned],
    ) -> Resolved:
        """Resolve an assignment; `parked` is state from an earlier ownership.

        Deadline: 10 s a call, a handful of calls.

        Raises:
            StoreUnavailable: A store did not answer.
            TimeoutError, KafkaError: The brokers did not.
        """
        logs, commits, count = await self._ask(client, sorted(tps))
        epoch = await self._postgres.lives.epoch(self._cluster, self._topic, count)
        moved = max(
            self._moves(commits.values(), count),
            key=lambda move: (move.until_ms, move.former or 0),
            default=None,
        )
        owned = {}
        for tp, log in logs.items():
            life = _Life(epoch, moved, commits[tp])
            if life.commit is None or log.ended(life.commit):
                if await self._postgres.lives.has_rows(self._topic, epoch, tp.partition):
                    epoch = await self._postgres.lives.epoch(
                        self._cluster, self._topic, count, ended=epoch
                    )
                life = _Life(epoch, moved, None)
            elif life.commit.count == count:
                # Its rows stay valid even if other partitions have to begin again.
                life = _Life(life.commit.epoch, life.commit.moved, life.commit)
            kept = _kept(log, life, parked.get(tp))
            owned[tp] = kept or await self._fresh(client, tp, log, life)
        self.firsts |= {tp: log.first for tp, log in logs.items()}
        return Resolved(count, owned)

    async def _ask(
        self, client: Any, wanted: Sequence[TopicPartition]
    ) -> tuple[dict[TopicPartition, starts.Log], dict[TopicPartition, starts.Commit | None], int]:
        """Ask the brokers for the extent of logs, the group's commits and the partition count."""
        async with kafka.admin(self._config.kafka) as admin, asyncio.timeout(_CALL_S):
            self._cluster = await kafka.cluster_id(admin)
            count = await kafka.partition_count(admin, self._topic)
            commits = await self._commits(admin, wanted, count)
            begins = await client.beginning_offsets(wanted)
            ends = await client.end_offsets(wanted)
            firsts = await first_records(client, wanted)
        logs = {tp: starts.Log(begins[tp], ends[tp], firsts[tp], count) for tp in wanted}
        return logs, commits, count

    async def _commits(
        self, admin: Any, wanted: Iterable[TopicPartition], count: int
    ) -> dict[TopicPartition, starts.Commit | None]:
        """Return the group's commits of the wanted and all other partitions."""
        everyone = {*wanted, *(TopicPartition(self._topic, p) for p in range(count))}
        stored = await admin.list_consumer_group_offsets(
            self._config.kafka.topic(kafka.GROUP), partitions=sorted(everyone)
        )
        if missing := everyone - stored.keys():
            # A coordinator that is still loading returns nothing; that does not mean "no commit".
            raise KafkaError(f"the group's coordinator returns nothing about {sorted(missing)}")
        return {
            tp: starts.Commit.read(found.offset, found.metadata, self._cluster)
            if found.offset >= 0
            else None
            for tp, found in stored.items()
        }

    def _moves(
        self, commits: Iterable[starts.Commit | None], count: int
    ) -> Iterator[partition.Moved]:
        """Yield until when each commit's topic had another partition count, and that count."""
        now_ms = self._clock()
        for commit in commits:
            if commit is None or not commit.count:
                continue
            before = commit.moved
            if commit.count != count:
                # After two changes within a window, nothing tells who stayed.
                once = before is None or before.until_ms < now_ms - self._spans.keep_ms
                until_ms = now_ms + self._spans.max_future_skew_ms
                yield partition.Moved(until_ms, commit.count if once else None)
            elif before is not None:
                yield before

    async def _fresh(
        self, client: Any, tp: TopicPartition, log: starts.Log, life: "_Life"
    ) -> ownership.Owned:
        """Plan the start of a partition of which nothing is known here yet."""
        commit, replay_span_ms = life.commit, self._config.windows.replay_span_ms
        now_ms = self._clock()
        from_ms = starts.replay_from_ms(commit, self._spans, replay_span_ms)
        found = None if from_ms is None else await self._at_or_after(client, tp, from_ms)
        since_epoch = (commit and commit.since_epoch) or life.epoch
        stored = self._spans.longest_ms <= replay_span_ms or await self._postgres.lives.has_rows(
            self._topic, life.epoch, tp.partition, since_epoch=since_epoch
        )
        imported_until_ms = await self._postgres.lives.imported_until(
            self._topic, since_epoch, tp.partition, log.first[1] if log.first else now_ms
        )
        start = starts.plan_start(
            log,
            commit,
            self._spans,
            starts.Facts(
                epoch=life.epoch,
                moved=life.moved,
                replay_span_ms=replay_span_ms,
                found=found,
                stored=stored,
                imported_until_ms=imported_until_ms or None,
                now_ms=now_ms,
            ),
        )
        return ownership.Owned(
            partition.Partition(tp.partition, self._spans, start),
            rebuilding=commit is None,
            restoring=starts.lacks_rows(start, commit, self._spans),
        )

    async def _at_or_after(self, client: Any, tp: TopicPartition, from_ms: int) -> int | None:
        """Return the first offset whose record's time is at or after `from_ms`."""
        async with asyncio.timeout(_CALL_S):
            found = (await client.offsets_for_times({tp: from_ms}))[tp]
        return found and int(found.offset)


async def seed(
    postgres: stores.Stores,
    topic: str,
    part: partition.Partition,
    next_ms: int,
    user_ids: Collection[int] | None = None,
) -> AsyncGenerator[None, None]:
    """Apply to a partition the stored events that the log's replay does not reach.

    They come in pages, so that any number of them needs only the memory of the windows. The
    partition may read on between pages; users count as seeded after the last one. Repeating any
    part of it changes nothing. Deadline: 10 s a page.

    Args:
        postgres: Has the events.
        topic: Of the partition.
        part: The partition.
        next_ms: Event time of the next valid record.
        user_ids: Users whose events are applied; None: all.

    Yields:
        None, after each page.

    Raises:
        StoreUnavailable: Postgres did not answer; seed again.
    """
    met = set(user_ids or ())
    after_ms = sys.maxsize
    # Again if the first record was read in between and lies further back.
    while (reach_ms := part.seed_after_ms(next_ms)) < after_ms:
        after_ms = reach_ms
        if part.seeds_log:
            before = facts.Prefix(topic, part.number, part.origin, part.since_epoch)
            told = postgres.facts.seed(before, after_ms, user_ids)
            async with contextlib.aclosing(told):
                async for past in told:
                    part.seed((), past)
                    met.update(each.user_id for each in past)
                    yield
        if part.seeds_imported:
            told = postgres.facts.imported(after_ms, part.imported_until_ms or 0, user_ids)
            async with contextlib.aclosing(told):
                async for imported in told:
                    part.seed((), (), imported)
                    met.update(each.user_id for each in imported if part.at_home(each.user_id))
                    yield
    part.seed(met)


async def first_records(
    client: Any, tps: Collection[TopicPartition]
) -> dict[TopicPartition, starts.First]:
    """Ask for offset and timestamp of each log's first record.

    Not by time: to answer that, a broker decompresses a whole batch, and a huge one crashes it.

    Raises:
        KafkaError: The brokers do not answer.
    """
    begins = await client.beginning_offsets(tps) if tps else {}
    firsts = await asyncio.gather(*(_first(client, tp, at) for tp, at in begins.items()))
    return dict(zip(begins, firsts, strict=True))


async def _first(client: Any, tp: TopicPartition, begin: int) -> starts.First:
    while True:
        node_id = client._client.cluster.leader_for_partition(tp)
        if node_id is None or node_id < 0:
            raise LeaderNotAvailableError(tp)
        fetched = await client.fetches.peek(node_id, tp, begin)
        batch = next(batches.split(fetched), None)
        if batch is None:
            return None
        if batch.count:
            return batch.first if batch.whole(begin) else await batches.first_from(batch, begin)
        begin = batch.end  # all of it was removed


def _kept(log: starts.Log, life: _Life, owned: ownership.Owned | None) -> ownership.Owned | None:
    """Return state from an earlier ownership if all its effects are stored."""
    if owned is None or life.commit is None or owned.part.epoch != life.epoch:
        return None
    if not log.begin <= owned.part.offset <= life.commit.offset:
        return None
    owned.part.resume(life.commit.offset, life.commit.frontier_ms)
    return owned
