"""Transactions onto the log: a synthetic population's, or those of a file.

The record's key is the user and its timestamp the event time. Labels never ride in a transaction:
the truth about one goes to topic `labels`, later, as it does in life.
"""

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

import orjson
from aiokafka.errors import KafkaError

from cerberus import errors, kafka, offline, settings, supervision, synthetic, transactions

log = logging.getLogger(__name__)

LABEL_DELAY_MS = 60_000
_TICK_S, _RETRY_S, _SEND_S = 0.05, 5.0, 30.0
_MOST_A_TICK = 5_000


class _Record(NamedTuple):
    topic: str
    key: bytes
    value: bytes
    timestamp_ms: int


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Producer:
    """The synthetic population's task: one across all instances, idle at rate 0.

    Args:
        config: Settings; `rate` is in transactions a second.
        offline_store: Says which instance is the one.
    """

    def __init__(self, config: settings.Settings, offline_store: offline.OfflineStore) -> None:
        self._config = config
        self._offline = offline_store
        self._labels: collections.deque[tuple[int, synthetic.Labelled]] = collections.deque()
        self.sent = 0

    async def run(self, progress: supervision.Progress) -> None:
        """Produce until told to stop."""
        if self._config.rate == 0:
            log.info("idle: %s", self._config.rate_reason, extra={"action": "producer_idle"})
            await progress.stopping.wait()
        while not progress.stopping.is_set():
            try:
                await kafka.create_topics(self._config)
                async with self._offline.singleton("producer") as still_held:
                    if still_held is not None:
                        await self._produce(progress, still_held)
            except errors.StoreUnavailable as error:
                log.warning("waiting: %s", error, extra={"action": "producer_waits"})
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
            config.users, config.first_user_id, config.currency, config.seed
        )
        traffic = people.traffic(_now_ms(), config.rate)
        ahead = next(traffic)
        async with _client(config) as client:
            while not progress.stopping.is_set():
                now_ms = _now_ms()
                due: list[synthetic.Labelled] = []
                while ahead.transaction.event_ms <= now_ms and len(due) < _MOST_A_TICK:
                    due.append(ahead)
                    ahead = next(traffic)
                await self._send(client, due, now_ms)
                await still_held()
                progress.beat()
                wait_s = (ahead.transaction.event_ms - _now_ms()) / 1000
                await progress.wait(min(1.0, max(_TICK_S, wait_s)))

    async def _send(self, client: Any, due: list[synthetic.Labelled], now_ms: int) -> None:
        records = [_record(self._config, labelled.transaction) for labelled in due]
        self._labels.extend((now_ms + LABEL_DELAY_MS, labelled) for labelled in due)
        while self._labels and self._labels[0][0] <= now_ms:
            records.append(_label(self._config, self._labels.popleft()[1], now_ms))
        await _deliver(client, records)
        self.sent += len(due)


async def send(config: settings.Settings, lines: Iterable[bytes]) -> int:
    """Publish transactions, one JSON object a line, and return how many.

    All lines are read before the first is sent: a wrong one sends nothing.

    Raises:
        InvalidTransaction: naming the line and the field.
        StoreUnavailable: The brokers did not take them.
    """
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            transaction = transactions.decode(line, config.currency)
            ahead_ms = transaction.event_ms - _now_ms()
            if ahead_ms > config.max_future_skew_ms:
                raise errors.InvalidTransaction("timestamp", f"lies {ahead_ms} ms in the future")
        except errors.InvalidTransaction as error:
            raise errors.InvalidTransaction(
                f"line {number}: {error.field}", error.reason
            ) from error
        records.append(_record(config, transaction))
    await kafka.create_topics(config)
    async with _client(config) as client:
        for at in range(0, len(records), _MOST_A_TICK):
            await _deliver(client, records[at : at + _MOST_A_TICK])
    return len(records)


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
        sent = [
            await client.send(r.topic, r.value, key=r.key, timestamp_ms=r.timestamp_ms)
            for r in records
        ]
        await asyncio.gather(*sent)


def _record(config: settings.Settings, transaction: transactions.Transaction) -> _Record:
    return _Record(
        config.kafka.topic(kafka.TRANSACTIONS),
        transactions.key(transaction.user_id),
        transactions.encode(transaction),
        transaction.event_ms,
    )


def _label(config: settings.Settings, labelled: synthetic.Labelled, now_ms: int) -> _Record:
    transaction = labelled.transaction
    value = {
        "transaction_id": transaction.transaction_id,
        "user_id": transaction.user_id,
        "timestamp": transactions.format_ms(transaction.event_ms),
        "label": "fraud" if labelled.fraud else "legitimate",
        "labelled_at": transactions.format_ms(now_ms),
    }
    key = transactions.key(transaction.user_id)
    return _Record(config.kafka.topic(kafka.LABELS), key, orjson.dumps(value), now_ms)
