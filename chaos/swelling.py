"""Batches that are small in the log and large in memory."""

import asyncio
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer

Record = tuple[bytes, bytes, int]
PAD_BYTES = 890_000
TOO_LONG = 1 << 20
"""A record with a longer value becomes a dead letter that describes it."""


def padded(document: dict[str, Any], size: int = PAD_BYTES) -> bytes:
    """Pad a JSON object with a long field that nobody reads."""
    return json.dumps(document | {"pad": "x" * size}).encode()


def lean(record: Any) -> Any:
    """Return a record without its padding, or without a value that is too long."""
    size = len(record.value or b"")
    if size < PAD_BYTES:
        return record
    if size > TOO_LONG:
        return dataclasses.replace(record, value=None)
    document = json.loads(record.value)
    document.pop("pad", None)
    return dataclasses.replace(record, value=json.dumps(document).encode())


def _closed(client: AIOKafkaProducer, records: Sequence[Record]) -> Any:
    batch = client.create_batch()
    for key, value, at_ms in records:
        batch.append(key=key, value=value, timestamp=at_ms)
    batch.close()
    return batch


async def publish(
    bootstrap: str, topic: str, partition: int, batches: Iterable[Sequence[Record]]
) -> None:
    """Send some batches of (key, value, timestamp in ms), all at the same time."""
    async with AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        compression_type="zstd",
        max_batch_size=1 << 30,
        max_request_size=1 << 30,
    ) as client:
        # In a thread: it takes seconds, and requests are sent meanwhile.
        closed = await asyncio.to_thread(lambda: [_closed(client, some) for some in batches])
        async with asyncio.timeout(60):
            sent = [await client.send_batch(batch, topic, partition=partition) for batch in closed]
            await asyncio.gather(*sent)
