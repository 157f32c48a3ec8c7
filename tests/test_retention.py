"""What is older than is kept goes, in whole months; nothing else does, and nobody waits for it."""

import asyncio
import dataclasses
import datetime
import itertools
import time

import pytest
from pipeline import running, until

from cerberus import labels, settings, supervision, transactions, window
from cerberus.decisions import models, records
from cerberus.features import evaluation, fences
from cerberus.jobs import retention
from cerberus.postgres import expiry, facts, imports, months, stores
from cerberus.postgres import pool as postgres_pool

pytestmark = pytest.mark.anyio
NOW = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC)
DAYS = 100  # ends on 2026-08-16, so August and later months are kept
KEPT_FROM_MS = months.to_ms(datetime.datetime(2026, 8, 1, tzinfo=datetime.UTC))
TIMES = ("transactions", "decisions", "user_transaction_stats", "labels")


@pytest.fixture
async def config(environ):
    return settings.load(environ | {"CERBERUS_RETENTION_DAYS": str(DAYS)})


@pytest.fixture
async def pool(config):
    async with postgres_pool.connect(config) as pool:
        yield pool


@pytest.fixture
async def postgres(pool):
    postgres = stores.on(pool, ("10m",))
    await postgres.schema.migrate(NOW)
    starts = [datetime.datetime(2026, m, 1, tzinfo=datetime.UTC) for m in range(3, 12)]
    async with pool.acquire() as connection:
        for table in months.TABLES:
            assert len(await months.add(connection, table, starts[:-1])) == 8
    return postgres


def decision(paid):
    row = evaluation.FeatureRow(paid.user_id, paid.event_ms, None, None, paid.amount_minor)
    return records.Record(
        decision_id=records.of_transaction(paid),
        decision=models.Decision(row, 0.0, 0.5, models.LEGIT, "approve", "m", "p"),
        transaction=paid,
        door=records.STREAM,
        partition=0,
        decided_ms=paid.event_ms,
        spans=("10m",),
    )


async def write(postgres, i, at_ms):
    """Leave in every table what a transaction of this moment leaves."""
    paid = transactions.Transaction(f"t{i}", i, 100, "USD", "", at_ms)
    fence = fences.Fence(1, i, at_ms)
    await postgres.facts.write(
        "transactions",
        [facts.TransactionFact(paid, 1, 0, i)],
        [facts.StatsFact(i, at_ms * 1000, (window.WindowStats(1, 100),), fence)],
        [decision(paid)],
    )
    await postgres.labels.write([labels.Label(f"t{i}", "fraud", "bank", at_ms)], at_ms)


async def times(pool):
    """Return what is there, as times in ms by table."""
    columns = (*months.TABLES.values(), "extract(epoch FROM event_timestamp) * 1000", "labelled_ms")
    return {
        table: sorted([int(row[0]) for row in await pool.fetch(f"SELECT {column} FROM {table}")])
        for table, column in zip(TIMES, columns, strict=True)
    }


async def parts(pool, table):
    return {row[0] for row in await pool.fetch(months._OF_TABLE, table)}


async def sweep(config, postgres, now=NOW):
    async def held():
        pass

    progress = supervision.Progress(time.monotonic)
    return await retention.Retention(config, postgres, lambda: now).sweep(progress, held)


def every_few_days():
    """Return moments of two years around now, and those at the very edge."""
    steps = [KEPT_FROM_MS + day * 86_400_000 for day in range(-500, 300, 13)]
    return sorted({*steps, KEPT_FROM_MS - 1, KEPT_FROM_MS})


async def test_exactly_the_months_that_are_over_go_while_others_write(config, pool, postgres):
    before = every_few_days()
    for i, at_ms in enumerate(before):
        await write(postgres, i, at_ms)
    written = []

    async def go_on():
        for i in itertools.count(1_000):
            written.append(KEPT_FROM_MS + (i % 100) * 86_400_000)
            await write(postgres, i, written[-1])

    writing = asyncio.create_task(go_on())
    try:
        await until(lambda: len(written) > 5, "a writer writes")
        assert await sweep(config, postgres)
        seen = len(written)
        await until(lambda: len(written) > seen + 5, "it goes on writing")
    finally:
        writing.cancel()
        await asyncio.wait([writing])
    kept = [at_ms for at_ms in before if at_ms >= KEPT_FROM_MS]
    for table, found in (await times(pool)).items():
        some = written if len(found) == len(kept) + len(written) else written[:-1]
        assert found == sorted(kept + some), table
    names = {f"_2026_{m:02}" for m in (8, 9, 10, 11, 12)} | {"_2027_01", "_default"}
    for table in months.TABLES:
        assert await parts(pool, table) == {table + name for name in names}


async def test_a_month_in_use_is_left_for_later_and_nobody_waits_behind_it(config, pool, postgres):
    hasty = expiry.Expiry(pool, months.Patience(tries=months.PATIENT.tries, pause_s=0.05))
    postgres = dataclasses.replace(postgres, expiry=hasty)
    await write(postgres, 1, KEPT_FROM_MS - 1)
    await write(postgres, 2, KEPT_FROM_MS)
    async with pool.acquire() as reader:
        reading = reader.transaction()
        await reading.start()
        await reader.fetch("SELECT * FROM transactions")
        sweeping = asyncio.create_task(sweep(config, postgres))
        i = 10
        async with asyncio.timeout(60):
            while not sweeping.done():
                await write(postgres, i := i + 1, KEPT_FROM_MS + i)
        assert await sweeping is False
        assert i > 12
        assert "transactions_2026_07" in await parts(pool, "transactions")
        assert "decisions_2026_07" not in await parts(pool, "decisions")
        await reading.rollback()
    assert await sweep(config, postgres)
    assert KEPT_FROM_MS - 1 not in (await times(pool))["transactions"]
    assert (await times(pool))["transactions"][0] == KEPT_FROM_MS


async def test_what_has_no_month_of_its_own_goes_in_batches(config, pool, postgres):
    postgres = dataclasses.replace(postgres, expiry=expiry.Expiry(pool, blocks=1))
    old_ms = KEPT_FROM_MS - 900 * 86_400_000
    await pool.execute(
        "INSERT INTO transactions SELECT u, $1::bigint + u % 2 * $2::bigint, 't' || u, 1, 'USD', "
        "'m', 'transactions', 1, 0, u FROM generate_series(1, 2000) AS g (u)",
        old_ms,
        KEPT_FROM_MS + 900 * 86_400_000 - old_ms,
    )
    async with pool.acquire() as connection:
        rows = months.Rows("transactions_default", "event_ms < $1")
        batches = months.delete(connection, rows, KEPT_FROM_MS, blocks=1)
        statements = [deleted async for deleted in batches]
    assert sum(statements) == 1_000
    assert len(statements) > 10
    assert max(statements) < 200
    await sweep(config, postgres)
    assert len((await times(pool))["transactions"]) == 1_000


async def test_what_arrives_when_its_month_is_long_over_goes_with_the_next_sweep(
    config, pool, postgres
):
    postgres = dataclasses.replace(postgres, expiry=expiry.Expiry(pool, blocks=1))
    kept = [KEPT_FROM_MS, KEPT_FROM_MS + 900 * 86_400_000]
    for i, at_ms in enumerate(kept):
        await write(postgres, i % 2, at_ms)
    await sweep(config, postgres)
    before = [at_ms for at_ms in every_few_days() if at_ms < KEPT_FROM_MS]
    for _ in range(2):
        for i, at_ms in enumerate(before):
            await write(postgres, i % 3, at_ms)
            await write(postgres, 10 + i, at_ms)
        assert await sweep(config, postgres)
        for table, found in (await times(pool)).items():
            assert found == kept, table


async def test_whether_anything_old_is_there_is_told_by_an_index(pool, postgres):
    late_ms = KEPT_FROM_MS + 900 * 86_400_000
    await pool.execute(
        "INSERT INTO transactions SELECT u, $1::bigint + u, 't' || u, 1, 'USD', 'm', 'a', 1, 0, u "
        "FROM generate_series(1, 20000) AS g (u)",
        late_ms,
    )
    await pool.execute(
        "INSERT INTO labels SELECT 't' || u, NULL, 'fraud', 's', $1::bigint + u, 1 "
        "FROM generate_series(1, 20000) AS g (u)",
        late_ms,
    )
    await pool.execute("ANALYZE")
    for table in ("transactions_default", "labels"):
        for before_ms, old in ((late_ms + 1, False), (late_ms + 2, True)):
            assert await pool.fetchval(expiry._DUE[table], before_ms) == old
            query = expiry._DUE[table].replace("$1", str(before_ms))
            plan = await pool.fetchval(f"EXPLAIN (FORMAT JSON) {query}")
            assert "Index Cond" in plan, plan
            assert "Seq Scan" not in plan, plan


async def test_by_default_everything_is_kept_and_the_coming_months_are_made(
    environ, pool, postgres
):
    config = settings.load(environ)
    for i, at_ms in enumerate(every_few_days()):
        await write(postgres, i, at_ms)
    before = await times(pool)
    later = NOW + datetime.timedelta(days=200)
    task = retention.Retention(config, postgres, lambda: later)
    async with running(task):

        async def made():
            return "decisions_2027_08" in await parts(pool, "decisions")

        await until(made, "the months after the clock's have partitions")
    assert await times(pool) == before
    assert {"transactions_2027_06", "transactions_2027_07"} <= await parts(pool, "transactions")


async def test_one_instance_sweeps_at_a_time(config, pool, postgres):
    await write(postgres, 1, KEPT_FROM_MS - 1)
    async with postgres.locks.singleton("retention") as held:
        assert held is not None
        async with running(retention.Retention(config, postgres, lambda: NOW)):
            await asyncio.sleep(0.5)
        assert (await times(pool))["transactions"] == [KEPT_FROM_MS - 1]
    async with running(retention.Retention(config, postgres, lambda: NOW)):

        async def gone():
            return not (await times(pool))["transactions"]

        await until(gone, "it sweeps")


async def test_a_partition_that_cannot_be_made_at_once_is_left_to_the_next_time(pool, postgres):
    start = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    async with pool.acquire() as one, pool.acquire() as other:
        async with one.transaction():
            await one.execute("SELECT * FROM transactions")
            assert await months.add(other, "transactions", [start]) == []
        assert await months.add(other, "transactions", [start]) == ["transactions_2030_01"]
        assert await months.add(other, "transactions", [start]) == []
    await write(postgres, 1, months.to_ms(start))
    row = await pool.fetchrow("SELECT tableoid::regclass::text AS t FROM transactions")
    assert row["t"] == "transactions_2030_01"


async def test_an_import_waits_some_seconds_for_a_month_s_partition(pool, postgres):
    start = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
    past = stores.on(pool, ("10m",)).imports
    async with pool.acquire() as reader, reader.transaction():
        await reader.execute("SELECT * FROM transactions")
        paid = transactions.Transaction("t1", 1, 100, "USD", "", months.to_ms(start))
        storing = past.store("a file", "transactions", [(1, paid)], imports.Progress())
        making = asyncio.create_task(storing)
        await asyncio.sleep(1)
        assert not making.done()
    await asyncio.wait_for(making, 30)
    assert await pool.fetchval("SELECT to_regclass('transactions_2031_01')") is not None
