"""Windows reach back before the log: what was imported counts up to where the log begins."""

import collections
import dataclasses
import random

import oracle
import orjson
import pytest
from faults import set_topic
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import live, now_ms, payment, running, trained, until, world

from cerberus import kafka, partition, transactions, window
from cerberus.features import packed as packed_windows
from cerberus.postgres import facts, imports
from cerberus.stream import liveness

SPANS = ("1m", "20m")
SHORT, LONG = window.Spans(SPANS).spans_ms
USERS = range(1000, 1010)
times = st.integers(0, 40)
Record = collections.namedtuple("Record", "offset timestamp value")


def paid(i, user_id, at_ms, cents=100):
    return transactions.Transaction(f"t{i}", user_id, cents, "USD", "", at_ms)


def taken(part, transaction):
    """Let the log's next record tell of a transaction."""
    return part.take(Record(part.offset, transaction.event_ms, b""), transaction)


@settings(deadline=None)
@given(st.lists(st.tuples(times, times, st.booleans()), max_size=40), st.integers(0, 30))
def test_what_is_withdrawn_was_never_there(events, evicted_ms):
    both, rest = window.PartitionWindows(window.Spans()), window.PartitionWindows(window.Spans())
    for number, (at_ms, cents, gone) in enumerate(events):
        both.observe(paid(number, 1, at_ms, cents))
        if not gone:
            rest.observe(paid(number, 1, at_ms, cents))
    for windows in (both, rest):
        if user := windows._users.get(1):
            user.evict(evicted_ms)
    for number, (at_ms, cents, gone) in enumerate(events):
        if gone:
            both.withdraw(paid(number, 1, at_ms, cents))
    both.observe(paid(99, 1, 41))
    rest.observe(paid(99, 1, 41))
    for as_of_ms in range(42):
        assert both.stats(1, as_of_ms) == rest.stats(1, as_of_ms)
        assert both.rank(1, as_of_ms) == rest.rank(1, as_of_ms)


def test_what_the_log_tells_stands_and_is_decided_on_though_it_was_imported():
    start = partition.Start(1, 0, 0, imported_until_ms=1_000)
    part = partition.Partition(0, window.Spans(), start)
    part.seed((1,), (), [paid(0, 1, 900, 5), paid(1, 1, 1_000, 7)])
    twin = taken(part, paid(1, 1, 1_000, 9))
    assert twin.outcome is window.Outcome.ACCEPTED
    assert twin.row.stats == (window.WindowStats(2, 14),)
    assert taken(part, paid(1, 1, 1_000, 9)).outcome is window.Outcome.DUPLICATE
    part.seed((1,), (), [paid(1, 1, 1_000, 7)])  # from before that was stored
    assert taken(part, paid(1, 1, 1_000, 9)).outcome is window.Outcome.DUPLICATE
    assert taken(part, paid(2, 1, 1_001, 1)).row.stats == (window.WindowStats(3, 15),)


def test_a_row_holds_nothing_that_was_imported_of_a_time_far_ahead():
    spans = window.Spans()
    year_ms = 366 * 86_400_000
    start = partition.Start(1, 0, 0, imported_until_ms=year_ms)
    part = partition.Partition(0, spans, start)
    part.seed((1,), (), [paid(i, 1, year_ms - i * 60_000) for i in range(300)])
    taken(part, paid(1_000, 1, 5_000, 3))
    [(_, packed, stats)] = part.rows([1])
    assert stats == (window.WindowStats(1, 3),)
    recent = packed_windows.unpack(packed, spans)
    assert (len(recent.events), len(recent.tiles)) == (1, 0)


@pytest.fixture
async def here(environ, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "_PAGE", 7)
    monkeypatch.setattr(liveness, "_SEED_S", 0.01)
    changes = {"CERBERUS_REPLAY_SPAN_S": "60", "CERBERUS_PARTITIONS": "2"}
    async with world(trained(environ, tmp_path, SPANS) | changes) as opened:
        yield opened


async def import_past(here, written):
    store = here.postgres.imports.store
    await store("a file", "transactions", list(enumerate(written, 1)), imports.Progress())


async def oracles(here, imported):
    """Return each partition's oracle: what was imported up to its first record, and its log."""
    told, log = await here.oracles(), await here.log()
    for number, judge in told.items():
        begin_ms = log[number][0].timestamp
        known = {(e["user_id"], e["id"], e["at"]) for e in judge.accepted}
        judge.accepted += [
            {"offset": -1, "user_id": p.user_id, "id": p.transaction_id, "at": p.event_ms}
            | {"cents": p.amount_minor}
            for p in imported
            if transactions.partition_of(p.user_id, len(told)) == number
            and p.event_ms <= begin_ms
            and (p.user_id, p.transaction_id, p.event_ms) not in known
        ]
    return told


async def assert_rows_equal(here, imported):
    told = await oracles(here, imported)
    counts = 0
    for user in USERS:
        judge = told[transactions.partition_of(user, len(told))]
        row = await here.certain(user, judge.frontier)
        for stats, span_ms in zip(row.stats, (SHORT, LONG), strict=True):
            judge = dataclasses.replace(judge, span_ms=span_ms)
            assert (stats.count, stats.total_minor) == judge.stats(user, judge.frontier)
        counts += row.stats[1].count
    return counts


async def assert_decisions_equal(here, imported):
    told = await oracles(here, imported)
    stored = {
        (row["user_id"], row["transaction_id"], row["as_of_ms"]): orjson.loads(row["features"])
        for row in await here.pool.fetch("SELECT * FROM decisions WHERE door = 'stream'")
    }
    decided = 0
    for judge in told.values():
        for event in (e for e in judge.accepted if e["offset"] >= 0):
            found = stored[event["user_id"], event["id"], event["at"]]
            count, cents = judge.decided_on(event)
            assert found["txn_count_20m"] == count
            assert round(found["total_amount_20m"] * 100) == cents
            decided += 1
    assert decided == len(stored) > 0


def drained(here, one):
    def at_the_end():
        return live(one, partitions=2) and not any(one.lag().values())

    return until(at_the_end, "all partitions live and caught up")


def past(rng, count, start_ms, end_ms, first):
    return [
        paid(first + i, rng.choice(USERS), rng.randrange(start_ms, end_ms), rng.randrange(10**5))
        for i in range(count)
    ]


def record(transaction, cents=None):
    amount = (transaction.amount_minor if cents is None else cents) / 100
    name = transaction.transaction_id[1:]
    at_ms = transaction.event_ms
    return transaction.user_id, payment(name, transaction.user_id, at_ms, amount), at_ms


@pytest.mark.anyio
async def test_windows_start_from_what_was_imported(here):
    rng = random.Random(8)
    begin_ms = now_ms() - 300_000
    before = past(rng, 400, begin_ms - 2_000_000, begin_ms, 0)
    # The log tells these, too: some came late, some were imported with another amount.
    of_both = [p for p in before if p.event_ms > begin_ms - 20_000]
    during = sorted(past(rng, 150, begin_ms, now_ms(), 1_000), key=lambda p: p.event_ms)
    # Half of the users are known from the import alone.
    during = [p for p in during if p.user_id < 1005]
    imported = (
        before
        + [p for p in during if rng.random() < 0.3]
        + past(rng, 50, begin_ms + 30_000, now_ms(), 2_000)
    )
    await import_past(here, imported)
    first = [record(paid(5_000 + u, u, begin_ms)) for u in (1000, 1001, 1002, 1003)]
    await here.publish(first)
    await here.publish([record(p, rng.choice((None, 77))) for p in of_both])
    await here.publish([record(p) for p in during])
    async with running(one := here.consumer()):
        await drained(here, one)
        counted = await assert_rows_equal(here, imported)
        assert counted > len(during) + 50
        await assert_decisions_equal(here, imported)
    async with running(two := here.consumer()):
        await drained(here, two)
        assert await assert_rows_equal(here, imported) == counted
        await here.redis.flushdb()

        async def restored():
            rows = [await here.read(user, now_ms()) for user in USERS]
            return all(row.degraded == () for row in rows)

        await until(restored, "the rows are back")
        assert await assert_rows_equal(here, imported) == counted


async def keep_old_records(here):
    """Let the topic keep records that bear old event times."""
    await set_topic(here, here.config.kafka.topic(kafka.TRANSACTIONS), "retention.ms", "-1")


@pytest.mark.anyio
async def test_a_log_of_old_times_goes_on_where_the_import_ended(here):
    rng = random.Random(9)
    then_ms = now_ms() - 40 * 86_400_000
    before = past(rng, 200, then_ms - 2_000_000, then_ms, 0)
    await import_past(here, before)
    async with running(one := here.consumer()):
        await until(lambda: live(one, partitions=2), "an empty log is read to its end")
        after = sorted(past(rng, 100, then_ms, then_ms + 600_000, 1_000), key=lambda p: p.event_ms)
        await keep_old_records(here)
        await here.publish([record(p) for p in after])
        await until(
            lambda: one.counts["accepted"] == len(after) and drained(here, one), "all is read"
        )
        await assert_decisions_equal(here, before)


@pytest.mark.anyio
@pytest.mark.parametrize("meanwhile", ["it is live", "its past is fetched"])
async def test_a_first_record_older_than_expected_finds_what_was_imported_before_it(
    here, monkeypatch, meanwhile
):
    rng = random.Random(13)
    then_ms = now_ms() - 40 * 86_400_000
    before = past(rng, 200, then_ms - 1_200_000, then_ms, 0)
    # Of each user something of today is fetched before any record comes.
    today = past(rng, 150, now_ms() - 600_000, now_ms() - 1, 2_000)
    await import_past(here, before + today)
    monkeypatch.setattr(liveness, "_SEED_S", 0.25 if meanwhile == "it is live" else 0.0)
    async with running(one := here.consumer()):
        if meanwhile == "it is live":
            await until(lambda: live(one, partitions=2), "an empty log is read to its end")
        else:
            await until(lambda: one._liveness._seeding, "its past is fetched")
        after = sorted(past(rng, 60, then_ms, then_ms + 60_000, 1_000), key=lambda p: p.event_ms)
        # Half of the users are known from the import alone.
        after = [p for p in after if p.user_id < 1005]
        await keep_old_records(here)
        await here.publish([record(p) for p in after])
        await until(lambda: one.counts["accepted"] == len(after), "all is read")
        monkeypatch.setattr(liveness, "_SEED_S", 0.25)
        await drained(here, one)
        await assert_decisions_equal(here, before)
        # Their rows in Redis are too old to be kept.
        for number, judge in (await oracles(here, before)).items():
            [part] = [owned.part for owned in one._parts.values() if owned.part.number == number]
            for user in filter(part.at_home, USERS):
                found = part.windows.stats(user, judge.frontier)[1]
                assert (found.count, found.total_minor) == judge.stats(user, judge.frontier)


@pytest.mark.anyio
async def test_who_was_only_imported_is_counted_on_an_empty_log(here):
    before = past(random.Random(10), 100, now_ms() - 1_000_000, now_ms() - 1, 0)
    await import_past(here, before)
    async with running(one := here.consumer()):
        await until(lambda: live(one, partitions=2), "an empty log is read to its end")
        judge = oracle.Partition(LONG)
        judge.accepted = [
            {"user_id": p.user_id, "at": p.event_ms, "cents": p.amount_minor} for p in before
        ]
        for user in USERS:
            as_of_ms = now_ms()
            row = await here.certain(user, as_of_ms)
            assert (row.stats[1].count, row.stats[1].total_minor) == judge.stats(user, as_of_ms)


@pytest.mark.anyio
async def test_an_import_between_two_runs_counts_from_the_second_on(here):
    at_ms = now_ms()
    await here.publish([record(paid(5_000 + u, u, at_ms)) for u in (1000, 1001, 1002, 1003)])
    async with running(one := here.consumer()):
        await drained(here, one)
    before = past(random.Random(11), 100, at_ms - 1_000_000, at_ms - 1, 0)
    await import_past(here, before)
    async with running(two := here.consumer()):
        await drained(here, two)
        assert await assert_rows_equal(here, before) > 50


@pytest.mark.anyio
async def test_however_many_partitions_are_seeded_they_take_one_connection(
    environ, tmp_path, monkeypatch
):
    monkeypatch.setattr(facts, "_PAGE", 25)
    monkeypatch.setattr(liveness, "_SEED_S", 0.0)
    count = 6
    async with world(
        trained(environ, tmp_path, SPANS) | {"CERBERUS_PARTITIONS": str(count)}
    ) as here:
        before = past(random.Random(12), 100, now_ms() - 1_000_000, now_ms() - 1, 0)
        await import_past(here, before)
        opened = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND state = 'idle in transaction'"
        )
        seen = []
        async with running(one := here.consumer()):

            async def seeded():
                seen.append(await here.pool.fetchval(opened))
                return live(one, partitions=count)

            await until(seeded, "all partitions live")
        assert max(seen) == 1
