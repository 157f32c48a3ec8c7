"""Windows longer than the replay: what the log's replay does not reach comes from Postgres."""

import asyncio
import dataclasses
import random

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import NewPartitions, RecordsToDelete
from faults import admin_of, remake_topic
from pipeline import live, now_ms, payment, running, trained, until, world

from cerberus import kafka, partition, transactions
from cerberus.features import fences
from cerberus.postgres import facts
from cerberus.postgres import pool as postgres_pool
from cerberus.stream import assignment, liveness, starts

pytestmark = pytest.mark.anyio
SPANS = ("1m", "20m")
USERS = range(1000, 1010)


@pytest.fixture
async def here(environ, tmp_path, monkeypatch):
    # Many pages, and many turns of the consumer between them.
    monkeypatch.setattr(facts, "_PAGE", 5)
    monkeypatch.setattr(liveness, "_SEED_S", 0.01)
    changes = {"CERBERUS_REPLAY_SPAN_S": "60", "CERBERUS_PARTITIONS": "2"}
    async with world(trained(environ, tmp_path, SPANS) | changes) as opened:
        yield opened


async def assert_rows_equal_the_log(here):
    oracles = await here.oracles()
    for user in USERS:
        told = oracles[transactions.partition_of(user, len(oracles))]
        row = await here.certain(user, told.frontier)
        short, long = row.stats
        assert (long.count, long.total_minor) == told.stats(user, told.frontier)
        told = dataclasses.replace(told, span_ms=60_000)
        assert (short.count, short.total_minor) == told.stats(user, told.frontier)


def drained(here, one, count=2):
    def at_the_end():
        return live(one, partitions=count) and not any(one.lag().values())

    return until(at_the_end, "all partitions live and caught up")


def traffic(rng, count, start_ms, end_ms, first=0, users=USERS):
    for i in range(count):
        at = start_ms + (end_ms - start_ms) * i // count - rng.randrange(20_000)
        user = rng.choice(users)
        record = (user, payment(first + i, user, at, rng.randrange(1000) / 100), at)
        yield record
        if not rng.randrange(15):
            yield record


async def test_a_short_replay_gives_the_long_window_and_so_does_a_flush(here):
    rng = random.Random(1)
    start = now_ms() - 3_000_000
    # Half of the users fall silent before what the replay reaches.
    await here.publish(traffic(rng, 800, start, now_ms() - 600_000))
    await here.publish(traffic(rng, 300, now_ms() - 600_000, now_ms(), 1_000, USERS[:5]))
    async with running(one := here.consumer()):
        await drained(here, one)
        await assert_rows_equal_the_log(here)
    async with running(two := here.consumer()):
        await drained(here, two)
        assert 0 < two.counts["replayed"] < 300
        await assert_rows_equal_the_log(here)
        await here.publish(traffic(rng, 200, now_ms() - 5_000, now_ms(), 2_000, USERS[:5]))
        await asyncio.sleep(1.2)
        await drained(here, two)
        await assert_rows_equal_the_log(here)
    async with running(three := here.consumer()):
        await drained(here, three)
        await here.redis.flushdb()

        async def restored():
            rows = [await here.read(user, now_ms()) for user in USERS]
            return all(row.degraded == () for row in rows)

        await until(restored, "the rows are back")
        await assert_rows_equal_the_log(here)


async def test_a_seed_is_of_one_life_of_one_partition(here):
    txn = [transactions.Transaction(f"t{i}", 1000, 500, "USD", "", now_ms() + i) for i in range(4)]
    places = [(2, 0), (1, 0), (2, 1), (2, 0)]
    written = [facts.TransactionFact(t, *at, 5) for t, at in zip(txn, places, strict=True)]
    await here.postgres.facts.write("a", written[:3], [], [])
    await here.postgres.facts.write("b", written[3:], [], [])
    pages = [
        page
        async for page in here.postgres.facts.seed(
            facts.Prefix("a", 0, fences.Fence(2, 9, 0), 2), 0
        )
    ]
    assert [[t.transaction_id for t in page] for page in pages] == [["t0"]]
    both = here.postgres.facts.seed(facts.Prefix("a", 0, fences.Fence(2, 9, 0), 1), 0)
    assert {t.transaction_id async for page in both for t in page} == {"t0", "t1"}


async def test_nobody_is_seeded_before_the_last_page_and_a_repetition_changes_nothing(here):
    at_ms = now_ms()
    paid = [transactions.Transaction(f"t{i}", i % 5, 100, "USD", "", at_ms) for i in range(20)]
    written = [facts.TransactionFact(txn, 1, 0, i) for i, txn in enumerate(paid[:17])]
    await here.postgres.facts.write("a", written, [], [])
    written = [facts.TransactionFact(txn, 0, 0, i) for i, txn in enumerate(paid[17:])]
    await here.postgres.facts.write(facts.IMPORTED, written, [], [])
    start = partition.Start(1, 17, 17, seeded_until_ms=at_ms, imported_until_ms=at_ms)
    part = partition.Partition(0, here.spans, start)
    for cut in (1, 2, 4, 5):  # the last is of what was imported
        pages = assignment.seed(here.postgres, "a", part, at_ms)
        for _ in range(cut):
            await anext(pages)
        await pages.aclose()
        assert (part.unseeded(range(5)), part.touched) == (set(range(5)), set())
    # One of them pays before the others are seeded.
    async for _ in assignment.seed(here.postgres, "a", part, at_ms, {3}):
        pass
    assert (part.unseeded(range(5)), part.touched) == ({0, 1, 2, 4}, {3})
    assert len([page async for page in assignment.seed(here.postgres, "a", part, at_ms)]) == 5
    assert (part.unseeded(range(6)), part.touched) == ({5}, set(range(5)))
    assert [part.windows.stats(user, at_ms)[1].count for user in range(5)] == [4] * 5


async def test_records_are_read_on_while_the_past_of_all_users_is_fetched(here, monkeypatch):
    start = now_ms() - 600_000
    await here.publish(traffic(random.Random(2), 400, start, now_ms()))
    async with running(one := here.consumer()):
        await drained(here, one)
    monkeypatch.setattr(facts, "_PAGE", 1)
    monkeypatch.setattr(liveness, "_SEED_S", 0.0)
    async with running(two := here.consumer()):
        await drained(here, two)
        await here.redis.flushdb()

        def restoring():
            return {state.state for state in two.states().values()} == {"restoring"}

        await until(restoring, "the loss is found")
        await here.publish(traffic(random.Random(3), 20, now_ms() - 1_000, now_ms(), 1_000))
        await until(lambda: two.counts["accepted"] == 20 and not any(two.lag().values()), "read on")
        assert restoring()
        await assert_nothing_is_left_open_by_who_loses_a_partition(here, two, monkeypatch)
        await assert_rows_equal_the_log(here)


async def assert_nothing_is_left_open_by_who_loses_a_partition(here, two, monkeypatch):
    monkeypatch.setattr(
        postgres_pool, "NO_IDLING", "SELECT 1"
    )  # or Postgres would end it by itself
    opened = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND state = 'idle in transaction'"
    )
    async with running(three := here.consumer()):
        await until(lambda: len(two.states()) == len(three.states()) == 1, "each has one")
        monkeypatch.setattr(liveness, "_SEED_S", 0.25)
        await until(lambda: live(two, three, partitions=2), "all is restored")

        async def none():
            return not await here.pool.fetchval(opened)

        await until(none, "no transaction is left open", 5)
        monkeypatch.setattr(liveness, "_SEED_S", 0.0)
        await here.redis.flushdb()
        await until(lambda: here.pool.fetchval(opened), "it is fetched once more")
    await until(lambda: len(two.states()) == 2, "one has all")
    monkeypatch.setattr(liveness, "_SEED_S", 0.25)
    await drained(here, two)
    await until(none, "no transaction is left open", 5)


async def forget_the_log_below(here, offset):
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    async with admin_of(here) as admin:
        await admin.delete_records({TopicPartition(name, 0): RecordsToDelete(offset)})


def counted(i, at_ms):
    return 1000, payment(i, 1000, at_ms), at_ms


async def test_what_was_missing_at_the_first_reading_is_doubted_after_restarts_too(
    environ, tmp_path
):
    changes = {"CERBERUS_REPLAY_SPAN_S": "60", "CERBERUS_PARTITIONS": "1"}
    async with world(trained(environ, tmp_path, SPANS) | changes) as here:
        start = now_ms() - 600_000
        await here.publish([counted(i, start - 300_000 + i) for i in range(5)])
        await forget_the_log_below(here, 5)
        await here.publish([counted(10 + i, start + i * 30_000) for i in range(20)])
        for _ in range(3):
            async with running(one := here.consumer()):
                await until(lambda one=one: live(one, partitions=1), "all is read")

                async def warming():
                    return (await here.read(1000, now_ms())).degraded == ("warming",)

                await until(warming, "it is doubted", 10)
                assert one.states()[0].known_from_ms == start + here.spans.slack_ms


@pytest.mark.parametrize("first", [None, (4, 3)])
def test_what_a_commit_says_is_read_and_of_another_hand_only_its_offset(first):
    written = starts.Commit(1, 9, partition.Moved(8, 7), 6, 5, first, 2, 1)
    text = written.metadata("c", 0)
    assert starts.Commit.read(1, text, "c") == written
    for other in (
        "",
        "c",
        text.replace("c", "d"),
        text.rpartition(" ")[0],
        f"{text} 1",
        f"{text}x",
    ):
        assert starts.Commit.read(1, other, "c") == starts.Commit(1)


async def test_who_stays_where_a_partition_is_added_keeps_the_long_window(here):
    old, new = now_ms() - 600_000, now_ms() - 5_000
    stay = [
        u
        for u in range(1000, 1100)
        if transactions.partition_of(u, 2) == transactions.partition_of(u, 3)
    ][:10]
    await here.publish([(u, payment(f"a{u}", u, old), old) for u in stay])
    # The others' rows are of the former epoch.
    await here.publish([(u, payment(f"b{u}", u, new), new) for u in stay[5:]])
    async with running(one := here.consumer()):
        await drained(here, one)
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    async with admin_of(here) as admin:
        await admin.create_partitions({name: NewPartitions(3)})
    for flushed in (False, True, False):
        async with running(two := here.consumer()):
            await drained(here, two, 3)
            if flushed:
                await here.redis.flushdb()
            for place, user in enumerate(stay):
                row = await here.certain(user, now_ms())
                assert row.stats[1].count == (2 if place >= 5 else 1)
            parts = [owned.part for owned in two._parts.values()]
            assert {part.since_epoch < part.epoch for part in parts} == {True, False}


async def test_a_topic_made_anew_takes_nothing_of_the_former_into_long_windows(here):
    start = now_ms() - 600_000
    for life in (1, 2):
        places = [(u, start + i * 5_000) for i, u in enumerate([*USERS] * 10)]
        await here.publish([(u, payment(f"{life}-{at}", u, at), at) for u, at in places])
        async with running(one := here.consumer()):
            await drained(here, one)
        async with running(two := here.consumer()):
            await drained(here, two)
            assert two.counts["replayed"] < len(places)
            await assert_rows_equal_the_log(here)
        if life == 1:
            await remake_topic(here)


async def test_a_database_that_was_lost_leaves_no_long_window_short_without_a_doubt(
    environ, tmp_path
):
    changes = {"CERBERUS_REPLAY_SPAN_S": "60", "CERBERUS_PARTITIONS": "1"}
    async with world(trained(environ, tmp_path, SPANS) | changes) as here:
        start = now_ms() - 900_000
        await here.publish([counted(i, start + i * 30_000) for i in range(30)])
        async with running(one := here.consumer()):
            await until(lambda: live(one, partitions=1), "all is read")
            assert (await here.certain(1000, now_ms())).stats[1].count == 30
        await here.pool.execute(
            "TRUNCATE transactions, log_positions, log_epochs, log_begins, decisions"
        )
        for _ in range(2):
            # Some is stored again before the second start.
            await here.publish([counted(now_ms(), now_ms() - 5_000)])
            async with running(two := here.consumer()):
                await until(lambda two=two: live(two, partitions=1), "the end of it is read")

                async def warming():
                    return (await here.read(1000, now_ms())).degraded == ("warming",)

                await until(warming, "it is doubted", 10)
                await until(lambda two=two: two.counts["accepted"], "it is stored")
