"""A batch that unpacks to much takes bounded memory, and its records and others are read."""

import asyncio
import pathlib
import re

import orjson
import pytest
from faults import PARTITIONS, admin_of, commits, drained
from pipeline import now_ms, payment, running, until, world
from service import service
from swelling import padded, publish_swelling

from cerberus import batches, fetching, kafka, transactions

pytestmark = pytest.mark.anyio
USER = 1000
HOME = transactions.partition_of(USER, PARTITIONS)


@pytest.fixture
async def here(environ):
    config = environ | {"CERBERUS_PARTITIONS": str(PARTITIONS), "CERBERUS_MAX_REJECTED_SHARE": "1"}
    async with world(config) as opened:
        yield opened


def valid(i, at, **more):
    return orjson.loads(payment(i, USER, at)) | more


async def swell(here, values, codec="zstd"):
    topic, at = here.config.kafka.topic(kafka.TRANSACTIONS), now_ms() - 5_000
    records = [(USER, value, at) for value in values]
    return await publish_swelling(here.config.kafka.bootstrap, topic, HOME, records, codec)


def greatest_bytes(pid):
    """Return the peak memory of a process."""
    [told] = re.findall(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
    return int(told) * 1024


@pytest.mark.timeout(240)
async def test_the_memory_of_batches_that_swell_is_bounded(environ, here):
    """Unpacked as aiokafka does, they take 350 MB."""
    quiet = {"CERBERUS_RATE": "0", "CERBERUS_PARTITIONS": str(PARTITIONS)}
    with service(environ | quiet | {"CERBERUS_TASKS": "api,consumer"}) as owner:
        await asyncio.to_thread(owner.wait_until_ready)
        before = greatest_bytes(owner.process.pid)
        at = now_ms() - 5_000
        for first in range(0, 480, 120):
            await swell(here, [padded(valid(first + i, at + i)) for i in range(120)])
        await here.publish([(USER, payment("after", USER, now_ms()), now_ms())])

        async def taken():
            found = await here.read(USER, now_ms())
            return found.degraded == () and found.stats and found.stats[0].count == 481

        await until(taken, "all their records are counted", 120)
        taken_bytes = greatest_bytes(owner.process.pid) - before
        assert taken_bytes < 250_000_000, f"{taken_bytes:,}"


async def test_a_record_that_is_too_long_is_told_apart_in_a_batch_that_swells(here):
    at = now_ms() - 5_000
    values = [padded(valid(i, at + i)) for i in range(90)]
    values[3:3] = [padded(valid("long", at), 3_000_000)]
    values[8:8] = [padded({"not": "valid"})]
    async with running(one := here.consumer()):
        await swell(here, values)
        await drained(here, one)
        row = await here.certain(USER, now_ms())
        assert row.stats[0].count == 90
    letters = [r for rs in (await here.log(kafka.DEAD_LETTERS)).values() for r in rs]
    told = {
        int(dict(r.headers)["cerberus-offset"]): dict(r.headers)["cerberus-reason"] for r in letters
    }
    assert told.keys() == {3, 8}
    assert b"3,000," in told[3]
    assert b"1,048,576" in told[3]


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_every_codec_is_read_in_pieces(here, monkeypatch, codec):
    monkeypatch.setattr(fetching, "FETCH_BYTES", 3 << 20)
    at = now_ms() - 5_000
    async with running(one := here.consumer()):
        await swell(here, [padded(valid(i, at + i), 100_000) for i in range(100)], codec)
        await drained(here, one)
        assert (await here.certain(USER, now_ms())).stats[0].count == 100
    async with running(two := here.consumer()):
        await drained(here, two)
        assert two.counts["replayed"] == 100


async def test_a_batch_beyond_every_bound_is_described_and_its_partition_goes_on(here, monkeypatch):
    monkeypatch.setattr(batches, "_BATCH_BYTES", 30 << 20)
    at = now_ms() - 5_000
    async with running(one := here.consumer()):
        await swell(here, [padded(valid(i, at + i)) for i in range(60)])
        await here.publish([(USER, payment("after", USER, now_ms()), now_ms())])
        await drained(here, one)
        counted = (await here.certain(USER, now_ms())).stats[0].count
        assert 30 < counted < 40
    [letter] = [r for rs in (await here.log(kafka.DEAD_LETTERS)).values() for r in rs]
    headers = dict(letter.headers)
    assert headers["cerberus-offset"] == b"59"
    assert b"offsets %d to 59" % (counted - 1) in headers["cerberus-reason"]
    assert (await commits(here))[HOME][0] == 61


async def test_several_partitions_that_swell_are_read_one_after_the_other(here, monkeypatch):
    monkeypatch.setattr(fetching, "FETCH_BYTES", 3 << 20)
    topic, at = here.config.kafka.topic(kafka.TRANSACTIONS), now_ms() - 5_000
    users = {transactions.partition_of(u, PARTITIONS): u for u in range(USER, USER + 50)}
    for number, user in users.items():
        records = [
            (user, padded(orjson.loads(payment((user, i), user, at + i)), 100_000), at)
            for i in range(100)
        ]
        bootstrap = here.config.kafka.bootstrap
        await publish_swelling(bootstrap, topic, number, records)
    async with running(one := here.consumer()):
        await drained(here, one)
        for user in users.values():
            assert (await here.certain(user, now_ms())).stats[0].count == 100


async def test_our_topics_take_no_batch_longer_than_the_broker_s_default(here):
    async with admin_of(here) as admin:
        for name in (kafka.TRANSACTIONS, kafka.LABELS):
            found = await kafka.topic_config(admin, here.config.kafka.topic(name))
            assert found["max.message.bytes"] == "1048588"
            assert found["cleanup.policy"] == "delete"
