"""Labels on their topic: none is lost on the way to the table; the synthetic truth comes late."""

import asyncio
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys

import orjson
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from asking import client
from faults import compacted
from pipeline import now_ms, payment, running, until, world
from served import Served
from service import service
from swelling import padded, publish_swelling
from truth import GOOD, POSITIVE, kept, key, label

from cerberus import kafka, labels, producer, settings, transactions
from cerberus.stream import label_topic

pytestmark = pytest.mark.anyio


@pytest.fixture
async def here(environ):
    async with world(environ | {"CERBERUS_PARTITIONS": "3"}) as opened:
        yield opened


async def publish(here, values):
    topic = here.config.kafka.topic(kafka.LABELS)
    await asyncio.gather(*[await here.kafka.send(topic, value, key=b"k") for value in values])


def consumer(here):
    return label_topic.LabelConsumer(here.config, here.postgres)


async def commits(here):
    """Return how many labels the group will not read again."""
    async with kafka.admin(here.config.kafka) as admin:
        found = await admin.list_consumer_group_offsets(here.config.kafka.topic(kafka.LABEL_GROUP))
    return sum(max(0, at.offset) for at in found.values())


async def stored(here, wanted):
    async def all_there():
        return wanted <= set(await kept(here.pool))

    await until(all_there, f"{len(wanted)} labels are stored")


async def test_labels_on_the_topic_reach_the_table_and_what_is_broken_is_set_aside(here):
    told = [label(f"order-{i}", user_id=i % 2 or None) for i in range(20)]
    twice = b'{"source": "bank", ' + orjson.dumps(GOOD)[1:]
    broken = [b"{", b"\xff", orjson.dumps(GOOD | {"label": "suspicious"}), twice]
    began_ms = now_ms()
    await publish(here, [labels.encode(told[0]), *broken, *map(labels.encode, told)])
    async with running(consumer(here)):
        await stored(here, {key(each) for each in told})

        async def set_aside():
            found = await here.log(kafka.LABEL_DEAD_LETTERS)
            return [r for records in found.values() for r in records]

        dead = await until(set_aside, "dead letters are there")
    assert set(await kept(here.pool)) == {key(each) for each in told}
    assert all(began_ms <= seen <= now_ms() for seen in (await kept(here.pool)).values())
    assert sorted(r.value for r in dead) == sorted(broken)
    headers = [dict(record.headers) for record in dead]
    assert {h["cerberus-topic"] for h in headers} == {
        here.config.kafka.topic(kafka.LABELS).encode()
    }
    fields = sorted(h["cerberus-reason"].split(b":")[0] for h in headers)
    assert fields == [b"label", b"source", b"value", b"value"]
    counts = here.postgres.labels.counts
    assert (counts["stored"], counts["known"], counts["invalid"]) == (20, 1, 4)


async def test_what_is_stored_is_committed_and_not_read_again(here):
    first = [label(f"order-{i}") for i in range(10)]
    await publish(here, map(labels.encode, first))
    async with running(consumer(here)):
        await stored(here, {key(each) for each in first})
    await publish(here, [labels.encode(label("last"))])
    async with running(consumer(here)):
        await stored(here, {key(label("last"))})
    assert here.postgres.labels.counts["known"] == 0


async def test_labels_that_come_while_postgres_is_away_are_stored_when_it_is_back(here, servers):
    told = [label(f"order-{i}") for i in range(60)]
    async with running(one := consumer(here)):
        await publish(here, map(labels.encode, told[:20]))
        await stored(here, {key(each) for each in told[:20]})
        servers.postgres.kill(signal.SIGSTOP)
        try:
            await publish(here, map(labels.encode, told[20:40]))
            await until(lambda: one.problem is not None, "the trouble is said")
            await publish(here, map(labels.encode, told[40:]))
        finally:
            servers.postgres.kill(signal.SIGCONT)
        await stored(here, {key(each) for each in told})
        await until(lambda: one.problem is None, "the trouble is over")
    assert len(await kept(here.pool)) == len(told)


async def test_labels_whose_storing_is_cut_off_are_not_committed(here):
    told = [label(f"order-{i}") for i in range(20)]
    waiting = (
        "SELECT pid FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%labels%'"
    )
    async with running(one := consumer(here)):
        async with here.pool.acquire() as ours, ours.transaction():
            await ours.execute("LOCK TABLE labels IN EXCLUSIVE MODE")
            await publish(here, map(labels.encode, told))
            pid = await until(lambda: here.pool.fetchval(waiting), "the task waits for the table")
            await here.pool.execute("SELECT pg_terminate_backend($1)", pid)
            await until(lambda: one.problem is not None, "the trouble is said")
            assert await commits(here) == 0
        await stored(here, {key(each) for each in told})
        await until(lambda: one.problem is None, "the trouble is over")
    assert await commits(here) == len(told)
    counts = here.postgres.labels.counts
    assert (counts["stored"], counts["known"]) == (len(told), 0)


async def test_cut_off_anywhere_the_task_loses_no_label_and_first_seen_stays(here):
    rng = random.Random(6)
    told, first_seen = [], {}
    for turn in range(8):
        fresh = [label(f"order-{turn}-{i}") for i in range(1_500)]
        told += fresh
        await publish(here, map(labels.encode, fresh))
        before = await here.pool.fetchval("SELECT count(*) FROM labels")
        async with running(consumer(here)) as task:
            more = f"SELECT count(*) > {before} FROM labels"
            await until(lambda more=more: here.pool.fetchval(more), "some more are stored")
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
        found = await kept(here.pool)
        assert first_seen.items() <= found.items()
        first_seen = found
    async with running(consumer(here)):
        await stored(here, {key(each) for each in told})
    assert first_seen.items() <= (await kept(here.pool)).items()


async def test_health_says_what_keeps_labels_waiting(environ):
    served = Served(environ | {"KAFKA_BROKER": "127.0.0.1:1"})
    try:
        await served.migrated()
        app = served.app()
        one = app.state.parts.service.label_consumer
        async with client(app) as http:
            assert "labels" not in str((await http.get("/health")).json()["reasons"])
            async with running(one):
                await until(lambda: one.problem, "the trouble is said")
                told = (await http.get("/health")).json()
        assert any("labels on the topic wait" in reason for reason in told["reasons"])
        assert told["status"] == "degraded"
    finally:
        await served.close()


# The synthetic truth.


async def payments(here):
    """Return all synthetic frauds and how many were genuine."""
    records = [r for found in (await here.log()).values() for r in found]
    paid = {t.transaction_id: t for t in (transactions.decode(r.value, "USD") for r in records)}
    frauds = {name: txn for name, txn in paid.items() if txn.amount_minor >= 500_000}
    return frauds, len(paid) - len(frauds)


async def tellings_on_the_topic(here):
    found = collections.defaultdict(list)
    for records in (await here.log(kafka.LABELS)).values():
        for record in records:
            told = labels.decode(record.value, now_ms())
            # Nobody knows before it is found out.
            assert record.timestamp >= told.labelled_ms
            found[told.transaction_id].append(told)
    return found


async def test_every_synthetic_fraud_is_found_out_though_its_producer_is_killed(environ):
    changes = {"CERBERUS_RATE": "400", "CERBERUS_SYNTHETIC_LABEL_DELAY_S": "4"}
    async with world(environ | changes) as here:
        for _ in range(2):
            async with running(first := producer.Producer(here.config, here.postgres)) as task:
                await until(lambda first=first: first.sent > 600, "it has produced")
                task.cancel()
        frauds, genuine = await payments(here)
        assert genuine > 10 * len(frauds) > 100
        waiting = await here.pool.fetchval("SELECT count(*) FROM synthetic_truth")
        assert waiting > len(frauds) / 4  # else the restart has nothing to survive
        quiet = settings.load(environ | changes | {"CERBERUS_RATE": "0.001"})
        async with running(producer.Producer(quiet, here.postgres)):

            async def all_told():
                return frauds.keys() <= (await tellings_on_the_topic(here)).keys()

            await until(all_told, "every fraud is found out")
        told = await tellings_on_the_topic(here)
        for name, found in told.items():
            assert len(set(found)) == 1  # told twice, it is the same
            assert (found[0].source, found[0].label in POSITIVE) == ("synthetic", True)
            if name in frauds:
                assert found[0].labelled_ms >= frauds[name].event_ms
                assert found[0].user_id == frauds[name].user_id
        # A kill between keeping the truth and sending the fraud leaves a label too many.
        assert len(told.keys() - frauds.keys()) <= 100
        assert await here.pool.fetchval("SELECT count(*) FROM synthetic_truth") == 0


async def test_the_synthetic_truth_reaches_the_training_rows_end_to_end(environ):
    changes = {"CERBERUS_RATE": "200", "CERBERUS_SYNTHETIC_LABEL_DELAY_S": "1"}
    async with world(environ | changes) as here:
        tasks = (producer.Producer(here.config, here.postgres), consumer(here), here.consumer())
        async with contextlib.AsyncExitStack() as stack:
            for task in tasks:
                await stack.enter_async_context(running(task))
            found = "SELECT count(*) FROM training_rows WHERE truth AND label_source = 'synthetic'"

            async def known():
                return await here.pool.fetchval(found) > 10

            await until(known, "some frauds are known in the training rows")
        wrong = "SELECT count(*) FROM training_rows WHERE truth AND amount_minor < 500000"
        assert await here.pool.fetchval(wrong) == 0


async def test_the_service_takes_labels_at_both_doors_and_judges_by_its_settings(environ):
    quiet = {"CERBERUS_RATE": "0", "CERBERUS_PARTITIONS": "3", "CERBERUS_LABEL_MATURITY_DAYS": "0"}
    at = now_ms() - 2_000
    paid = [(user, payment(user, user, at), at) for user in range(1000, 1004)]
    async with world(environ | quiet) as here:
        await here.publish(paid)
        by_topic = labels.Label("t1000", "fraud", "bank", at + 1)
        await publish(here, [labels.encode(by_topic)])
    asked = {
        "transaction_id": "t1001",
        "label": "friendly_fraud",
        "source": "desk",
        "labelled_at": transactions.format_ms(at + 1),
    }
    with service(environ | quiet | {"CERBERUS_FRIENDLY_FRAUD_IS_FRAUD": "1"}) as running_service:
        health = running_service.wait_until_ready()
        assert health["tasks"]["labels"]["state"] == "running"
        assert running_service.http.post("/labels", json=asked).json()["stored"] == 1

        def judged():
            body = running_service.http.get("/accuracy").json()
            totals = [model["total"] for model in body["models"]]
            return totals and (totals[0]["matured"], totals[0]["positives"]) == (4, 2) and body

        body = running_service.wait(judged, "all four are judged, two of them fraud")
        assert body["friendly_fraud_is_fraud"] is True
        # Neither of these has the settings of the one who serves.
        worker = {"CERBERUS_TASKS": "labels,retention", "CERBERUS_RATE": "0"}
        with service(environ | worker) as other:
            other.wait_until_ready()
            command = [sys.executable, "-m", "cerberus", "migrate"]
            await asyncio.to_thread(
                subprocess.run, command, env=os.environ | environ, timeout=60, check=True
            )
        again = running_service.http.get("/accuracy").json()
        assert (again["label_maturity_days"], again["friendly_fraud_is_fraud"]) == (0, True)


async def test_labels_that_the_topic_lost_before_they_were_read_are_said(here):
    name = here.config.kafka.topic(kafka.LABELS)
    first = [label(f"order-{i}") for i in range(9)]
    await publish(here, map(labels.encode, first))
    async with running(consumer(here)):
        await stored(here, {key(each) for each in first})
    await publish(here, [labels.encode(label(f"gone-{i}")) for i in range(9)])
    [number] = [n for n, records in (await here.log(kafka.LABELS)).items() if records]
    async with kafka.admin(here.config.kafka) as admin:
        await admin.delete_records({TopicPartition(name, number): RecordsToDelete(15)})
    last = [label(f"gone-{i}") for i in range(6, 9)]
    async with running(one := consumer(here)):
        await stored(here, {key(each) for each in last})
        await until(lambda: one.lost, "it is said")
        assert f"partition {number} between offsets 9 and 15" in one.lost
    assert len(await kept(here.pool)) == 12


async def test_a_topic_of_labels_that_is_compacted_is_said_and_so_is_what_it_lost(here):
    await publish(here, [labels.encode(label(f"order-{i}")) for i in range(9)])
    await compacted(here, topic=kafka.LABELS)
    async with running(one := consumer(here)):
        await until(lambda: one.lost and one.advice, "both are said")
        assert "set cleanup.policy=delete" in one.lost
        assert "set cleanup.policy=delete" in one.advice


async def test_labels_in_a_batch_that_swells_are_stored_and_what_is_too_long_is_set_aside(here):
    told = [label(f"order-{i}") for i in range(90)]
    values = [padded(orjson.loads(labels.encode(each))) for each in told]
    values[4:4] = [padded(GOOD, 2_000_000)]
    topic = here.config.kafka.topic(kafka.LABELS)
    records = [(1, value, now_ms()) for value in values]
    async with running(consumer(here)):
        await publish_swelling(here.config.kafka.bootstrap, topic, 0, records)
        await stored(here, {key(each) for each in told})

        async def set_aside():
            found = await here.log(kafka.LABEL_DEAD_LETTERS)
            return [r for records in found.values() for r in records]

        [dead] = await until(set_aside, "the dead letter is there")
    assert dict(dead.headers)["cerberus-offset"] == b"4"
    assert b"more than 1,048,576" in dict(dead.headers)["cerberus-reason"]
