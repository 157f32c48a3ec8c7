"""Faults of the stores that were found under fire, each in its smallest form."""

import asyncio
import signal
import time

import aiokafka
import pytest
from changes import changed
from faults import (
    PARTITIONS,
    USERS,
    assert_rows_equal_the_log,
    commits,
    drained,
    stored,
)
from pipeline import live, now_ms, payment, running, until, world

from cerberus import kafka, supervision
from cerberus.online import partition_states

pytestmark = pytest.mark.anyio


@pytest.fixture
async def here(environ):
    async with world(environ | {"CERBERUS_PARTITIONS": str(PARTITIONS)}) as opened:
        yield opened


async def snapshot(here):
    keys = await here.redis.keys("*")
    return {key: await here.redis.dump(key) for key in keys}


async def go_back(here, values):
    """Make Redis what it was, as after a power cut or the failover to a replica behind."""
    pipe = here.redis.pipeline(transaction=True)
    pipe.flushdb()
    for key, value in values.items():
        pipe.restore(key, 0, value)
    await pipe.execute()


async def test_rows_of_a_store_that_went_back_in_time_are_doubted_until_they_are_back(here):
    at = now_ms() - 5_000
    await here.publish([(u, payment(1, u, at), at) for u in USERS])
    async with running(one := here.consumer()):
        await drained(here, one)
        before = await snapshot(here)
        await here.publish([(u, payment(2, u, at + 1), at + 1) for u in USERS])
        await drained(here, one)
        await asyncio.sleep(5.5)  # what was live then is stale now
        await go_back(here, before)
        whole = 0
        async with asyncio.timeout(20):
            while whole < 50:
                rows = [await here.read(user, now_ms()) for user in USERS]
                counts = [row.stats[0].count for row in rows if row.degraded == ()]
                assert set(counts) <= {2}
                whole += len(counts) == len(USERS)


@pytest.mark.parametrize("meanwhile", ["nobody runs", "the owner runs"])
async def test_a_row_that_was_lost_alone_is_sent_again(here, meanwhile):
    at = now_ms() - 5_000
    await here.publish([(u, payment(u, u, at), at) for u in USERS])

    async def back():
        return (await here.read(1000, now_ms())).stats[0].count == 1

    async def lose():
        # The hash of the user, not those of the partitions, whose loss would be seen.
        assert await here.redis.delete(here.online._key(1000)) == 1

    if meanwhile == "the owner runs":
        here.config = changed(here.config, resend_s=1.0)
    async with running(one := here.consumer()):
        await drained(here, one)
        await asyncio.sleep(1)
        if meanwhile == "the owner runs":
            await lose()
            await until(back, "the row is back", 10)
            return
    await lose()
    here.config = changed(here.config, resend_s=86_400.0)
    async with running(two := here.consumer()):
        two._liveness._resent_s = time.monotonic()
        await drained(here, two)
        await until(back, "the row is back", 10)


async def test_until_lost_credit_scores_are_loaded_again_the_stream_s_decisions_say_so(here):
    at = now_ms() - 5_000
    await here.pool.execute(
        "INSERT INTO credit_scores (user_id, event_timestamp, created_timestamp, credit_score) "
        "VALUES (1000, now(), now(), 700)"
    )
    query = "SELECT transaction_id, degraded FROM decisions"
    async with running(here.consumer()):
        for i, loaded in enumerate((False, True)):
            if loaded:
                await here.redis.set(partition_states.MATERIALIZED, now_ms())
            await here.publish([(1000, payment(i, 1000, at + i), at + i)])

            async def decided(count=i + 1):
                rows = await here.pool.fetch(query)
                return len(rows) == count and {r["transaction_id"]: r["degraded"] for r in rows}

            found = await until(decided, "it is decided")
    assert found == {"t0": ["restoring"], "t1": []}


async def test_until_lost_credit_scores_are_loaded_again_the_answers_say_so(here):
    at = now_ms() - 5_000
    await here.publish([(u, payment(1, u, at), at) for u in USERS])
    await here.pool.execute(
        "INSERT INTO credit_scores (user_id, event_timestamp, created_timestamp, credit_score) "
        "VALUES (1000, now(), now(), 700)"
    )
    await here.redis.set(partition_states.MATERIALIZED, now_ms())

    async def certain():
        return (await here.read(1000, now_ms())).degraded == ()

    async with running(one := here.consumer()):
        await drained(here, one)
        await until(certain, "nothing is in doubt")
        await here.redis.flushdb()
        for _ in range(30):
            assert not await certain()
            await asyncio.sleep(0.1)
        await here.redis.set(partition_states.MATERIALIZED, now_ms())
        await until(certain, "nothing is in doubt")
        await here.redis.delete(partition_states.MATERIALIZED)  # as an import does

        async def doubted():
            return not await certain()

        await until(doubted, "scores are in doubt")
        await here.redis.set(partition_states.MATERIALIZED, now_ms())
        await until(certain, "nothing is in doubt")
        await here.redis.delete(partition_states.MATERIALIZED)
        await here.redis.delete(*await here.redis.keys("cerberus:partitions*"))
        await asyncio.sleep(2)
    # The next owner finds what this one has made of it, and must not take it for whole.
    async with running(here.consumer()):
        for _ in range(300):
            assert not await certain()
            await asyncio.sleep(0.01)


async def stored_facts(here):
    return await here.pool.fetchval("SELECT count(*) FROM transactions")


async def test_while_a_store_is_away_nothing_is_committed_and_state_ahead_is_not_used(
    here, servers
):
    at = now_ms() - 5_000
    one, two = here.consumer(), here.consumer()
    async with running(one):
        try:
            async with running(two):
                await until(lambda: one.states() and two.states(), "both own something")
                await until(lambda: live(one, two, partitions=PARTITIONS), "both are live")
                before, generation = await commits(here), one._generation
                servers.redis.kill(signal.SIGSTOP)
                await here.publish([(u, payment(u, u, at), at) for u in USERS])
                await until(
                    lambda: "store" in one.problems and "store" in two.problems, "both say it"
                )
                assert await commits(here) == before
            # What the windows have observed and no store has is set aside, then comes back.
            await until(lambda: one._generation >= generation + 2, "partitions are shared anew")
        finally:
            servers.redis.kill(signal.SIGCONT)
        await drained(here, one)
        await stored(here)
        assert await stored_facts(here) == len(USERS)
        await assert_rows_equal_the_log(here)


async def test_while_a_store_is_away_the_group_keeps_its_member(here, servers, monkeypatch):
    build = aiokafka.AIOKafkaConsumer
    monkeypatch.setattr(
        aiokafka,
        "AIOKafkaConsumer",
        lambda **options: build(**options | {"max_poll_interval_ms": 3_500}),
    )
    async with running(one := here.consumer()):
        await drained(here, one)
        generation = one._generation
        servers.redis.kill(signal.SIGSTOP)
        try:
            await here.publish([(u, payment(u, u, now_ms()), now_ms()) for u in USERS])
            await until(lambda: "store" in one.problems, "the trouble is said")
            await asyncio.sleep(7)
        finally:
            servers.redis.kill(signal.SIGCONT)
        await drained(here, one)
        assert one._generation == generation


async def test_a_batch_is_not_repeated_once_its_partitions_are_gone(here, servers):
    at = now_ms() - 5_000
    one, two = here.consumer(), here.consumer()
    async with running(one):
        await drained(here, one)
        generation = one._generation
        servers.redis.kill(signal.SIGSTOP)
        try:
            await here.publish([(u, payment(u, u, at), at) for u in USERS])
            await until(lambda: "store" in one.problems, "the trouble is said")
            joining = asyncio.create_task(two._connect(supervision.Progress(time.monotonic)))
            await until(lambda: one._generation >= generation + 2, "partitions are shared")
            await asyncio.sleep(3)
        finally:
            servers.redis.kill(signal.SIGCONT)
        await joining
        await kafka.stop(two._client)
        await drained(here, one)
        await stored(here)
        await assert_rows_equal_the_log(here)
