"""A header whose name is not UTF-8 stops no consumer: its record is read like any other."""

import itertools
import os
import subprocess
import sys

import pytest
from aiokafka.record import default_records
from pipeline import now_ms, payment, running, until, world

from cerberus import kafka, labels
from cerberus.stream import dead_letters, header_names, label_topic

pytestmark = pytest.mark.anyio
# aiokafka's producer calls `encode` on a name, but only in Python.
SEND = """
import asyncio, sys
from aiokafka import AIOKafkaProducer

class Name(str):
    def encode(self, *_):
        return b"\\xffodd"

async def main(broker, topic, codec, *values):
    async with AIOKafkaProducer(
        bootstrap_servers=broker, compression_type=codec or None, linger_ms=200
    ) as producer:
        sent = [
            await producer.send(topic, value.encode(), key=b"7", headers=headers)
            for value in values
            for headers in ([("good", b"1")], [(Name("x"), b"2"), ("good", b"3")])
        ]
        await asyncio.gather(*sent)

asyncio.run(main(*sys.argv[1:]))
"""
ODD = [("\\xffodd", b"2"), ("good", b"3")]


@pytest.fixture
async def here(environ):
    async with world(environ | {"CERBERUS_PARTITIONS": "1"}) as opened:
        yield opened


def send(here, topic, codec, *values):
    name = here.config.kafka.topic(topic)
    subprocess.run(
        [sys.executable, "-c", SEND, here.config.kafka.bootstrap[0], name, codec, *values],
        env=os.environ | {"AIOKAFKA_NO_EXTENSIONS": "1"},
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize("codec", ["", "lz4", "gzip"])
async def test_a_payment_with_such_a_header_counts_and_a_broken_one_is_a_dead_letter(here, codec):
    at = now_ms()
    values = [payment(i, 7, at + i).decode() for i in range(3)]
    send(here, kafka.TRANSACTIONS, codec, *values, "not json")
    async with running(one := here.consumer()):
        await until(lambda: sum(one.counts.values()) == 8, "all are read")
        assert one.counts == {"accepted": 3, "duplicate": 3, "rejected": 2}
    [records] = (await here.log(kafka.DEAD_LETTERS)).values()
    found = [dead_letters.unpack(record).headers for record in records]
    assert found == [[("good", b"1")], ODD]
    told = dead_letters.read(here.config, kafka.DEAD_LETTERS)
    assert [letter.headers async for letter in told] == found


async def test_a_label_with_such_a_header_is_stored(here):
    good = labels.Label("order-1", "fraud", "bank", now_ms() - 1_000)
    send(here, kafka.LABELS, "", labels.encode(good).decode())
    async with running(label_topic.LabelConsumer(here.config, here.postgres)):

        async def stored():
            return await here.pool.fetchval("SELECT count(*) FROM labels") == 1

        await until(stored, "the label is stored")


@pytest.mark.parametrize("codec", range(5))
def test_what_is_read_once_more_is_read_the_same(codec):
    raw = b""
    for batch in range(3):
        builder = default_records.DefaultRecordBatchBuilder(2, codec, 0, -1, -1, 0, 1 << 20)
        for offset in range(10):
            headers = [("name", b"x"), ("none", None)][: offset % 3]
            key, value = (None, b"v") if offset % 2 else (b"k", None)
            builder.append(offset, 1_000 + offset, key, value, headers)
        built = bytearray(builder.build())
        built[:8] = (10 * batch).to_bytes(8, "big")  # the base offset, which no CRC covers
        raw += bytes(built)

    def read(records):
        while records.has_next():
            for r in records.next_batch():
                yield r.offset, r.timestamp, r.key, r.value, list(r.headers)

    fast, slow = read(header_names._Fetched(raw)), read(header_names._Slow(raw))
    pairs = list(itertools.zip_longest(fast, slow))
    assert len(pairs) == 30
    assert all(one == other for one, other in pairs)
