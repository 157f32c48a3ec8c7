"""The effects of a batch of the log: facts in Postgres, rows in Redis, records in Kafka.

All are stored concurrently; the caller commits when all have been acknowledged. Repeating a batch,
or any part of it, changes nothing: facts have identities, rows have fences, records have names.
"""

import asyncio
import collections
import dataclasses
import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import aiokafka

from cerberus import kafka, partition, publishing, window
from cerberus.decisions import records
from cerberus.features import evaluation
from cerberus.online import user_rows
from cerberus.postgres import apart, facts
from cerberus.stream import dead_letters, dependencies, ownership, problems

_ROWS = 500
_TOLD_S = 600.0  # how long /health tells what a store refused


class Refused(NamedTuple):
    """A record for the dead-letter topic, the reason, and how many valid ones came before it."""

    record: aiokafka.ConsumerRecord
    reason: str
    after: int


@dataclasses.dataclass(slots=True)
class Batch:
    """What one poll has to store; the numbers are partitions.

    Attributes:
        observed: Valid transactions, in the log's order within a partition.
        records: Their records, in the same order.
        rejected: Records for the dead-letter topic.
    """

    observed: list[tuple[int, partition.Observed]] = dataclasses.field(default_factory=list)
    records: list[aiokafka.ConsumerRecord] = dataclasses.field(default_factory=list)
    rejected: list[Refused] = dataclasses.field(default_factory=list)


class Sink:
    """Stores batches; every method raises when a store does not acknowledge, and may be repeated.

    Args:
        given: Settings, stores and model.

    Attributes:
        otherwise: How many transactions had been decided with other content by a request.
        refused: How many records Postgres refused, and why the last one.
        unpublished: How many decisions and dead letters their topics refused.
    """

    def __init__(self, given: dependencies.Dependencies) -> None:
        self._config = given.config
        self._spans = given.spans
        self._model = given.model
        self._online = given.online
        self._postgres = given.postgres
        self._topic = given.config.kafka.topic(kafka.TRANSACTIONS)
        self._claims = given.claims
        self._clock = given.clock
        self._publisher = publishing.Publisher(given.config)
        self._kept = False
        self.otherwise = 0
        self.refused: tuple[int, str] = (0, "")
        self.unpublished = 0
        self._refused_s = 0.0

    def tell(self, counts: collections.Counter[str], found: problems.Problems) -> None:
        """Report conflicting decisions, and what stores and topics have refused."""
        for name, count in (
            ("decided_otherwise", self.otherwise),
            ("unpublished", self.unpublished),
        ):
            if count:
                counts[name] = count
        count, why = self.refused
        if count > counts["refused"]:
            counts["refused"] = count
            found.tell(
                "refused",
                f"{count} records became dead letters because of their data, the last one because "
                f"{why}; their decisions are not stored",
            )
            self._refused_s = time.monotonic()
        elif time.monotonic() - self._refused_s > _TOLD_S:
            found.tell("refused", None)

    async def store(
        self, batch: Batch, owned: Iterable[ownership.Owned], beat: Callable[[], None]
    ) -> None:
        """Store all effects of a batch.

        Raises:
            StoreUnavailable: Postgres or Kafka did not acknowledge.
            FeaturesUnavailable: Redis did not acknowledge.
        """
        accepted = [pair for pair in batch.observed if pair[1].row is not None]
        decided = await self._decide(accepted)
        results = await asyncio.gather(
            self._write_touched(owned, beat),
            self._keep(batch, accepted, decided, beat),
            return_exceptions=True,  # all must end before the batch is tried again
        )
        for result in results:
            if result is not None:
                raise result
        self.otherwise += sum(
            record.differing(seen.transaction) is not None
            for record, (_, seen) in zip(decided, accepted, strict=True)
        )

    async def _keep(
        self,
        batch: Batch,
        accepted: Sequence[tuple[int, partition.Observed]],
        decided: Sequence[records.Record],
        beat: Callable[[], None],
    ) -> None:
        """Write Postgres first, so that it has every decision that the topic shows.

        A record that Postgres refuses becomes a dead letter, without a fact or a stored decision.
        The windows still count it, in a replay too: they are a function of the log alone.
        """
        made = {id(seen): record for (_, seen), record in zip(accepted, decided, strict=True)}
        refused = await self._write_facts(batch, made, beat)
        for at in refused:
            made.pop(id(batch.observed[at][1]), None)
        dead = [Refused(batch.records[at], why, at) for at, why in sorted(refused.items())]
        await self._publish([*batch.rejected, *dead], list(made.values()))
        if refused:
            self.refused = self.refused[0] + len(refused), dead[-1].reason

    async def _write_facts(
        self, batch: Batch, made: Mapping[int, records.Record], beat: Callable[[], None]
    ) -> dict[int, str]:
        if not self._kept:
            await self._postgres.ledger.register(self._model)
            self._kept = True

        async def write(some: Sequence[tuple[int, partition.Observed]]) -> None:
            beat()
            await self._postgres.facts.write(
                self._topic,
                [_fact(number, seen) for number, seen in some if _is_new(seen)],
                [_stats(seen) for _, seen in some if seen.row is not None],
                [made[id(seen)] for _, seen in some if seen.row is not None],
            )

        return await apart.write(write, batch.observed)

    async def _write_touched(
        self, owned: Iterable[ownership.Owned], beat: Callable[[], None]
    ) -> None:
        for each in owned:
            if await self.write_rows(each, each.part.touched, beat):
                each.lost_rows()
            each.part.touched.clear()

    async def write_rows(
        self, owned: ownership.Owned, user_ids: Iterable[int], beat: Callable[[], None]
    ) -> bool:
        """Write users' rows as of the partition's prefix; True when Redis has lost earlier ones.

        Raises:
            FeaturesUnavailable: Redis did not acknowledge.
        """
        part, users, lost = owned.part, list(user_ids), False
        if strangers := part.strangers(users):
            await self._online.mark_split(strangers)
        rows = (
            user_rows.StreamRow(user_id, packed, stats, part.fence, part.number)
            for user_id, packed, stats in part.rows(users)
        )
        while some := list(itertools.islice(rows, _ROWS)):
            lost |= await self._online.write(some, owned.trail)
            beat()
        return lost

    async def close(self) -> None:
        """Stop the producer, within 5 s."""
        await self._publisher.close()

    async def _decide(
        self, accepted: Sequence[tuple[int, partition.Observed]]
    ) -> list[records.Record]:
        """Return the one decision on each transaction; a request may have made it first."""
        now_ms = self._clock()
        paid = [seen.transaction for _, seen in accepted]
        old = [transaction for transaction in paid if self._claims.old(transaction, now_ms)]
        known = await self._claims.look_up(old)
        names = [records.of_transaction(transaction) for transaction in paid]
        new = [
            (name, number, seen)
            for name, (number, seen) in zip(names, accepted, strict=True)
            if name not in known
        ]
        taken = await self._take(new, now_ms)
        looked_up = {records.of_transaction(transaction) for transaction in old}
        settled = await self._claims.settle(taken, now_ms, looked_up)
        known |= {record.decision_id: record for record in settled}
        return [known[name] for name in names]

    async def _take(
        self, new: Sequence[tuple[uuid.UUID, int, partition.Observed]], now_ms: int
    ) -> list[records.Record]:
        rows = [seen.row for _, _, seen in new if seen.row is not None]
        if not rows:
            return []
        scores, loaded = await self._online.credit_scores(
            sorted({row.user_id for row in rows}), now_ms
        )
        lost = not loaded and await self._postgres.credit_scores.were_served()
        began_s = time.perf_counter()
        decided = self._model.decide(
            [
                dataclasses.replace(
                    row,
                    credit_score=scores[row.user_id],
                    degraded=row.degraded + (evaluation.Doubt.RESTORING,) * lost,
                )
                for row in rows
            ]
        )
        latency_ms = {"model": round((time.perf_counter() - began_s) * 1000, 3)}
        return [
            records.Record(
                decision_id=name,
                decision=decision,
                transaction=seen.transaction,
                door=records.STREAM,
                partition=number,
                decided_ms=now_ms,
                spans=self._spans.names,
                latency_ms=latency_ms,
            )
            for (name, number, seen), decision in zip(new, decided, strict=True)
        ]

    async def _publish(
        self,
        rejected: Sequence[Refused],
        decided: Sequence[records.Record],
    ) -> None:
        messages = [publishing.decision_message(self._config, record) for record in decided]
        topic = self._config.kafka.topic(kafka.DEAD_LETTERS)
        dead = [dead_letters.pack(topic, each.record, each.reason) for each in rejected]
        self.unpublished += len(await self._publisher.publish(messages + dead))


def _is_new(seen: partition.Observed) -> bool:
    """Return whether nothing is stored under this identity yet, in any life of the topic."""
    return seen.outcome not in (window.Outcome.DUPLICATE, window.Outcome.CONFLICT)


def _fact(number: int, seen: partition.Observed) -> facts.TransactionFact:
    return facts.TransactionFact(
        transaction=seen.transaction,
        epoch=seen.fence.epoch,
        partition=number,
        log_offset=seen.fence.offset - 1,
    )


def _stats(seen: partition.Observed) -> facts.StatsFact:
    txn, row = seen.transaction, seen.row
    return facts.StatsFact(
        user_id=txn.user_id,
        event_us=txn.event_ms * 1000 + min(seen.rank, 999),
        stats=(row.stats if row else None) or (),
        fence=seen.fence,
    )
