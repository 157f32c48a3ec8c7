"""How long look-ups among a million decisions take, compared with `SELECT 1`, and a full report.

    python benchmarks/lookups.py [--decisions 1000000] [--rounds 2000]

The decisions belong to ten thousand users and are spread over twelve months; one in twenty is
labelled. Each round draws a decision at random and runs `SELECT 1` and every look-up of it, in
random order, through the service's own code. One call waits for the other, so all use the same
connection. HTTP is left out: `benchmarks/predict.py` measures it. Kafka, Redis and Postgres are
started for the run in a temporary directory and stopped after it.
"""

import argparse
import asyncio
import collections
import contextlib
import datetime
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

import uvloop

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import predict  # noqa: E402

from cerberus import assembly, clock, settings, stack, transactions  # noqa: E402
from cerberus.postgres import judged, months  # noqa: E402
from cerberus.postgres import pool as postgres_pool  # noqa: E402

MONTHS, USERS, LABELLED, WARM, DEADLINE_S = 12, 10_000, 20, 50, 1_800.0
FILL = """
INSERT INTO decisions (decision_id, as_of_ms, user_id, transaction_id, amount_minor, currency,
    merchant_id, door, features, degraded, approximate, score, probability, prediction, decision,
    model_sha256, policy_sha256, fence_epoch, fence_offset, fence_as_of_ms, fence_partition,
    latency_ms, trace_id, decided_at)
SELECT gen_random_uuid(), at, $4::bigint + i * 7919 % $5::bigint, 'order-' || i, 100 + i % 90000,
    'USD', 'shop-' || i % 5000, 'stream', jsonb_build_object('txn_count_10m', i % 9,
    'total_amount_10m', i % 9 * 19.99, 'credit_score', 300 + i % 550), '{}', false, -1.5, 0.25,
    'LEGIT', CASE i % 50 WHEN 0 THEN 'decline' WHEN 1 THEN 'review' ELSE 'approve' END,
    repeat('ab', 32), repeat('cd', 32), 1, i, at, i % 6, '{"features": 0.4, "model": 0.2}', NULL,
    timestamptz 'epoch' + (at + 20) * interval '1 millisecond'
FROM (SELECT i, $1::bigint + ($2::bigint - $1::bigint) * i / $3::bigint AS at
    FROM generate_series(0, $3::bigint - 1) AS i) AS t
"""
LABEL = """
INSERT INTO labels (transaction_id, user_id, label, source, labelled_ms, seen_ms)
SELECT transaction_id, NULL, 'fraud', 'bank', as_of_ms + 86400000, as_of_ms + 86400000
FROM decisions WHERE fence_offset % $1 = 0
"""
DRAW = """
SELECT decision_id, transaction_id, user_id, as_of_ms FROM decisions ORDER BY random() LIMIT $1
"""


async def fill(pool, count, now):
    """Write decisions of the last months, and labels."""
    begins = {months.start_of(now - datetime.timedelta(days=30 * n)) for n in range(MONTHS)}
    low_ms, high_ms = months.to_ms(min(begins)), months.to_ms(now)
    async with postgres_pool.connection(pool) as connection:
        await months.add(connection, "decisions", sorted(begins))
        began_s = time.perf_counter()
        of_users = (predict.FIRST_USER, USERS)
        await connection.execute(FILL, low_ms, high_ms, count, *of_users, timeout=DEADLINE_S)
        await connection.execute(LABEL, LABELLED, timeout=DEADLINE_S)
        await connection.execute("VACUUM ANALYZE", timeout=DEADLINE_S)
        size = await connection.fetchval(
            "SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits "
            "WHERE inhparent = 'decisions'::regclass"
        )
    print(
        f"{count:,} decisions of {USERS:,} users in {len(begins)} months, {size / 2**20:,.0f} MiB "
        f"with their indexes, written in {time.perf_counter() - began_s:.0f} s"
    )


async def select(pool):
    """Run `SELECT 1`."""
    async with postgres_pool.connection(pool) as connection:
        await connection.fetchval("SELECT 1")


def questions(pool, asked, row):
    """Return the look-ups of a decision, by name."""
    name, transaction_id, user_id = (str(value) for value in row[:3])
    before = transactions.format_ms(row["as_of_ms"])
    return {
        "SELECT 1": lambda: select(pool),
        "a decision by its id": lambda: asked.decision(name),
        "decisions on a transaction": lambda: asked.decisions({"transaction_id": transaction_id}),
        "a user's newest 50": lambda: asked.decisions({"user_id": user_id}),
        "a user's 50 before": lambda: asked.decisions({"user_id": user_id, "before": before}),
        "a user's window and last 10": lambda: asked.user(user_id),
    }


async def measure(pool, asked, rounds):
    """Run all look-ups in turns, and return how long each took, ms."""
    async with postgres_pool.connection(pool) as connection:
        drawn = await connection.fetch(DRAW, WARM + rounds, timeout=DEADLINE_S)
    took = collections.defaultdict(list)
    for number, row in enumerate(drawn):
        wanted = questions(pool, asked, row)
        turn = list(wanted.items())
        random.shuffle(turn)
        for label, ask in turn:
            began_s = time.perf_counter()
            await ask()
            if number >= WARM:
                took[label].append((time.perf_counter() - began_s) * 1000)
    return {label: took[label] for label in wanted}


def report(took, rounds):
    """Print medians and 99th percentiles, and their ratios to those of `SELECT 1`."""
    print(f"{rounds:,} rounds, {os.cpu_count()} cores; ms, and as multiples of SELECT 1")
    print(f"{'look-up':<28}{'p50':>16}{'p99':>16}")
    base = None
    for label, times in took.items():
        cuts = statistics.quantiles(times, n=100)
        found = (cuts[49], cuts[98])
        base = base or found
        cells = (f"{ms:>8.3f} ×{ms / of:>6.2f}" for ms, of in zip(found, base, strict=True))
        print(f"{label:<28}{''.join(cells)}")


@contextlib.asynccontextmanager
async def opened(environ):
    """Open a service whose tables exist."""
    config = settings.load(environ)
    now_ms = clock.now_ms()
    async with assembly.open(config, clock=lambda: now_ms) as service:
        await service.postgres.schema.migrate()
        yield service


async def run(environ, count, rounds):
    """Fill, measure, report."""
    await predict.rows(environ)
    now = datetime.datetime.now(datetime.UTC)
    async with asyncio.timeout(DEADLINE_S), opened(environ) as service:
        await fill(service.pool, count, now)
        report(await measure(service.pool, service.lookups, rounds), rounds)
        times = []
        for _ in range(3):
            began_s = time.perf_counter()
            told = await service.postgres.judged.report(
                months.to_ms(now), judged.Question(), DEADLINE_S
            )
            times.append(time.perf_counter() - began_s)
        [model] = told["models"]
        count = sum(model["total"][name] for name in ("matured", "excluded", "immature"))
        print(f"accuracy report on {count:,} decisions: {statistics.median(times):.2f} s")


def main():
    """Start the servers, measure, stop them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--decisions", type=int, default=1_000_000, help="rows in the table")
    parser.add_argument("--rounds", type=int, default=2_000, help="measurements of each look-up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cerberus-") as directory:
        pathlib.Path(directory).chmod(0o755)
        with stack.servers(pathlib.Path(directory), os.environ, durable=False) as servers:
            uvloop.run(run(servers.environ, options.decisions, options.rounds))


if __name__ == "__main__":
    main()
