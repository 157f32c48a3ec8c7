"""What a batch of the log leaves behind: facts in Postgres, rows in Redis, records in Kafka.

All at once; the caller commits when all have acknowledged. Repeating a batch, or any part of it,
changes nothing: facts have identities, rows have fences, records have names.
"""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import aiokafka
import orjson
from aiokafka.errors import KafkaError

from cerberus import (
    errors,
    kafka,
    offline,
    online,
    partition,
    scoring,
    settings,
    transactions,
    window,
)

DOOR = "stream"
_ROWS = 500
_SEND_S = 15.0
_DEAD_LETTER_BYTES = 900_000


@dataclasses.dataclass(slots=True)
class Batch:
    """What one poll leaves to store; numbers are those of partitions.

    Attributes:
        observed: Valid transactions, in the log's order within a partition.
        rejected: Records for the dead-letter topic, with the reason.
    """

    observed: list[tuple[int, partition.Observed]] = dataclasses.field(default_factory=list)
    rejected: list[tuple[aiokafka.ConsumerRecord, str]] = dataclasses.field(default_factory=list)


class Sink:
    """Stores batches; every method raises when a store does not acknowledge, and may be repeated.

    Args:
        config: Settings.
        spans: The window definition.
        model: Decides.
        online_store: Takes the rows.
        offline_store: Takes the facts.
    """

    def __init__(
        self,
        config: settings.Settings,
        spans: window.Spans,
        model: scoring.Model,
        online_store: online.OnlineStore,
        offline_store: offline.OfflineStore,
    ) -> None:
        self._config = config
        self._spans = spans
        self._model = model
        self._online = online_store
        self._offline = offline_store
        self._topic = config.kafka.topic(kafka.TRANSACTIONS)
        self._producer: Any = None

    async def store(
        self, batch: Batch, parts: Iterable[partition.Partition], beat: Callable[[], None]
    ) -> None:
        """Store all effects of a batch.

        Raises:
            StoreUnavailable: Postgres or Kafka did not acknowledge.
            FeaturesUnavailable: Redis did not acknowledge.
        """
        accepted = [seen for _, seen in batch.observed if seen.row is not None]
        decisions = await self._decide(accepted)
        results = await asyncio.gather(
            self._write_touched(parts, beat),
            self._write_facts(batch, accepted, decisions),
            self._send(batch.rejected, decisions),
            return_exceptions=True,  # all have ended before the batch is tried again
        )
        for result in results:
            if result is not None:
                raise result

    async def _write_facts(
        self,
        batch: Batch,
        accepted: Sequence[partition.Observed],
        decisions: Sequence[offline.DecisionFact],
    ) -> None:
        if batch.observed:
            await self._offline.write(
                self._topic,
                [_fact(number, seen) for number, seen in batch.observed],
                [_stats(seen) for seen in accepted],
                decisions,
            )

    async def _write_touched(
        self, parts: Iterable[partition.Partition], beat: Callable[[], None]
    ) -> None:
        for part in parts:
            part.restoring |= await self.write_rows(part, part.touched, beat)
            part.touched.clear()

    async def write_rows(
        self, part: partition.Partition, user_ids: Iterable[int], beat: Callable[[], None]
    ) -> bool:
        """Write users' rows as of the partition's prefix; True when Redis has lost earlier ones.

        Raises:
            FeaturesUnavailable: Redis did not acknowledge.
        """
        users, lost = list(user_ids), False
        if strangers := part.strangers(users):
            await self._online.mark_split(strangers)
        rows = (
            online.StreamRow(user_id, packed, stats, part.fence, part.number)
            for user_id, packed, stats in part.rows(users)
        )
        while some := list(itertools.islice(rows, _ROWS)):
            lost |= (await self._online.write(some, part.trail)).lost
            beat()
        return lost

    async def close(self) -> None:
        """Stop the producer, within 5 s."""
        if self._producer is not None:
            await kafka.stop(self._producer)
            self._producer = None

    async def _decide(self, accepted: Sequence[partition.Observed]) -> list[offline.DecisionFact]:
        rows = [seen.row for seen in accepted if seen.row is not None]
        if not rows:
            return []
        now_ms = time.time_ns() // 1_000_000
        scores = await self._online.credit_scores(sorted({r.user_id for r in rows}), now_ms)
        decided = self._model.decide(
            [dataclasses.replace(r, credit_score=scores[r.user_id]) for r in rows]
        )
        return [
            offline.DecisionFact(
                decision_id=transactions.decision_id(
                    txn.user_id, txn.transaction_id, txn.event_ms, DOOR
                ),
                transaction_id=txn.transaction_id,
                door=DOOR,
                decision=decision,
            )
            for txn, decision in zip((s.transaction for s in accepted), decided, strict=True)
        ]

    async def _send(
        self,
        rejected: Sequence[tuple[aiokafka.ConsumerRecord, str]],
        decisions: Sequence[offline.DecisionFact],
    ) -> None:
        if not rejected and not decisions:
            return
        topic = self._config.kafka.topic(kafka.DECISIONS)
        try:
            async with asyncio.timeout(_SEND_S):
                if self._producer is None:
                    producer = kafka.producer(self._config)
                    await producer.start()
                    self._producer = producer
                sent = [
                    await self._producer.send(
                        topic,
                        orjson.dumps(fact.public(self._spans.names)),
                        key=transactions.key(fact.decision.row.user_id),
                    )
                    for fact in decisions
                ]
                sent += [await self._send_dead_letter(*refused) for refused in rejected]
                await asyncio.gather(*sent)
        except (TimeoutError, OSError, KafkaError) as error:
            # Or what it still holds would come between the records of the next attempt.
            await self.close()
            raise errors.StoreUnavailable(f"Kafka took no records: {error!r}") from error

    async def _send_dead_letter(self, record: aiokafka.ConsumerRecord, reason: str) -> Any:
        headers = [
            ("topic", record.topic.encode()),
            ("partition", b"%d" % record.partition),
            ("offset", b"%d" % record.offset),
            ("reason", reason.encode()),
        ]
        key, value = record.key, record.value
        if len(key or b"") + len(value or b"") > _DEAD_LETTER_BYTES:
            headers.append(("omitted", b"too long to be copied: read it where the headers say"))
            key = value = None
        if key is None and value is None:
            value = b""  # aiokafka sends no record without both
        topic = self._config.kafka.topic(kafka.DEAD_LETTERS)
        return await self._producer.send(topic, value, key=key, headers=headers)


def _fact(number: int, seen: partition.Observed) -> offline.TransactionFact:
    return offline.TransactionFact(
        transaction=seen.transaction,
        epoch=seen.fence.epoch,
        partition=number,
        log_offset=seen.fence.offset - 1,
    )


def _stats(seen: partition.Observed) -> offline.StatsFact:
    txn, row = seen.transaction, seen.row
    return offline.StatsFact(
        user_id=txn.user_id,
        event_us=txn.event_ms * 1000 + min(seen.rank, 999),
        stats=(row.stats if row else None) or (),
        fence=seen.fence,
    )
