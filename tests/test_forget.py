"""One person leaves every store; nobody else loses anything."""

import dataclasses
import os
import subprocess
import sys

import pytest
from pipeline import live, now_ms, payment, running, until, world
from service import ROOT

from cerberus import clock, kafka, labels, settings, transactions
from cerberus.commands import forget
from cerberus.decisions import records
from cerberus.online import layout
from cerberus.online import pool as redis_pool
from cerberus.postgres import imports
from cerberus.postgres import pool as postgres_pool

pytestmark = pytest.mark.anyio
GONE, STAYS = 1005, 1006
TABLES = (
    "transactions",
    "user_transaction_stats",
    "decisions",
    "credit_scores",
    "labels",
    "synthetic_truth",
    "history_due",
)


def command(environ, *arguments, answer=""):
    return subprocess.run(
        [sys.executable, "-m", "cerberus", "forget", *map(str, arguments)],
        env=os.environ | environ,
        cwd=ROOT,
        input=answer,
        capture_output=True,
        text=True,
        timeout=60,
    )


async def fill(environ):
    """Let two users leave traces everywhere, some under the same transaction ids."""
    at_ms = now_ms() - 20_000
    async with world(environ) as here:
        await here.publish(
            (user, payment(name, user, at_ms + i, 1.5), at_ms + i)
            for i, (user, name) in enumerate(
                [(user, f"{user}-{n}") for user in (GONE, STAYS) for n in range(9)]
                + [(GONE, "both"), (STAYS, "both")]
            )
        )
        async with running(one := here.consumer()):
            await until(lambda: live(one, partitions=3) and not any(one.lag().values()), "read")
        kept = here.postgres.imports
        old = [
            transactions.Transaction(f"old-{user}", user, 100, "USD", "", at_ms - 10**9)
            for user in (GONE, STAYS)
        ]
        progress = imports.Progress()
        await kept.store("a file", "transactions", list(enumerate(old)), progress)
        await kept.compute(10)
        await kept.store("a file", "transactions", list(enumerate(old)), progress)
        scores = [(0, imports.Score(user, at_ms, 700)) for user in (GONE, STAYS)]
        await kept.store("a file", "credit_scores", scores, progress)
        told = [
            labels.Label(f"t{GONE}-0", "fraud", "bank", at_ms),
            labels.Label(f"t{GONE}-1", "fraud", "bank", at_ms, GONE),
            labels.Label(f"t{STAYS}-0", "fraud", "bank", at_ms),
            labels.Label(f"t{STAYS}-1", "fraud", "bank", at_ms, STAYS),
            labels.Label("tboth", "fraud", "bank", at_ms),
            labels.Label("tboth", "chargeback", "bank", at_ms, GONE),
            labels.Label("nobody's", "fraud", "bank", at_ms),
        ]
        await here.postgres.labels.write(told, at_ms)
        await here.postgres.labels.expect(
            [
                labels.Label(f"t{user}-2", "fraud", "synthetic", at_ms, user)
                for user in (GONE, STAYS)
            ]
        )
        # A request's decision, which has its claim alone.
        [record] = await here.postgres.ledger.of_user(GONE, 1)
        asked = dataclasses.replace(record.transaction, transaction_id="by-http")
        claimed = dataclasses.replace(
            record, decision_id=records.of_transaction(asked), transaction=asked
        )
        await here.postgres.ledger.write([claimed])
        judge = here.claims(here.config)
        assert await judge.claim([claimed], now_ms(), {claimed.decision_id}) == [claimed]
        await here.redis.hset(key(GONE), b"cerberus:split", b"1")


def key(user_id):
    return layout.entity_key(user_id, layout.PROJECT)


async def traces(environ):
    """Return all rows of Postgres, and all of Redis but for what is no user's."""
    config = settings.load(environ)
    async with postgres_pool.connect(config) as pool, redis_pool.connect(config) as redis:
        rows = {
            table: sorted(map(repr, await pool.fetch(f"SELECT * FROM {table}"))) for table in TABLES
        }
        names = [name async for name in redis.scan_iter(count=1_000)]
        hashes = {
            name: await redis.hgetall(name)  # type: ignore[misc]  # said of both clients, with and without a loop
            for name in names
            if name in map(key, (GONE, STAYS))
        }
        told = {
            name: records.unpack(await redis.get(name)).decision.row.user_id
            for name in names
            if name.startswith(b"cerberus:claim:") and len(name.rpartition(b":")[2]) == 32
        }
    return rows, hashes, told


def of(user_id, rows):
    return [row for row in rows if f"user_id={user_id}" in row]


@pytest.fixture
def quiet(environ):
    return environ | {"CERBERUS_PARTITIONS": "3", "CERBERUS_RATE": "0"}


async def test_forgotten_is_who_leaves_no_trace_and_nobody_else(quiet):
    await fill(quiet)
    rows, hashes, told = await traces(quiet)
    for table in TABLES:
        assert of(GONE, rows[table]), table
        assert of(STAYS, rows[table]), table
    assert len([name for name, user_id in told.items() if user_id == GONE]) == 11
    done = command(quiet, GONE, "--yes")
    assert done.returncode == 0, done.stderr
    left, left_hashes, left_told = await traces(quiet)
    for table in TABLES:
        gone = of(GONE, rows[table])
        if table == "labels":
            gone += [row for row in rows[table] if f"'t{GONE}-0'" in row]
        assert left[table] == sorted(set(rows[table]) - set(gone)), table
        assert f"{len(gone)} in {table}" in done.stdout
    assert left_hashes == {name: value for name, value in hashes.items() if name != key(GONE)}
    assert left_told == {name: user_id for name, user_id in told.items() if user_id != GONE}
    again = command(quiet, GONE, "--yes")
    assert "removed: 0 in Redis, 0 in labels" in again.stdout


async def test_nothing_goes_before_it_is_agreed_to(quiet):
    await fill(quiet)
    before = await traces(quiet)
    for answer in ("", "y\n", f"{STAYS}\n"):
        done = command(quiet, GONE, answer=answer)
        assert done.returncode == 1
        assert "nothing was removed" in done.stdout
    rows, hashes, _ = before
    assert (await traces(quiet))[:2] == (rows, hashes)
    assert command(quiet, GONE, answer=f"{GONE}\n").returncode == 0
    assert key(GONE) not in (await traces(quiet))[1]
    assert command(quiet, "somebody", "--yes").returncode == 1


async def test_what_the_log_still_holds_is_said_topic_by_topic(quiet):
    config = settings.load(quiet)
    at_ms = clock.now_ms()
    assert await forget.held_by_the_log(config, at_ms) == [
        f"topic {config.kafka.topic(name)}: the broker does not show how long it keeps records"
        for name in forget.TOPICS
    ]
    await kafka.create_topics(config)
    told = await forget.held_by_the_log(config, at_ms)
    assert len(told) == 5
    for sentence in told:
        assert "retention.ms" in sentence
    assert transactions.format_ms(at_ms + 2 * 604_800_000) in told[0]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"retention.ms": "-1"}, "for ever"),
        ({"retention.ms": "9223372036854775807"}, "never"),
        ({"retention.ms": "1000", "cleanup.policy": "compact"}, "compacted"),
        ({"retention.ms": "1000", "cleanup.policy": "compact,delete"}, "1970-01-01T00:00:01"),
        ({"retention.ms": "1000", "segment.ms": "500"}, "1970-01-01T00:00:01.500Z"),
    ],
)
def test_how_long_a_topic_holds_records(found, said):
    assert said in forget.held(found, 0)
