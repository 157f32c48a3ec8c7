"""Publish records to topics, and handle those that a topic refuses."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    MessageSizeTooLargeError,
    PolicyViolationError,
    RecordListTooLargeError,
    UnknownError,
)

from cerberus import errors, kafka, settings, transactions
from cerberus.decisions import records
from cerberus.telemetry import logs

_SENT_AT_ONCE = 10
# aiokafka has no name for a compacted topic's refusal of a record without a key.
_REFUSED = (
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    InvalidTimestampError,
    PolicyViolationError,
    UnknownError,
)
_said = logs.Repeated(logging.getLogger(__name__))


class Message(NamedTuple):
    """One record to be published."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()
    instead: "Message | None" = None
    """What is sent if the topic refuses it."""


class Publisher:
    """Publishes batches; one that failed must be published again as a whole.

    Args:
        config: Settings.
    """

    def __init__(self, config: settings.Settings) -> None:
        self._config = config
        self._producer: Any = None

    async def publish(self, messages: Iterable[Message]) -> list[tuple[Message, KafkaError]]:
        """Send messages in order and wait until all are acknowledged, at most 15 s.

        The event loop gets a turn after every ten. A message that a topic refuses, for instance
        because of its size, is sent again alone, and then its replacement is sent. A message
        without a replacement that is refused again is left out.

        Returns:
            The messages that were left out, with the reasons.

        Raises:
            StoreUnavailable: Not all were acknowledged.
        """
        left_out = []
        for message, error in await self._deliver(messages):
            # Another message in its batch may have been at fault.
            if not await self._deliver([message]):
                continue
            if message.instead is None:
                left_out.append((message, error))
                _said.warn(f"topic {message.topic} refuses a record: {error!r}", "record_refused")
            elif await self._deliver([message.instead]):
                raise errors.StoreUnavailable(f"topic {message.topic} refuses a dead letter")
        return left_out

    async def publish_all(self, messages: Iterable[Message]) -> None:
        """Publish messages; see `publish`.

        Raises:
            InvalidInput: A topic refuses one of them; others may have been sent.
            StoreUnavailable: Not all were acknowledged.
        """
        for message, error in await self.publish(messages):
            key = (message.key or b"").decode(errors="backslashreplace")
            raise errors.InvalidInput(
                f"record with key {key!r}", f"topic {message.topic} refuses it: {error}"
            )

    async def _deliver(self, messages: Iterable[Message]) -> list[tuple[Message, KafkaError]]:
        """Send messages and return those that their topic refuses."""
        sent: list[tuple[Message, asyncio.Future[Any]]] = []
        refused: list[tuple[Message, KafkaError]] = []
        try:
            async with asyncio.timeout(kafka.CALL_S):
                for number, message in enumerate(messages):
                    if number % _SENT_AT_ONCE == 0:
                        await asyncio.sleep(0)  # `send` itself waits only when its buffer is full
                    try:
                        sent.append((message, await self._send(message)))
                    except _REFUSED as error:
                        refused.append((message, error))
                await asyncio.gather(*(each for _, each in sent), return_exceptions=True)
            for message, acknowledged in sent:
                try:
                    acknowledged.result()
                except _REFUSED as error:
                    refused.append((message, error))
        except (TimeoutError, OSError, KafkaError) as error:
            # Otherwise its buffered records would mix with those of the next attempt.
            await self.close()
            raise errors.StoreUnavailable(f"Kafka took no records: {error!r}") from error
        return refused

    async def _send(self, message: Message) -> "asyncio.Future[Any]":
        if self._producer is None:
            client = kafka.producer(self._config)
            try:
                await client.start()
            except BaseException:
                await kafka.stop(client)
                raise
            self._producer = client
        acknowledged: asyncio.Future[Any] = await self._producer.send(
            message.topic,
            message.value,
            key=message.key,
            headers=message.headers,
        )
        return acknowledged

    async def close(self) -> None:
        """Stop the producer, within 5 s."""
        if self._producer is not None:
            await kafka.stop(self._producer)
            self._producer = None


def decision_message(config: settings.Settings, record: records.Record) -> Message:
    """Lay a record out for topic `decisions`, keyed by user."""
    return Message(
        config.kafka.topic(kafka.DECISIONS),
        transactions.key(record.decision.row.user_id),
        orjson.dumps(record.public()),
    )
