"""The log is the state: what the stores hold equals the oracle of the log, whatever happens."""

import asyncio
import json
import random
import signal

import orjson
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, RecordsToDelete
from pipeline import live, now_ms, payment, running, shown, until, world

from cerberus import kafka, transactions

pytestmark = pytest.mark.anyio
PARTITIONS = 3
USERS = range(1000, 1012)


@pytest.fixture
async def here(environ):
    changes = {"CERBERUS_PARTITIONS": str(PARTITIONS), "CERBERUS_MAX_REJECTED_SHARE": "0.2"}
    async with world(environ | changes) as opened:
        yield opened


def traffic(rng, count, start_ms, end_ms, first=0):
    """Out of order, with duplicates, expired ones, poison and stamps in the future."""
    records, past = [], []
    for i in range(count):
        user = rng.choice(USERS)
        at = start_ms + (end_ms - start_ms) * i // count
        draw = rng.random()
        if draw < 0.15:
            at -= rng.randrange(100_000)
        elif draw < 0.18:
            at -= rng.randrange(700_000, 900_000)
        elif draw < 0.23 and past:
            records.append(rng.choice(past))
            continue
        elif draw < 0.25:
            twice = b'{"amount": 1.0, ' + payment(first + i, user, at)[1:]
            wrong = payment(first + i, user, at, amount=-1.0)
            value = rng.choice([b"", b"{", b"[]", twice, wrong])
            records.append((user, value, at))
            continue
        elif draw < 0.27:
            records.append((user, payment(first + i, user, at + 61_000), at))
            continue
        amount = rng.randrange(100_000) / 100
        record = (user, payment(first + i, user, at, amount), at)
        past.append(record)
        records.append(record)
    return records


async def assert_stores_equal_the_log(here):
    """Compare every row, decision, fact and dead letter with the oracle of the whole log."""
    oracles = await here.oracles()
    facts = await here.pool.fetch("SELECT * FROM transactions ORDER BY partition, log_offset")
    decisions = await here.pool.fetch("SELECT * FROM decisions")
    history = await here.pool.fetch("SELECT * FROM user_transaction_stats")
    wanted_decisions, wanted_history, wanted_facts = {}, {}, set()
    for number, told in oracles.items():
        lowest = {}
        for e in told.accepted + told.expired:
            key = (e["user_id"], e["id"], e["at"])
            lowest[key] = min(e["offset"], lowest.get(key, e["offset"]))
        wanted_facts |= {(number, offset) for offset in lowest.values()}
        ranks = {}
        for e in told.accepted:
            stats = told.decided_on(e)
            wanted_decisions[(e["user_id"], e["id"], e["at"])] = (*stats, e["offset"] + 1)
            rank = ranks[e["user_id"], e["at"]] = ranks.get((e["user_id"], e["at"]), -1) + 1
            wanted_history[e["user_id"], e["at"] * 1000 + rank] = stats
    assert {(f["partition"], f["log_offset"]) for f in facts} == wanted_facts
    got = {}
    for d in decisions:
        values = json.loads(d["features"])
        stats = values["txn_count_10m"], round(values["total_amount_10m"] * 100)
        got[d["user_id"], d["transaction_id"], d["as_of_ms"]] = (*stats, d["fence_offset"])
    assert got == wanted_decisions
    assert {
        (h["user_id"], round(h["event_timestamp"].timestamp() * 1_000_000)): (
            h["transaction_count_10m"],
            round(h["total_amount_10m"] * 100),
        )
        for h in history
    } == wanted_history
    await assert_rows_equal_the_log(here, oracles)
    letters = {
        (int(headers["cerberus-partition"]), int(headers["cerberus-offset"]))
        for records in (await here.log(kafka.DEAD_LETTERS)).values()
        for headers in (dict(record.headers) for record in records)
    }
    assert letters == {(n, offset) for n, told in oracles.items() for offset in told.rejected}


async def assert_rows_equal_the_log(here, oracles):
    for user in USERS:
        told = oracles[transactions.partition_of(user, len(oracles))]
        for back_ms in (0, 1, 30_000, 119_000):
            as_of_ms = told.frontier - back_ms
            row = await here.certain(user, as_of_ms)
            [stats] = row.stats
            assert (stats.count, stats.total_minor) == told.stats(user, as_of_ms)


async def drained(here, *consumers, partitions=PARTITIONS):
    async def at_the_end():
        return (
            live(*consumers, partitions=partitions)
            and not any(lag for c in consumers for lag in c.lag().values())
            and await shown(here, partitions)
        )

    await until(at_the_end, "all partitions live and caught up")


async def test_every_effect_equals_the_oracle_of_the_log(here):
    rng = random.Random(1)
    await here.publish(traffic(rng, 1500, now_ms() - 3_600_000, now_ms() - 1_000))
    one = here.consumer()
    async with running(one):
        await drained(here, one)
        await assert_stores_equal_the_log(here)
        await here.publish(traffic(rng, 300, now_ms() - 60_000, now_ms(), first=10_000))
        await asyncio.sleep(1.2)
        await drained(here, one)
        await assert_stores_equal_the_log(here)
    assert one.counts["duplicate"] > 0
    assert one.counts["expired"] > 0


async def test_cut_off_anywhere_and_started_again_nothing_is_lost_or_counted_twice(here):
    rng = random.Random(2)
    records = traffic(rng, 3000, now_ms() - 3_600_000, now_ms() - 1_000)
    for at in range(0, len(records), 500):
        await here.publish(records[at : at + 500])
        async with running(here.consumer()) as task:
            await asyncio.sleep(rng.uniform(0.3, 1.2))
            if at % 1000:
                task.cancel()
    one = here.consumer()
    async with running(one):
        await drained(here, one)
        assert one.counts["replayed"] > 0
        await assert_stores_equal_the_log(here)


async def test_a_group_that_grows_and_shrinks_ends_in_the_same_values(here):
    rng = random.Random(3)
    records = traffic(rng, 3000, now_ms() - 3_600_000, now_ms() - 1_000)
    one, two = here.consumer(), here.consumer()
    async with running(one):
        await here.publish(records[:1000])
        async with running(two):
            await until(lambda: one.states() and two.states(), "both own something")
            await here.publish(records[1000:2000])
            await drained(here, one, two)
            await here.publish(records[2000:])
        await drained(here, one)
        await assert_stores_equal_the_log(here)


async def test_state_that_comes_back_to_its_owner_is_not_replayed(here):
    start = now_ms() - 60_000
    await here.publish([(u, payment(u, u, start), start) for u in USERS])
    one = here.consumer()
    async with running(one):
        await drained(here, one)
        async with running(here.consumer()):
            await until(lambda: 0 < len(one.states()) < PARTITIONS, "partitions are shared")
            mine = set(one.states())
            assert one.counts["replayed"] == 0
        await drained(here, one)
        back = one.states()
        await here.publish([(u, payment(u + 1, u, start + 1), start + 1) for u in USERS])
        await asyncio.sleep(1.2)
        await drained(here, one)
        assert set(back) > mine
        await assert_stores_equal_the_log(here)


async def test_rows_that_redis_lost_come_back_and_are_never_zeros_meanwhile(here):
    at = now_ms() - 5_000
    await here.publish([(u, payment(u, u, at), at) for u in USERS])
    one = here.consumer()
    async with running(one):
        await drained(here, one)
        for _ in range(5):
            await here.redis.flushdb()
            zeros, seen = 0, 0
            async with asyncio.timeout(20):
                while seen < len(USERS):
                    rows = [await here.read(user, now_ms()) for user in USERS]
                    zeros += sum(
                        r.degraded == () and (r.stats is None or r.stats[0].count != 1)
                        for r in rows
                    )
                    seen = sum(r.degraded == () for r in rows)
            assert zeros == 0


async def test_a_topic_made_anew_is_another_life_and_its_rows_are_taken(here):
    at = now_ms() - 5_000
    await here.publish([(u, payment(i, u, at), at) for u in USERS for i in range(9)])
    async with running(one := here.consumer()):
        await drained(here, one)
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    admin = AIOKafkaAdminClient(bootstrap_servers=here.config.kafka.bootstrap)
    await admin.start()
    await admin.delete_topics([name])
    await until(lambda: gone(admin, name), "the topic is gone")
    await kafka.create_topics(here.config)
    await here.publish([(u, payment("new", u, at + 1, 5.0), at + 1) for u in USERS])
    async with running(one := here.consumer()):
        await drained(here, one)
        oracles = await here.oracles()
        await assert_rows_equal_the_log(here, oracles)
    await admin.close()


async def gone(admin, name):
    return name not in await admin.list_topics()


async def test_a_partition_more_moves_users_and_splits_no_window_in_silence(here):
    at = now_ms() - 5_000
    await here.publish([(u, payment(u, u, at), at) for u in USERS])
    async with running(one := here.consumer()):
        await drained(here, one)
    admin = AIOKafkaAdminClient(bootstrap_servers=here.config.kafka.bootstrap)
    await admin.start()
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    await admin.create_partitions({name: NewPartitions(PARTITIONS + 1)})
    await admin.close()
    async with running(one := here.consumer()):
        await drained(here, one, partitions=PARTITIONS + 1)
        for user in USERS:
            row = await here.read(user, now_ms())
            moved = transactions.partition_of(user, PARTITIONS + 1) != transactions.partition_of(
                user, PARTITIONS
            )
            # What the former partition kept of a moved user is no longer counted, and that is said.
            assert row.degraded or row.stats[0].count == 1
            assert moved or row.degraded == ()


async def test_a_user_in_two_partitions_is_refused_and_said(here):
    at = now_ms() - 5_000
    async with running(one := here.consumer()):
        await drained(here, one)
        await here.publish([(1000, payment(1, 1000, at), at)], partition=0)
        await asyncio.sleep(0.5)
        await here.publish([(1000, payment(2, 1000, at + 1), at + 1)], partition=1)
        await until(lambda: "split_user" in one.problems, "the split is said")
        assert one.counts["split_user"] == 1

        async def doubted():
            return "split_user" in (await here.read(1000, now_ms())).degraded

        await until(doubted, "the user's answers say it")


async def test_a_writer_s_schema_break_stops_consuming_and_commits_nothing_of_it(here):
    at = now_ms() - 5_000
    good = [(u, payment((u, i), u, at + i), at) for u in USERS for i in range(15)]
    bad = [(u, b"not json", at) for u in USERS for _ in range(5)]
    await here.publish(good)
    async with running(one := here.consumer()):
        await drained(here, one)
        await here.publish(bad)
        await until(lambda: "schema" in one.problems, "consuming has stopped")
        assert "value" in one.problems["schema"]
        assert not one.states()
    async with running(two := here.consumer()):
        await until(lambda: two.counts["rejected"], "the refused records are read again")


async def test_a_log_that_begins_too_late_is_warming_until_the_span_is_covered(here):
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    user = 1000
    number = transactions.partition_of(user, PARTITIONS)
    old, new = now_ms() - 700_000, now_ms() - 300_000
    await here.publish([(user, payment(i, user, at), at) for i, at in enumerate((old, new))])
    admin = AIOKafkaAdminClient(bootstrap_servers=here.config.kafka.bootstrap)
    await admin.start()
    await admin.delete_records({TopicPartition(name, number): RecordsToDelete(1)})
    await admin.close()
    async with running(one := here.consumer()):
        await drained(here, one)
        row = await here.read(user, now_ms())
        assert row.degraded == ("warming",)
        later = await here.read(user, new + 600_000 + 120_000 + 1)
        assert "warming" not in later.degraded


async def test_a_store_that_is_away_delays_everything_and_loses_nothing(here, servers):
    rng = random.Random(4)
    async with running(one := here.consumer()):
        await drained(here, one)
        for server in (servers.redis, servers.postgres):
            await here.publish(traffic(rng, 200, now_ms() - 60_000, now_ms(), rng.randrange(10**9)))
            server.kill(signal.SIGSTOP)
            try:
                await here.publish(
                    traffic(rng, 200, now_ms() - 60_000, now_ms(), rng.randrange(10**9))
                )
                await until(lambda: "store" in one.problems, "the trouble is said")
            finally:
                server.kill(signal.SIGCONT)
            await until(lambda: "store" not in one.problems, "the trouble is over")
        await asyncio.sleep(1.2)
        await drained(here, one)
        await assert_stores_equal_the_log(here)


async def test_decisions_are_published_once_each_when_nothing_fails(here):
    at = now_ms() - 5_000
    async with running(one := here.consumer()):
        await here.publish([(u, payment(u, u, at, 7_000.0), at) for u in USERS])
        await drained(here, one)
    records = [r for rs in (await here.log(kafka.DECISIONS)).values() for r in rs]
    told = [orjson.loads(r.value) for r in records]
    assert sorted(d["user_id"] for d in told) == list(USERS)
    assert {d["prediction"] for d in told} == {"FRAUD"}
    assert {r.key for r in records} == {b"%d" % u for u in USERS}
    ids = {str(r["decision_id"]) for r in await here.pool.fetch("SELECT * FROM decisions")}
    assert {d["decision_id"] for d in told} == ids


async def test_while_a_partition_replays_its_users_are_answered_and_doubted(here):
    start = now_ms() - 300_000
    records = []
    for i in range(12_000):
        user, at = USERS[i % len(USERS)], start + i * 20
        records.append((user, payment(i, user, at), at))
    await here.publish(records)
    async with running(one := here.consumer()):
        await drained(here, one)
    oracles = await here.oracles()
    seen, progress = set(), set()
    two = here.consumer()
    async with running(two):
        while not live(two, partitions=PARTITIONS):
            for user in USERS:
                told = oracles[transactions.partition_of(user, PARTITIONS)]
                row = await here.read(user, told.frontier)
                seen |= set(row.degraded) or {"exact"}
                assert row.stats is not None
                assert (row.stats[0].count, row.stats[0].total_minor) == told.stats(
                    user, told.frontier
                ) or row.approximate
            progress |= {round(s.progress, 2) for s in two.states().values()}
            remaining = two.remaining_s()
            assert all(0 <= s < 60 for s in remaining.values())
    assert "replaying" in seen
    assert any(0 < share < 1 for share in progress)


async def test_a_record_too_large_to_be_copied_is_described_and_one_without_anything_kept(here):
    at, key = now_ms() - 5_000, transactions.key(1000)
    topic = here.config.kafka.topic(kafka.TRANSACTIONS)
    await here.kafka.send_and_wait(topic, b"x" * 950_000, key=key, timestamp_ms=at)
    await here.kafka.send_and_wait(topic, b"", key=None, timestamp_ms=at)
    async with running(one := here.consumer()):
        await drained(here, one)
    letters = [r for rs in (await here.log(kafka.DEAD_LETTERS)).values() for r in rs]
    found = {(r.key, r.value, dict(r.headers).get("cerberus-omitted")) for r in letters}
    assert found == {(key, None, b"value"), (None, b"", None)}


async def test_what_stands_behind_an_open_transaction_is_doubted(here):
    at = now_ms() - 5_000
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    writer = AIOKafkaProducer(
        bootstrap_servers=here.config.kafka.bootstrap, transactional_id=f"{name}.test"
    )
    await writer.start()
    async with running(one := here.consumer()):
        await drained(here, one)
        await writer.begin_transaction()
        await writer.send_and_wait(name, payment(1, 1000, at), key=b"1000", timestamp_ms=at)
        await here.publish([(1000, payment(2, 1000, at + 1), at + 1)])

        async def doubted():
            return "stale" in (await here.read(1000, now_ms())).degraded

        await until(doubted, "what is hidden is doubted")
        assert one.lag()[transactions.partition_of(1000, PARTITIONS)] > 0
        await writer.commit_transaction()
        await asyncio.sleep(1.2)
        await drained(here, one)
        assert (await here.read(1000, now_ms())).stats[0].count == 2
    await writer.stop()


async def test_a_broken_state_harms_no_reader_and_is_mended(here):
    at = now_ms() - 5_000
    await here.publish([(u, payment(u, u, at), at) for u in USERS])
    async with running(one := here.consumer()):
        await drained(here, one)
        key = f"cerberus:partitions:{here.config.kafka.topic(kafka.TRANSACTIONS)}"
        await here.redis.hset(key, "0", "garbage")
        assert all([await here.read(user, now_ms()) for user in USERS])

        async def mended():
            return all([(await here.read(user, now_ms())).degraded == () for user in USERS])

        await until(mended, "the state is whole again")
        assert not one.problems
