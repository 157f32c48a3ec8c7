"""Where a newly assigned partition starts to read, and from where on it has effects."""

import asyncio
import dataclasses
import time
from collections.abc import Collection, Mapping
from typing import Any

from aiokafka import TopicPartition

from cerberus import kafka, offline, partition, settings, window

_CALL_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """An assignment, understood: `count` partitions has the topic, `parts` start as they are."""

    count: int
    parts: Mapping[TopicPartition, partition.Partition]


@dataclasses.dataclass(frozen=True, slots=True)
class _Log:
    """What the brokers and the store say of one partition; offsets are exclusive ends."""

    tp: TopicPartition
    begin: int
    end: int
    epoch: int
    commit: int | None
    frontier_ms: int | None


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
            cluster = await kafka.cluster_id(admin)
            count = await kafka.partition_count(admin, self._topic)
            commits = await admin.list_consumer_group_offsets(
                self._config.kafka.topic(kafka.GROUP), partitions=wanted
            )
            begins = await client.beginning_offsets(wanted)
            ends = await client.end_offsets(wanted)
        epoch = await self._offline.epoch(cluster, self._topic, count)
        parts = {}
        for tp in wanted:
            stored = commits.get(tp)
            known = stored is not None and stored.offset >= 0
            log = _Log(
                tp=tp,
                begin=begins[tp],
                end=ends[tp],
                epoch=epoch,
                commit=stored.offset if known else None,
                frontier_ms=_frontier(stored.metadata) if known else None,
            )
            if await self._is_another_life(log):
                epoch = await self._offline.epoch(cluster, self._topic, count, ended=epoch)
                log = dataclasses.replace(log, epoch=epoch, commit=None, frontier_ms=None)
            parts[tp] = _kept(log, parked.get(tp)) or await self._fresh(client, log)
        return Resolved(count, parts)

    async def _is_another_life(self, log: _Log) -> bool:
        """Say whether the topic was deleted and made again: old fences would refuse every row."""
        if log.commit is None:
            return await self._offline.has_rows(self._topic, log.epoch, log.tp.partition)
        return log.commit > log.end

    async def _fresh(self, client: Any, log: _Log) -> partition.Partition:
        spans = self._spans
        start = await self._start(client, log)
        seeds = log.frontier_ms is not None and spans.longest_ms > self._config.replay_span_ms
        # What lies before the log's first record may be missing, unless the store still has it.
        gap = start == log.begin > 0 and not (seeds and (log.commit or 0) >= log.begin)
        known_from_ms = 0
        if gap:
            known_from_ms = -1 if log.end > log.begin else time.time_ns() // 1_000_000
        return partition.Partition(
            log.tp.partition,
            spans,
            log.epoch,
            start,
            max(start, log.commit or 0),
            known_from_ms=known_from_ms,
            seeded_until_ms=(log.frontier_ms or 0) if seeds else 0,
            rebuilding=log.commit is None,
        )

    async def _start(self, client: Any, log: _Log) -> int:
        """Return the first offset that may matter to a window at the commit."""
        if log.commit is None or log.frontier_ms is None:
            return log.begin
        spans = self._spans
        reach_ms = min(spans.longest_ms, self._config.replay_span_ms)
        since_ms = log.frontier_ms - reach_ms - spans.slack_ms - spans.max_future_skew_ms
        async with asyncio.timeout(_CALL_S):
            found = (await client.offsets_for_times({log.tp: max(0, since_ms)}))[log.tp]
        return max(log.begin, min(log.commit, found.offset) if found else log.commit)


def _kept(log: _Log, part: partition.Partition | None) -> partition.Partition | None:
    """Return state from an earlier ownership if all its effects are stored."""
    if part is None or log.commit is None or part.epoch != log.epoch:
        return None
    if not log.begin <= part.offset <= log.commit:
        return None
    part.begin, part.commit = part.offset, log.commit
    return part


def _frontier(metadata: str) -> int | None:
    return int(metadata) if metadata.isdigit() else None
