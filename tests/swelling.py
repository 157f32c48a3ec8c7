"""Batches that are small in the log and large in memory."""

import asyncio
import functools

import orjson
from aiokafka import AIOKafkaProducer

from cerberus import transactions

PAD_BYTES = 890_000


@functools.cache
def _pad(size):
    return "x" * size


def padded(document, size=PAD_BYTES):
    """Return the bytes of a JSON object with a long field that nobody reads."""
    return orjson.dumps(document | {"pad": _pad(size)})


async def publish_swelling(bootstrap, topic, partition, records, codec="zstd"):
    """Send (user id, value, timestamp ms) as one batch; return its first offset."""
    async with AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        compression_type=codec,
        max_batch_size=1 << 30,
        max_request_size=1 << 30,
    ) as client:
        batch = client.create_batch()
        for user, value, at in records:
            assert batch.append(key=transactions.key(user), value=value, timestamp=at)
        batch.close()
        sent = await client.send_batch(batch, topic, partition=partition)
        async with asyncio.timeout(60):
            return (await sent).offset
