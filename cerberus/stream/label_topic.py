"""Labels from topic `labels` to Postgres: poll, store, commit, in that order.

A label that is read twice is known the second time, so a crash or a rebalance at any point loses
nothing and changes nothing; no state is kept between two polls.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import aiokafka
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError

from cerberus import clock, errors, kafka, labels, publishing, settings, supervision
from cerberus.postgres import stores
from cerberus.stream import dead_letters, header_names, topic_settings
from cerberus.telemetry import logs

log = logging.getLogger(__name__)

_POLL_MS, _POLL_RECORDS, _CHUNK_RECORDS = 500, 1000, 100
_START_S, _RETRY_S = 60.0, 2.0


class LabelConsumer:
    """The task `labels`: one member of a group of its own.

    Args:
        config: Settings.
        postgres: Takes the labels.
        clock: The wall clock in ms since the Unix epoch.

    Attributes:
        problem: What keeps labels waiting; None while they flow.
        lost: Which labels the topic lost before they were read; None when it lost none.
    """

    def __init__(
        self,
        config: settings.Settings,
        postgres: stores.Stores,
        clock: clock.Clock = clock.now_ms,
    ) -> None:
        self._config = config
        self._postgres = postgres
        self._clock = clock
        self._topic = config.kafka.topic(kafka.LABELS)
        self._dead_letters = config.kafka.topic(kafka.LABEL_DEAD_LETTERS)
        self._publisher = publishing.Publisher(config)
        self._said = logs.Repeated(log)
        self._settings = topic_settings.TopicSettings(
            config, kafka.LABELS, kafka.LABEL_DEAD_LETTERS
        )
        self.problem: str | None = None
        self.lost: str | None = None

    @property
    def advice(self) -> str | None:
        """What is wrong with the topic's settings."""
        return self._settings.advice or self._settings.advice_on_letters

    async def run(self, progress: supervision.Progress) -> None:
        """Store labels until asked to stop; after a fault, continue from the last commit."""
        try:
            await self._insist(progress)
        finally:
            await self._settings.stop()

    async def _insist(self, progress: supervision.Progress) -> None:
        while not progress.stopping.is_set():
            try:
                await self._postgres.schema.migrate()
                await kafka.create_topics(self._config)
                await self._consume(progress)
            except (TimeoutError, KafkaError, errors.StoreUnavailable) as error:
                self.problem = f"{type(error).__name__}: {error}"
                self._said.warn(f"labels are waiting: {self.problem}", "labels_wait")
                progress.lagging(False)
                await progress.wait(_RETRY_S)

    async def _consume(self, progress: supervision.Progress) -> None:
        header_names.tolerate()
        client = kafka.consumer(self._config, kafka.LABEL_GROUP)
        client.subscribe([self._topic])
        try:
            async with asyncio.timeout(_START_S):
                await client.start()
            progress.lagging(True)  # each turn is short, whether or not there is work
            while not progress.stopping.is_set():
                self._settings.look()
                polled = await self._poll(client)
                records = [record for some in polled.values() for record in some]
                await self._store(records, dict(client.fetches.reasons(records)))
                await self._commit(client, {tp: r[-1].offset + 1 for tp, r in polled.items()})
                self.problem = None
                progress.beat()
        finally:
            await kafka.stop(client)
            await self._publisher.close()

    async def _poll(
        self, client: Any
    ) -> Mapping[aiokafka.TopicPartition, Sequence[aiokafka.ConsumerRecord]]:
        """Return the next records, and note those that were removed before they were read."""
        polled: Mapping[Any, Sequence[aiokafka.ConsumerRecord]] = {}
        wanted: Mapping[aiokafka.TopicPartition, int | None] = {}
        try:
            polled = await client.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except NoOffsetForPartitionError as error:
            wanted = dict.fromkeys(error.args)
        except OffsetOutOfRangeError as error:
            [wanted] = error.args
        begins = await client.beginning_offsets(list(wanted)) if wanted else {}
        for tp in begins.keys() & client.assignment():
            client.seek(tp, begins[tp])
            if (before := wanted[tp]) is not None:
                self._lose(tp.partition, before, begins[tp])
        for hole in client.fetches.holes():
            self._lose(hole.partition, hole.begin, hole.end)
        return polled

    def _lose(self, number: int, begin: int, end: int) -> None:
        if begin < end:
            self.lost = (
                f"topic {self._topic} lost records of partition {number} between offsets {begin} "
                f"and {end} before they were read: send those labels again; set "
                "cleanup.policy=delete and a longer retention.ms"
            )
            log.warning("%s", self.lost, extra={"action": "labels_lost"})

    async def _store(
        self, records: Sequence[aiokafka.ConsumerRecord], unread: Mapping[int, str]
    ) -> None:
        told: list[tuple[aiokafka.ConsumerRecord, labels.Label]] = []
        dead: list[publishing.Message] = []
        latest_ms = self._clock() + self._config.windows.max_future_skew_ms
        for at, record in enumerate(records):
            if at % _CHUNK_RECORDS == 0:
                await asyncio.sleep(0)  # others on the loop wait for a chunk, not for a poll
            try:
                if at in unread:
                    raise errors.InvalidInput(*unread[at].split(": ", 1))
                told.append((record, labels.decode(record.value, latest_ms)))
            except errors.InvalidInput as error:
                dead.append(dead_letters.pack(self._dead_letters, record, str(error)))
        written = await self._postgres.labels.write([label for _, label in told], self._clock())
        for (record, _), became in zip(told, written, strict=True):
            if isinstance(became, errors.InvalidInput):
                dead.append(dead_letters.pack(self._dead_letters, record, str(became)))
        await self._publisher.publish(dead)
        self._postgres.labels.counts["invalid"] += len(dead)

    async def _commit(self, client: Any, stored: dict[aiokafka.TopicPartition, int]) -> None:
        due = {tp: offset for tp, offset in stored.items() if tp in client.assignment()}
        if due:
            await kafka.commit(client, due, "label_commit_failed")
