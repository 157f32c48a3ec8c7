"""A synthetic population's transactions onto the log.

The record's key is the user. A transaction never carries its label: a fraud is reported on topic
`labels` later, as in real life. Until then Postgres keeps it.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from aiokafka.errors import KafkaError

from cerberus import clock, errors, kafka, labels, settings, supervision, synthetic, transactions
from cerberus.postgres import stores
from cerberus.telemetry import logs

log = logging.getLogger(__name__)

_TICK_S, _RETRY_S, _SEND_S = 0.05, 5.0, 30.0
_TELL_MS = 1_000
_MOST_A_TICK = 5_000


class _Record(NamedTuple):
    topic: str
    key: bytes
    value: bytes


class Producer:
    """The synthetic population's task: one across all instances, idle at rate 0.

    Args:
        config: Settings; `rate` is in transactions a second.
        postgres: Says which instance produces, and keeps labels until they are due.
        clock: The wall clock in ms since the Unix epoch.
    """

    def __init__(
        self,
        config: settings.Settings,
        postgres: stores.Stores,
        clock: clock.Clock = clock.now_ms,
    ) -> None:
        self._config = config
        self._clock = clock
        self._postgres = postgres
        self._told_ms = 0
        self._said = logs.Repeated(log)
        self.sent = 0

    async def run(self, progress: supervision.Progress) -> None:
        """Produce until asked to stop."""
        if self._config.rate == 0:
            log.info("idle: %s", self._config.rate_reason, extra={"action": "producer_idle"})
            await progress.stopping.wait()
        while not progress.stopping.is_set():
            try:
                await self._postgres.schema.migrate()
                await kafka.create_topics(self._config)
                async with self._postgres.locks.singleton("producer") as still_held:
                    if still_held is not None:
                        await self._produce(progress, still_held)
            except errors.StoreUnavailable as error:
                self._said.warn(f"waiting: {error}", "producer_waits")
            await progress.wait(_RETRY_S)

    async def _produce(self, progress: supervision.Progress, still_held: Any) -> None:
        config = self._config
        log.info(
            "%g transactions/s: %s",
            config.rate,
            config.rate_reason,
            extra={"action": "producer_starts"},
        )
        people = synthetic.Population(
            config.synthetic.users,
            config.synthetic.first_user_id,
            config.currency,
            config.synthetic.seed,
        )
        traffic = people.traffic(self._clock(), config.rate)
        ahead = next(traffic)
        async with _client(config) as client:
            while not progress.stopping.is_set():
                now_ms = self._clock()
                due: list[synthetic.Labelled] = []
                while ahead.transaction.event_ms <= now_ms and len(due) < _MOST_A_TICK:
                    due.append(ahead)
                    ahead = next(traffic)
                await self._send(client, due)
                await self._tell(client, now_ms)
                await still_held()
                progress.beat()
                wait_s = (ahead.transaction.event_ms - self._clock()) / 1000
                await progress.wait(min(1.0, max(_TICK_S, wait_s)))

    async def _send(self, client: Any, due: list[synthetic.Labelled]) -> None:
        config = self._config
        # Stored before the frauds are sent: a crash in between leaves a label without a
        # transaction, which is harmless, and never a fraud that would pass for genuine.
        if frauds := [labelled.transaction for labelled in due if labelled.fraud]:
            await self._postgres.labels.expect(
                [
                    synthetic.found_out(f, config.synthetic.seed, config.synthetic.label_delay_s)
                    for f in frauds
                ]
            )
        await _deliver(client, [_record(config, labelled.transaction) for labelled in due])
        self.sent += len(due)

    async def _tell(self, client: Any, now_ms: int) -> None:
        """Publish the labels that are due, then mark them; repeating it changes nothing."""
        if now_ms - self._told_ms < _TELL_MS:
            return
        self._told_ms = now_ms
        if due := await self._postgres.labels.due(now_ms):
            await _deliver(client, [_label(self._config, label) for label in due])
            await self._postgres.labels.published(due)


@contextlib.asynccontextmanager
async def _client(config: settings.Settings) -> AsyncIterator[Any]:
    client = kafka.producer(config)
    try:
        async with asyncio.timeout(_SEND_S):
            await client.start()
        yield client
    except (TimeoutError, OSError, KafkaError) as error:
        raise errors.StoreUnavailable(f"Kafka did not take all transactions: {error!r}") from error
    finally:
        await kafka.stop(client)


async def _deliver(client: Any, records: list[_Record]) -> None:
    async with asyncio.timeout(_SEND_S):
        sent = [await client.send(r.topic, r.value, key=r.key) for r in records]
        await asyncio.gather(*sent)


def _record(config: settings.Settings, transaction: transactions.Transaction) -> _Record:
    return _Record(
        config.kafka.topic(kafka.TRANSACTIONS),
        transactions.key(transaction.user_id),
        transactions.encode(transaction),
    )


def _label(config: settings.Settings, label: labels.Label) -> _Record:
    topic = config.kafka.topic(kafka.LABELS)
    return _Record(topic, labels.key(label), labels.encode(label))
