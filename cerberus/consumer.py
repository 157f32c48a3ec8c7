"""From the log to the stores: poll, observe, store, commit, in that order.

The log is the state. On assignment a partition's windows are replayed without effects up to the
group's commit; then every effect is stored before the next commit. Delivery is at least once,
effects are idempotent, so a crash or a rebalance at any point leads to the same values.
"""

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import aiokafka
from aiokafka.errors import KafkaConnectionError, KafkaError, OffsetOutOfRangeError

from cerberus import errors, judging, kafka, partition, supervision, transactions
from cerberus.features import fences
from cerberus.stream import (
    assignment,
    dependencies,
    header_names,
    liveness,
    ownership,
    problems,
    removals,
    sink,
    upstream,
)

log = logging.getLogger(__name__)

_POLL_MS, _POLL_RECORDS, _CHUNK_RECORDS = 200, 1000, 100
_RETRY_MS, _PAUSE_S = 500, 1.0


class Consumer:
    """The windowing task: one group member that owns some partitions.

    Args:
        given: Settings, stores and model.

    Attributes:
        problems: What is wrong now, a sentence each, by name.
        counts: Records since the start, by what became of them.
    """

    def __init__(self, given: dependencies.Dependencies) -> None:
        config, spans = given.config, given.spans
        self._config = config
        self._spans = spans
        self._online = given.online
        self._postgres = given.postgres
        self._sink = sink.Sink(given)
        self._resolver = assignment.Resolver(given)
        self._liveness = liveness.Liveness(given, self._sink, self._resolver)
        self._removals = removals.Removals(given)
        self._topic = config.kafka.topic(kafka.TRANSACTIONS)
        self._client: Any = None
        self._generation = 0
        self._fresh: set[aiokafka.TopicPartition] = set()
        self._parts: dict[aiokafka.TopicPartition, ownership.Owned] = {}
        self._parked: dict[aiokafka.TopicPartition, ownership.Owned] = {}
        self._committed: dict[aiokafka.TopicPartition, int] = {}
        self._upstream = upstream.Upstream(config.stream.max_rejected_share, spans.longest_ms)
        self.problems = problems.Problems(log)
        self.counts: collections.Counter[str] = collections.Counter()

    def states(self) -> Mapping[int, fences.PartitionState]:
        """Return the state of each owned partition."""
        return liveness.states(self._parts)

    def lag(self) -> Mapping[int, int]:
        """Return how many offsets each owned partition was behind when that was last asked."""
        return self._liveness.lag(self._parts)

    def remaining_s(self) -> Mapping[int, float]:
        """Estimate how long each replay will still take, s, from its speed so far."""
        return self._liveness.remaining_s(self._parts)

    async def run(self, progress: supervision.Progress) -> None:
        """Consume until asked to stop; each call builds a new client."""
        for held in (self._parts, self._parked, self._fresh, self._committed):
            held.clear()
        self._upstream.forget()
        self.problems.tell("schema", None)
        try:
            if not await self._connect(progress):
                return
            while not progress.stopping.is_set():
                await self._turn(progress)
        finally:
            await self._liveness.stop()
            await self._removals.settings.stop()
            if self._client is not None:
                await kafka.stop(self._client)
            await self._sink.close()

    async def _connect(self, progress: supervision.Progress) -> bool:
        """Join the group, however long the brokers are down; return False when asked to stop."""
        header_names.tolerate()
        while not progress.stopping.is_set():
            self._client = kafka.consumer(self._config)
            self._client.subscribe([self._topic], listener=_Listener(self))
            try:
                await self._postgres.schema.migrate()
                await kafka.create_topics(self._config)
                async with asyncio.timeout(60):
                    await self._client.start()
                await self._advise()
            except (TimeoutError, KafkaConnectionError, errors.StoreUnavailable) as error:
                self.problems.tell("start", f"cannot start consuming: {error}")
                await kafka.stop(self._client)
                await progress.wait(_PAUSE_S)
            else:
                self.problems.tell("start", None)
                return True
        return False

    async def _advise(self) -> None:
        await self._removals.settings.ask()
        self.problems.tell_all(self._removals.problems({}, {}))
        self.problems.tell_all({"eviction": await self._online.advise_policy()})

    async def _turn(self, progress: supervision.Progress) -> None:
        generation = self._generation
        if ended := self._liveness.ended & self._parts.keys():
            log.warning("the topic was created again", extra={"action": "topic_ended"})
            self._hold(ended)
        self._liveness.ended.clear()
        if "schema" in self.problems and not await self._resumed(progress):
            await self._poll(_POLL_MS)
            progress.beat()
            return
        if self._fresh:
            await self._resolve(generation, progress)
        polled = await self._poll(_POLL_MS)
        batch = await self._observe(polled, generation, progress)
        if batch is None:
            return
        if broken := self._upstream.breaks_schema(batch):
            self.problems.tell("schema", broken)
            self._hold(self._client.assignment())
            return
        touched = [
            owned
            for owned in self._parts.values()
            if owned.part.touched and not owned.part.replaying
        ]

        async def store() -> None:
            await self._sink.store(batch, touched, progress.beat)

        if await self._insist(store, generation, progress):
            self._sink.tell(self.counts, self.problems)
            await self._commit(generation)
            if polled:
                progress.beat()
            await self._tell(generation, progress, now=bool(batch.observed))

    async def _resumed(self, progress: supervision.Progress) -> bool:
        """Return whether `cerberus resume` was run since consuming stopped; ask each second."""
        await progress.wait(_PAUSE_S)
        try:
            resumed = await self._postgres.lives.resumed(self._topic)
        except supervision.AWAY as error:
            self.problems.tell("resume", f"cannot see whether consuming was resumed: {error}")
            return False
        self.problems.tell("resume", None)
        if not self._upstream.goes_on(resumed):
            return False
        log.warning(
            "consuming continues: resume %d was run", resumed.number, extra={"action": "resumed"}
        )
        self._upstream.forget()
        del self.problems["schema"]
        return True

    async def _poll(self, timeout_ms: int) -> Mapping[Any, Sequence[aiokafka.ConsumerRecord]]:
        try:
            polled: Mapping[Any, Sequence[aiokafka.ConsumerRecord]] = await self._client.getmany(
                timeout_ms=timeout_ms, max_records=_POLL_RECORDS
            )
        except OffsetOutOfRangeError as error:
            self._hold(set(error.args[0]) & self._client.assignment())
            return {}
        return polled

    async def _resolve(self, generation: int, progress: supervision.Progress) -> None:
        """Find where each new partition starts, seek there and resume it."""
        fresh = set(self._fresh)
        try:
            resolved = await self._resolver.resolve(self._client, fresh, self._parked)
            told = await self._online.states()
            resumed = await self._postgres.lives.resumed(self._topic)
        except (TimeoutError, KafkaError, *supervision.AWAY) as error:
            self.problems.tell("resolve", f"cannot find where to start: {error!r}")
            progress.beat()
            await progress.wait(_PAUSE_S)
            return
        if generation != self._generation:
            return
        self.problems.tell("resolve", None)
        self._liveness.succeed(resolved, told)
        self._upstream.excuse((owned.part for owned in resolved.owned.values()), resumed)
        for tp, owned in resolved.owned.items():
            self._parts[tp], part = owned, owned.part
            self._client.seek(tp, part.offset)
            log.info(
                "partition %d: epoch %d, reads from %d, silent below %d",
                part.number,
                part.epoch,
                part.offset,
                part.commit,
                extra={"action": "partition_assigned"},
            )
        self._parked.clear()
        self._removals.settings.look(now=True)
        self._client.resume(*fresh)
        self._fresh -= fresh

    async def _observe(
        self,
        polled: Mapping[Any, Sequence[aiokafka.ConsumerRecord]],
        generation: int,
        progress: supervision.Progress,
    ) -> sink.Batch | None:
        """Apply records to the windows; return None when their partitions are no longer ours."""
        batch = sink.Batch()
        self._removals.miss(self._client.fetches.holes(), self._parts)
        for tp, records in polled.items():
            if (owned := self._parts.get(tp)) is None:
                continue  # held in the meantime: `_resolve` seeks to its start
            self._resolver.begins(tp, owned.part, records[0])
            for at in range(0, len(records), _CHUNK_RECORDS):
                chunk = records[at : at + _CHUNK_RECORDS]
                await asyncio.sleep(0)  # others on the loop wait for a chunk, not for a poll
                verdicts = [judging.judge(r, self._config.currency, self._spans) for r in chunk]
                for place, reason in self._client.fetches.reasons(chunk):
                    verdicts[place] = judging.Rejected(chunk[place].offset, reason)
                if not await self._seed(owned, verdicts, generation, progress):
                    return None
                if generation != self._generation:
                    return None
                for record, verdict in zip(chunk, verdicts, strict=True):
                    self._take(owned.part, record, verdict, batch)
        for tp, owned in self._parts.items():
            # It also passes transaction markers, which are not records.
            position = await self._client.position(tp)
            if generation != self._generation:
                return None
            owned.part.skip_to(position)
        return batch

    def _take(
        self,
        part: partition.Partition,
        record: aiokafka.ConsumerRecord,
        verdict: transactions.Transaction | judging.Rejected,
        batch: sink.Batch,
    ) -> None:
        seen = part.take(record, verdict)
        if seen is None:
            self.counts["replayed"] += 1
        elif isinstance(seen, judging.Rejected):
            batch.rejected.append(sink.Refused(record, seen.reason, len(batch.observed)))
            self.counts["rejected"] += 1
        else:
            batch.observed.append((part.number, seen))
            batch.records.append(record)
            self.counts[seen.outcome.value] += 1
            if not part.at_home(seen.transaction.user_id):
                self.counts["split_user"] += 1
                self.problems.tell("split_user", self._upstream.split())

    async def _seed(
        self,
        owned: ownership.Owned,
        verdicts: Sequence[transactions.Transaction | judging.Rejected],
        generation: int,
        progress: supervision.Progress,
    ) -> bool:
        """Fetch users' events from before the replay; return False when no longer ours."""
        part = owned.part
        if not part.seeds:
            return True
        valid = [v for v in verdicts if isinstance(v, transactions.Transaction)]
        if valid and part.expect(valid[0].event_ms):
            owned.lost_rows()
        users = part.unseeded(v.user_id for v in valid)

        async def fetch() -> None:
            next_ms = valid[0].event_ms
            async for _ in assignment.seed(self._postgres, self._topic, part, next_ms, users):
                progress.beat()

        return not users or await self._insist(fetch, generation, progress)

    async def _insist(
        self,
        call: Callable[[], Awaitable[None]],
        generation: int,
        progress: supervision.Progress,
    ) -> bool:
        """Repeat a call until the stores acknowledge it; return False when no longer ours."""
        paused: set[aiokafka.TopicPartition] = set()
        while generation == self._generation:
            try:
                await call()
            except supervision.AWAY as error:
                self.problems.tell("store", f"a store is down, retrying: {error}")
            else:
                self.problems.tell("store", None)
                if generation == self._generation:
                    self._client.resume(*(paused - self._fresh))
                    return True
                break
            if progress.stopping.is_set():
                break
            # Keep polling, or the group takes the partitions away.
            paused |= self._client.assignment() - self._client.paused()
            self._client.pause(*paused)
            await self._poll(_RETRY_MS)
            progress.beat()
        return False

    async def _commit(self, generation: int) -> None:
        due = {
            tp: (owned.part.offset, self._resolver.metadata(tp, owned.part, self._online.spoken))
            for tp, owned in self._parts.items()
            if not owned.part.replaying
            and owned.part.offset != self._committed.get(tp)
            and tp not in self._liveness.ended
        }
        if not due:
            return
        taken = await kafka.commit(self._client, due, "commit_failed")
        if taken and generation == self._generation:
            for tp, (offset, _) in due.items():
                self._committed[tp] = self._parts[tp].part.commit = offset

    async def _tell(self, generation: int, progress: supervision.Progress, *, now: bool) -> None:
        """Write who is live; a failure to do so does not stop consuming."""
        if not self._liveness.look(self._client, self._parts, progress, now=now):
            return
        if not self._upstream.splits():
            self.problems.tell("split_user", None)
        self._removals.settings.look()
        self.problems.tell_all(self._removals.problems(self._parts, self._resolver.firsts))
        if generation != self._generation:
            return
        try:
            await self._liveness.tell(self._parts, progress.beat)
        except supervision.AWAY as error:
            self.problems.tell("liveness", f"cannot say who is live: {error}")
        else:
            self.problems.tell("liveness", None)

    def _hold(self, tps: Iterable[aiokafka.TopicPartition]) -> None:
        """Pause partitions until they are resolved again."""
        for tp in tps:
            self._parts.pop(tp, None)
            self._client.seek(tp, 0)
            self._client.pause(tp)
            self._fresh.add(tp)

    def assigned(self, tps: Iterable[aiokafka.TopicPartition]) -> None:
        """Pause new partitions until `run` has found where they start."""
        self._generation += 1
        self._fresh.clear()
        self._hold(tps)

    def revoked(self) -> None:
        """Set all state aside; it can be used again where its effects are stored."""
        self._generation += 1
        self._client.fetches.forget()
        self._parked |= self._parts
        for held in (self._parts, self._committed, self._fresh):
            held.clear()
        self._liveness.forget()


class _Listener(aiokafka.ConsumerRebalanceListener):  # type: ignore[misc]
    """aiokafka lets records flow at the first await in here, so nothing is awaited."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def on_partitions_assigned(self, assigned: set[aiokafka.TopicPartition]) -> None:
        self._consumer.assigned(assigned)

    def on_partitions_revoked(self, revoked: set[aiokafka.TopicPartition]) -> None:
        self._consumer.revoked()
