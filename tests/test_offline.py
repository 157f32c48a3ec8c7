"""Postgres: writes are idempotent, the right row wins, one instance holds a singleton."""

import asyncio
import datetime
import functools
import pathlib
import random

import asyncpg
import pytest
from pipeline import until

from cerberus import errors, settings, transactions, window
from cerberus.decisions import models, policy, records
from cerberus.features import evaluation, fences
from cerberus.postgres import facts, months, schema, stores
from cerberus.postgres import pool as postgres_pool

pytestmark = pytest.mark.anyio
NOW_MS = 1_790_000_000_000
TOPIC = "transactions"


@pytest.fixture
async def pool(environ):
    async with postgres_pool.connect(settings.load(environ)) as pool:
        yield pool


@pytest.fixture
async def postgres(pool):
    postgres = stores.on(pool, ("10m",))
    await postgres.schema.migrate()
    return postgres


def transaction(i, user_id=1, amount=100, at=NOW_MS):
    return transactions.Transaction(f"t{i}", user_id, amount, "USD", "m", at)


def fact(txn, offset, epoch=1):
    return facts.TransactionFact(txn, epoch, 0, offset)


def stats(count, offset, epoch=1, user_id=1, at=NOW_MS):
    return facts.StatsFact(
        user_id,
        at * 1000,
        (window.WindowStats(count, count * 150),),
        fences.Fence(epoch, offset, at),
    )


def decision(i, probability=0.5):
    txn = transaction(i, amount=1250, at=NOW_MS + i)
    row = evaluation.FeatureRow(
        user_id=1,
        as_of_ms=txn.event_ms,
        stats=(window.WindowStats(2, 1999),),
        credit_score=None,
        amount_minor=1250,
        fence=fences.Fence(1, i, NOW_MS),
        degraded=("warming", "stale"),
    )
    decided = models.Decision(row, -1.5, probability, models.LEGIT, policy.APPROVE, "ab", "cd")
    name = records.of_transaction(txn)
    return records.Record(name, decided, txn, records.STREAM, 3, NOW_MS, ("10m",))


async def test_migrations_apply_once_however_many_start_together(pool):
    serving = [stores.on(pool, ("10m", "1h")) for _ in range(4)]
    applied = await asyncio.gather(*(one.schema.migrate() for one in serving))
    assert sorted(len(names) for names in applied) == [0, 0, 0, len(max(applied))]
    columns = await pool.fetch(
        "SELECT column_name FROM information_schema.columns "
        "WHERE table_name = 'user_transaction_stats'"
    )
    assert {"transaction_count_1h", "total_amount_10m"} <= {c["column_name"] for c in columns}


async def test_a_new_window_is_added_to_tables_that_hold_data(pool, postgres):
    await postgres.facts.write(TOPIC, [], [stats(3, 7)], [])
    await stores.on(pool, ("10m", "24h")).schema.migrate()
    row = await pool.fetchrow("SELECT * FROM user_transaction_stats")
    assert (row["transaction_count_10m"], row["transaction_count_24h"]) == (3, None)


async def test_months_have_partitions_and_other_times_are_kept_all_the_same(pool, postgres):
    await postgres.schema.migrate(datetime.datetime(2026, 11, 5, tzinfo=datetime.UTC))
    december = 1_796_100_000_000
    for i, at in enumerate((december, 1_000, 7_000_000_000_000)):
        await postgres.facts.write(TOPIC, [fact(transaction(i, at=at), i)], [], [])
    where = await pool.fetch("SELECT event_ms, tableoid::regclass::text AS t FROM transactions")
    assert {r["event_ms"]: r["t"] for r in where} == {
        december: "transactions_2026_12",
        1_000: "transactions_default",
        7_000_000_000_000: "transactions_default",
    }


async def test_nobody_waits_for_what_a_migration_has_done(pool, postgres):
    slow = schema.Schema(pool, ("10m",), patience=months.Patience(lock_ms=8_000, work_ms=8_000))
    waiting = (
        "SELECT count(*) FROM pg_locks WHERE relation = 'decisions'::regclass AND NOT granted "
        "AND mode = 'AccessExclusiveLock'"
    )
    held = (
        "SELECT DISTINCT relation::regclass::text AS name FROM pg_locks "
        "WHERE relation::regclass::text ~ '^(transactions|decisions)' AND granted "
        "AND mode ~ 'Exclusive'"
    )
    locked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    async with pool.acquire() as reader:
        async with reader.transaction():
            await reader.execute("SELECT * FROM decisions")
            later = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
            starting = asyncio.create_task(slow.migrate(later))
            await until(lambda: pool.fetchval(waiting), "a start waits for one table's month")
            assert [row["name"] for row in await pool.fetch(held)] == []
            assert await pool.fetchval(locked) == 0
            # What was asked for first is there, and another start has nothing to wait for.
            assert await pool.fetchval("SELECT to_regclass('transactions_2031_03')")
            assert not starting.done()
        await starting
    assert await pool.fetchval("SELECT to_regclass('decisions_2031_03')")


async def test_a_migration_that_fails_leaves_nothing(pool, monkeypatch):
    monkeypatch.setitem(schema._MIGRATIONS, "999_wrong.sql", "SELECT no_such_column")
    with pytest.raises(errors.StoreUnavailable):
        await stores.on(pool, ("10m",)).schema.migrate()
    assert await pool.fetchval("SELECT to_regclass('transactions')") is None
    monkeypatch.delitem(schema._MIGRATIONS, "999_wrong.sql")
    assert len(await stores.on(pool, ("10m",)).schema.migrate()) == len(schema._MIGRATIONS)


async def test_any_order_and_any_repetition_of_writes_ends_in_the_same_rows(pool, postgres):
    rng = random.Random(5)
    written = [
        fact(transaction(i % 4, amount=100 + offset), offset, epoch)
        for offset, (i, epoch) in enumerate((i, e) for e in (1, 2) for i in range(10))
    ]
    history = [stats(f.log_offset % 5, f.log_offset, f.epoch) for f in written]
    seen = set()
    for _ in range(8):
        await pool.execute("TRUNCATE transactions, user_transaction_stats, log_positions")
        work = [*zip(written, history, strict=True)] * 2
        rng.shuffle(work)
        while work:
            some, work = work[: (n := rng.randint(1, 9))], work[n:]
            # One batch is a stretch of one log, in its order.
            some.sort(key=lambda pair: (pair[0].epoch, pair[0].log_offset))
            for epoch in (1, 2):
                mine = [pair for pair in some if pair[0].epoch == epoch]
                await postgres.facts.write(TOPIC, [f for f, _ in mine], [s for _, s in mine], [])
        rows = await pool.fetch(
            "SELECT transaction_id, amount_minor, epoch, log_offset FROM transactions ORDER BY 1"
        )
        assert [(r["epoch"], r["log_offset"]) for r in rows] == [(2, o) for o in range(10, 14)]
        kept = await pool.fetch(
            "SELECT epoch, log_offset, transaction_count_10m FROM user_transaction_stats"
        )
        assert [tuple(r) for r in kept] == [(2, 19, 4)]
        ends = await pool.fetch("SELECT epoch, log_offset FROM log_positions ORDER BY 1")
        assert [tuple(r) for r in ends] == [(1, 10), (2, 20)]
        seen.add(tuple(map(tuple, rows)))
    assert len(seen) == 1


async def test_a_row_s_created_time_stays_when_a_greater_fence_wins(pool, postgres):
    await postgres.facts.write(TOPIC, [], [stats(1, 5)], [])
    created = await pool.fetchval("SELECT created_timestamp FROM user_transaction_stats")
    await postgres.facts.write(TOPIC, [], [stats(2, 6)], [])
    row = await pool.fetchrow("SELECT * FROM user_transaction_stats")
    assert (row["transaction_count_10m"], row["created_timestamp"]) == (2, created)


async def test_a_decision_is_kept_as_it_was_first_taken(pool, postgres):
    first = [decision(1, 0.25), decision(2)]
    await postgres.facts.write(TOPIC, [], [], first)
    await postgres.facts.write(TOPIC, [], [], [decision(1, 0.75)])
    assert await postgres.ledger.of_user(1, 9) == first[::-1]
    row = await pool.fetchrow("SELECT * FROM decisions ORDER BY as_of_ms")
    assert (row["probability"], row["decision"]) == (0.25, "approve")
    assert row["degraded"] == ["warming", "stale"]
    assert row["features"] == (
        '{"credit_score": null, "txn_count_10m": 2, "total_amount_10m": 19.99}'
    )


PREVIOUS = """
INSERT INTO decisions (decision_id, as_of_ms, user_id, transaction_id, amount_minor, door, features,
    degraded, approximate, score, probability, prediction, model_sha256, fence_epoch, fence_offset,
    fence_as_of_ms)
SELECT gen_random_uuid(), $1::bigint + i, i % 2, 't' || i, 1250, 'stream',
    '{"credit_score": 700, "txn_count_10m": 2, "total_amount_10m": 19.99}', '{stale}', false, -1.5,
    0.25, CASE WHEN i % 3 = 0 THEN 'FRAUD' ELSE 'LEGIT' END, 'ab', 1, i, $1
FROM generate_series(0, 8) AS i
"""


async def test_decisions_of_the_version_before_there_was_a_policy_can_still_be_read(pool):
    first, *_ = sorted((pathlib.Path(schema.__file__).parent / "migrations").glob("*.sql"))
    async with pool.acquire() as connection:
        await connection.execute(
            "CREATE TABLE schema_migrations (name text PRIMARY KEY, applied_at timestamptz)"
        )
        await connection.execute(first.read_text())
        await connection.execute("INSERT INTO schema_migrations VALUES ($1, now())", first.name)
        await connection.execute(
            "CREATE TABLE decisions_2026_09 PARTITION OF decisions FOR VALUES "
            f"FROM ({NOW_MS}) TO ({NOW_MS + 4})"
        )
        await connection.execute(PREVIOUS, NOW_MS)
        written = await connection.fetch("SELECT decision_id, decided_at FROM decisions")
    postgres = stores.on(pool, ("10m",))
    assert first.name not in await postgres.schema.migrate()
    found = [r for user_id in (0, 1) for r in await postgres.ledger.of_user(user_id, 9)]
    assert sorted(r.transaction.transaction_id for r in found) == [f"t{i}" for i in range(9)]
    for record in found:
        fraud = record.transaction.event_ms % 3 == NOW_MS % 3
        assert record.decision.action == (policy.DECLINE if fraud else policy.APPROVE)
        assert record.decision.row.stats == (window.WindowStats(2, 1999),)
        assert (record.decision.policy_sha256, record.partition) == ("", None)
        assert {r["decision_id"]: r["decided_at"] for r in written}[record.decision_id]
    await postgres.facts.write(TOPIC, [], [], [decision(1)])
    assert await postgres.ledger.get(decision(1).decision_id) == decision(1)


async def test_the_epoch_rises_with_the_cluster_the_count_and_once_for_an_ended_life(postgres):
    first = await postgres.lives.epoch("c1", TOPIC, 6)
    assert await postgres.lives.epoch("c1", TOPIC, 6) == first
    second = await postgres.lives.epoch("c1", TOPIC, 7)
    third = await postgres.lives.epoch("c2", TOPIC, 7)
    assert first < second < third
    risen = [await postgres.lives.epoch("c2", TOPIC, 7, ended=third) for _ in range(3)]
    assert risen[0] > third
    assert set(risen) == {risen[0]}


async def test_stored_effects_are_known_by_epoch_and_partition(postgres):
    await postgres.facts.write(TOPIC, [fact(transaction(1), 3)], [], [])
    assert await postgres.lives.has_rows(TOPIC, 1, 0)
    assert not await postgres.lives.has_rows(TOPIC, 2, 0)
    assert not await postgres.lives.has_rows(TOPIC, 1, 1)


async def test_a_seed_holds_only_the_log_before_the_fence_in_pages(postgres, monkeypatch):
    written = [fact(transaction(i, user_id=i % 2, at=NOW_MS + i), i) for i in range(10)]
    await postgres.facts.write(TOPIC, written, [], [])
    before = facts.Prefix(TOPIC, 0, fences.Fence(1, 7, 0), 1)
    [past] = [page async for page in postgres.facts.seed(before, NOW_MS + 1, {1})]
    assert sorted(t.transaction_id for t in past) == ["t3", "t5"]
    monkeypatch.setattr(facts, "_PAGE", 2)
    everyone = [page async for page in postgres.facts.seed(before, NOW_MS + 1)]
    assert [len(page) for page in everyone] == [2, 2, 1]
    assert {t.transaction_id for page in everyone for t in page} == {f"t{i}" for i in range(2, 7)}


async def test_a_seed_reads_the_end_of_a_month_not_all_of_it(pool, postgres):
    month = datetime.datetime(2026, 11, 5, tzinfo=datetime.UTC)
    await postgres.schema.migrate(month)
    at_ms = months.to_ms(months.start_of(month))
    await pool.execute(
        "INSERT INTO transactions SELECT u % 100, $1::bigint + u, 't' || u, 1, 'USD', 'm', "
        f"'{TOPIC}', 1, u % 6, u FROM generate_series(1, 60000) AS g (u)",
        at_ms,
    )
    await pool.execute("VACUUM ANALYZE transactions")
    query = facts._SEED
    for i, value in enumerate((at_ms + 59_000, f"'{TOPIC}'", 1, 1, 0, 99_999), 1):
        query = query.replace(f"${i}", str(value))
    plan = [row[0] for row in await pool.fetch(f"EXPLAIN (ANALYZE, TIMING off) {query}")]
    assert any("Bitmap Index Scan on transactions_2026_11_event_ms" in line for line in plan), plan
    [skipped] = [line for line in plan if "Removed by Index Recheck" in line]
    assert int(skipped.split()[-1]) < 20_000


async def test_a_seed_has_a_deadline_for_each_page_and_none_for_all(environ, postgres, monkeypatch):
    written = [fact(transaction(i, at=NOW_MS + i), i) for i in range(40)]
    await postgres.facts.write(TOPIC, written, [], [])
    monkeypatch.setattr(facts, "_PAGE", 4)
    before = facts.Prefix(TOPIC, 0, fences.Fence(1, 99, 0), 1)
    # A tenth of a second a row.
    monkeypatch.setattr(facts, "_SEED", facts._SEED + "AND pg_sleep(0.1)::text = ''")
    hurried = functools.partial(asyncpg.create_pool, environ["DATABASE_URL"])
    async with hurried(command_timeout=2) as pool:
        slow = stores.on(pool, ("10m",))
        seen = [page async for page in slow.facts.seed(before, 0)]
        assert sum(map(len, seen)) == 40
    async with hurried(command_timeout=0.2) as pool:
        slow = stores.on(pool, ("10m",))
        with pytest.raises(errors.StoreUnavailable):
            await anext(slow.facts.seed(before, 0))


async def test_one_holds_a_singleton_until_it_lets_go_or_its_connection_dies(pool, postgres):
    async with postgres.locks.singleton("producer") as held:
        await held()
        async with (
            postgres.locks.singleton("producer") as other,
            postgres.locks.singleton("else") as different,
        ):
            assert other is None
            assert different is not None
    async with postgres.locks.singleton("producer") as held:
        assert held is not None
        await pool.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
        )
        with pytest.raises(errors.StoreUnavailable):
            await held()

        async def free():  # the server ends a connection before it lets go of its locks
            async with postgres.locks.singleton("producer") as taken:
                return taken is not None

        await until(free, "another has it", 10)


async def test_an_unreachable_store_says_so_and_a_refusing_one_names_the_setting(environ):
    away = settings.load(environ | {"DATABASE_URL": "postgresql://x@127.0.0.1:1/x"})
    async with postgres_pool.connect(away) as pool:
        with pytest.raises(errors.StoreUnavailable):
            await stores.on(pool, ("10m",)).schema.check()
    base = environ["DATABASE_URL"].rpartition("/")[0]
    wrong = settings.load(environ | {"DATABASE_URL": f"{base}/no_such_database"})
    async with postgres_pool.connect(wrong) as pool:
        with pytest.raises(errors.ConfigError, match="DATABASE_URL"):
            await stores.on(pool, ("10m",)).schema.check()


async def test_credit_scores_are_seeded_once(pool, postgres):
    at = datetime.datetime(2026, 11, 2, tzinfo=datetime.UTC)
    for score in (700, 800):
        await postgres.credit_scores.seed([(1, score)], at)
    assert [r["credit_score"] for r in await pool.fetch("SELECT * FROM credit_scores")] == [700]
