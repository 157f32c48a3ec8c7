"""Fast clocks: a time from the future casts doubt, whoever wrote it."""

import asyncio
import datetime
import time

import pytest
from asking import client
from pipeline import now_ms, payment, running, until, world
from records import decided
from served import NOW_MS, Served, redis_only, transaction

from cerberus import labels, partition, supervision, window
from cerberus.features import evaluation, fences
from cerberus.jobs import retention
from cerberus.stream import ownership

pytestmark = pytest.mark.anyio
HOUR_MS = 3_600_000
AHEAD_MS = evaluation.AHEAD_MS


@pytest.fixture
async def served(servers):
    async with Served(redis_only(servers)) as served:
        await served.stream(transaction("a", user_id=1))
        yield served


async def degraded(served, user_id=1):
    return (await served.ask(user_id=user_id)).record.decision.row.degraded


async def test_a_state_from_the_future_is_doubted(served):
    await served.live(caught_up_ms=NOW_MS + AHEAD_MS)
    assert await degraded(served) == ()
    await served.live(caught_up_ms=NOW_MS + AHEAD_MS + 1)
    assert await degraded(served) == ("clock_ahead",)
    async with client(served.app()) as http:
        told = (await http.get("/health")).json()
        assert [r for r in told["reasons"] if "clock" in r]


async def test_a_reader_whose_clock_jumps_back_doubts_everything(served):
    served.now_ms -= HOUR_MS
    assert "clock_ahead" in await degraded(served)
    assert "clock_ahead" in await degraded(served, user_id=2)


async def test_a_row_from_the_future_is_doubted(served):
    skew_ms = served.spans.max_future_skew_ms
    await served.stream(transaction("b", user_id=1, at_ms=NOW_MS + skew_ms + AHEAD_MS))
    assert "clock_ahead" not in await degraded(served)
    await served.stream(transaction("c", user_id=1, at_ms=NOW_MS + skew_ms + AHEAD_MS + 1))
    assert "clock_ahead" in await degraded(served)


async def test_a_credit_score_from_the_future_is_doubted(served):
    await served.credit(1, 700, NOW_MS + AHEAD_MS)
    assert await degraded(served) == ()
    await served.credit(1, 700, NOW_MS + AHEAD_MS + 1)
    assert await degraded(served) == ("clock_ahead",)


async def test_an_owner_with_a_clock_ahead_is_never_called_live_and_stale_once_it_is_gone(environ):
    async with world(environ | {"CERBERUS_PARTITIONS": "1"}) as here:
        ahead = here.another(clock=lambda: now_ms() + HOUR_MS).consumer

        async def reads(reason):
            row = await here.read(1000, now_ms())
            assert row.degraded, "a row of that owner passes as live"
            return reason in row.degraded

        at = now_ms()
        await here.publish([(1000, payment(1, 1000, at), at)])
        async with running(ahead):
            await until(lambda: reads("clock_ahead"), "its clock is doubted")
        await until(lambda: reads("stale"), "it is stale", 10)
        [state] = (await here.online.states()).values()
        assert state.caught_up_ms < now_ms() - evaluation.STALE_MS
        async with running(here.another().consumer):
            row = await here.certain(1000, now_ms())
        assert row.stats[0].count == 1


def test_an_owner_does_not_take_over_a_stamp_from_the_future():
    owned = ownership.Owned(
        partition.Partition(0, window.Spans(("10m",)), partition.Start(1, 0, 0))
    )
    owned.follow(fences.PartitionState(1, 0, "live", NOW_MS + HOUR_MS), NOW_MS)
    assert owned.state().caught_up_ms == NOW_MS


async def test_a_mark_of_claims_from_the_future_is_waited_for_once(environ):
    async with world(environ | {"CERBERUS_DECISION_FLUSH_MS": "2000"}) as here:
        ahead_ms = now_ms() + HOUR_MS  # one loss marks all at the same time
        for bucket in range(64):
            name = f"cerberus:claim:{here.config.kafka.prefix}{{{bucket}}}"
            await here.redis.set(name, ahead_ms)
        claimed = here.another().claims
        records = [decided(n, now_ms() - 1_000, "1") for n in range(10)]
        async with asyncio.timeout(20):  # each of them would wait for four seconds
            for record in records:
                assert await claimed.settle([record], now_ms(), set()) == [record]


async def test_a_label_is_known_when_it_is_stored_though_the_writer_s_clock_is_ahead(environ):
    async with world(environ) as here:
        label = labels.Label("t", "fraud", "bank", now_ms())
        await here.postgres.labels.write([label], now_ms() + HOUR_MS)
        seen_ms = await here.pool.fetchval("SELECT seen_ms FROM labels")
        assert seen_ms <= now_ms() + 1_000


async def test_a_clock_ahead_removes_no_history_too_early(environ):
    def clock():
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=4_000)

    async with world(environ | {"CERBERUS_RETENTION_DAYS": "365"}) as here:
        label = labels.Label("t", "fraud", "bank", now_ms())
        await here.postgres.labels.write([label], now_ms())
        swept = retention.Retention(here.config, here.postgres, clock)
        progress = supervision.Progress(time.monotonic)
        async with here.postgres.locks.singleton("retention") as still_held:
            assert await swept.sweep(progress, still_held)
        assert await here.pool.fetchval("SELECT count(*) FROM labels") == 1
