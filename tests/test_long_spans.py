"""Windows longer than the replay: what the log's replay does not reach comes from Postgres."""

import asyncio
import dataclasses
import random

import pytest
from pipeline import live, now_ms, payment, running, trained, until, world

from cerberus import features, offline, transactions

pytestmark = [pytest.mark.anyio, pytest.mark.servers]
SPANS = ("1m", "20m")
USERS = range(1000, 1010)


@pytest.fixture
async def here(environ, tmp_path):
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


def drained(here, one):
    def at_the_end():
        return live(one, partitions=2) and not any(one.lag().values())

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
    facts = [offline.TransactionFact(t, *at, 5) for t, at in zip(txn, places, strict=True)]
    await here.offline.write("a", facts[:3], [], [])
    await here.offline.write("b", facts[3:], [], [])
    past = await here.offline.seed("a", features.Fence(2, 9, 0), 0, 0)
    assert [t.transaction_id for t in past] == ["t0"]
