"""All fetches pass through our wrapper; the first record is the one that the broker knows."""

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from faults import admin_of, compacted, set_topics
from pipeline import now_ms, payment, world
from swelling import padded, publish_swelling

from cerberus import fetching, kafka, transactions
from cerberus.stream import assignment

pytestmark = pytest.mark.anyio


@pytest.fixture
async def here(environ):
    async with world(environ | {"CERBERUS_PARTITIONS": "1"}) as opened:
        yield opened


@pytest.fixture
async def reader(here):
    client = kafka.consumer(here.config, "reader")
    await client.start()
    tp = TopicPartition(here.config.kafka.topic(kafka.TRANSACTIONS), 0)
    client.assign([tp])
    client.seek(tp, 0)
    yield client, tp
    await kafka.stop(client)


async def test_a_fetch_holds_no_more_than_its_bound(here, reader, monkeypatch):
    """It fails if aiokafka no longer fetches through the wrapped method."""
    client, tp = reader
    for first in range(0, 60, 6):
        values = [padded({"at": first + i}, 50_000) for i in range(6)]
        records = [(1, value, now_ms()) for value in values]
        await publish_swelling(here.config.kafka.bootstrap, tp.topic, 0, records)
    monkeypatch.setattr(fetching, "FETCH_BYTES", 1 << 20)
    polled = []
    while sum(polled) < 60:
        found = await client.getmany(timeout_ms=5_000)
        polled.append(len(found[tp]))
    assert max(polled) <= 18  # three batches of 300 kB
    client.seek(tp, 0)
    monkeypatch.setattr(fetching, "FETCH_BYTES", 64 << 20)
    assert len((await client.getmany(timeout_ms=5_000))[tp]) == 60


async def send(here, times, first=0):
    at = now_ms() - 60_000
    records = [(1, payment(i, 1, at + i), at + i) for i in range(first, first + times)]
    await here.publish(records)


async def of_an_empty_log(here, tp):
    pass


async def of_a_batch(here, tp):
    await send(here, 9)


async def inside_a_batch(here, tp):
    records = [(1, b"{}", now_ms() - 9_000 + i) for i in range(9)]
    await publish_swelling(here.config.kafka.bootstrap, tp.topic, 0, records)
    async with admin_of(here) as admin:
        await admin.delete_records({tp: RecordsToDelete(5)})


async def of_a_broker_that_stamps(here, tp):
    await set_topics(here, tp.topic, {"message.timestamp.type": "LogAppendTime"})
    await send(here, 9)


async def that_its_writer_took_back(here, tp):
    bootstrap = here.config.kafka.bootstrap
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id=tp.topic) as writer:
        for end in (writer.abort_transaction, writer.commit_transaction):
            await writer.begin_transaction()
            await writer.send_and_wait(tp.topic, b"{}", key=transactions.key(1), partition=0)
            await end()
    async with admin_of(here) as admin:
        await admin.delete_records({tp: RecordsToDelete(1)})


async def of_what_compaction_left(here, tp):
    await send(here, 9)
    await compacted(here)


@pytest.mark.parametrize(
    "situation",
    [
        of_an_empty_log,
        of_a_batch,
        inside_a_batch,
        of_a_broker_that_stamps,
        that_its_writer_took_back,
        of_what_compaction_left,
    ],
    ids=lambda situation: situation.__name__,
)
async def test_the_first_record_is_the_one_that_the_broker_knows(here, reader, situation):
    client, tp = reader
    await situation(here, tp)
    told = (await client.offsets_for_times({tp: 0}))[tp]
    found = (await assignment.first_records(client, [tp]))[tp]
    assert found == (told and (told.offset, told.timestamp))
