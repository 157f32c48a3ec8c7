"""The decision path against a real Redis: counted once, alone or in company, never invented."""

import asyncio
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import NOW_MS, Served, redis_only, transaction

from cerberus import errors, transactions
from cerberus.features import fences
from cerberus.serving import predictor

pytestmark = pytest.mark.anyio
SPAN_MS = 600_000
on_servers = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def environ(servers):
    return redis_only(servers)


@pytest.fixture
async def served(environ):
    async with Served(environ) as served:
        yield served


def values(prediction):
    stats = prediction.record.decision.row.stats
    return None if stats is None else (stats[0].count, stats[0].total_minor)


def in_hand(txn):
    return {
        "user_id": txn.user_id,
        "transaction_id": txn.transaction_id,
        "amount": txn.amount_minor / 100,
        "timestamp": transactions.format_ms(txn.event_ms),
    }


def oracle(log, user_id, as_of_ms, hand=None):
    """Count each identity in `(as_of − span, as_of]` once, the one in hand by its own amount."""
    found = {
        (t.transaction_id, t.event_ms): t.amount_minor
        for t in reversed(log)  # the first record of an identity stands
        if t.user_id == user_id
    }
    if hand is not None:
        found[hand.transaction_id, hand.event_ms] = hand.amount_minor
    inside = [a for (_, at), a in found.items() if as_of_ms - SPAN_MS < at <= as_of_ms]
    return len(inside), sum(inside)


async def test_a_transaction_in_hand_counts_once_before_and_after_the_stream_has_it(served):
    hand = transaction("b", amount_minor=2_550)
    await served.stream(transaction("a", at_ms=NOW_MS - 1_000))
    before = await served.ask(**in_hand(hand))
    await served.stream(hand)
    await served.forget()
    after = await served.ask(**in_hand(hand))
    assert values(before) == values(after) == (2, 3_550)
    assert before.record.decision.probability == after.record.decision.probability
    assert after.record.decision.row.degraded == ()


async def test_the_same_id_at_another_time_is_another_transaction(served):
    await served.stream(transaction("a", at_ms=NOW_MS - 1_000))
    assert values(await served.ask(**in_hand(transaction("a")))) == (2, 2_000)


async def test_asking_feeds_no_window(served):
    await served.stream(transaction("a"))
    await served.ask(**in_hand(transaction("b")))
    assert values(await served.ask(user_id=1)) == (1, 1_000)


async def test_a_value_leaves_the_window_to_the_millisecond_by_itself(served):
    await served.stream(transaction("a"))
    served.now_ms = NOW_MS + SPAN_MS - 1
    await served.live()
    assert values(await served.ask(user_id=1)) == (1, 1_000)
    served.now_ms += 1
    assert values(await served.ask(user_id=1)) == (0, 0)


moments = st.integers(-SPAN_MS - 30_000, 50_000).map(lambda ms: NOW_MS + ms)
streamed = st.builds(
    transaction,
    st.sampled_from("abcdef"),
    user_id=st.integers(1, 3),
    amount_minor=st.integers(0, 10**6),
    at_ms=st.sampled_from([NOW_MS, NOW_MS - 1, NOW_MS - SPAN_MS]) | moments,
)
asked = st.one_of(
    streamed,
    st.tuples(st.integers(1, 4), st.integers(-30_000, 60_000).map(lambda ms: NOW_MS + ms)),
)


def identity(ask):
    return ask if isinstance(ask, tuple) else (ask.user_id, ask.transaction_id, ask.event_ms)


@on_servers
@given(
    log=st.lists(streamed, min_size=1, max_size=30),
    asks=st.lists(asked, min_size=1, unique_by=identity),
)
async def test_a_batch_equals_the_oracle_and_each_request_alone(environ, log, asks):
    served = Served(environ)
    try:
        await served.client.flushdb()
        await served.stream(*log)
        documents = [
            {"user_id": a[0], "timestamp": transactions.format_ms(a[1])}
            if isinstance(a, tuple)
            else in_hand(a)
            for a in asks
        ]
        together = await asyncio.gather(*(served.ask(**d) for d in documents))
        assert served.batches() == 1
        await served.forget()
        alone = [await served.ask(**d) for d in documents]
        assert [t.record.decision for t in together] == [a.record.decision for a in alone]
        for ask, prediction in zip(asks, together, strict=True):
            row = prediction.record.decision.row
            hand = None if isinstance(ask, tuple) else ask
            user_id, as_of_ms = ask if hand is None else (hand.user_id, hand.event_ms)
            assert (row.user_id, row.as_of_ms) == (user_id, as_of_ms)
            if row.degraded == ():
                assert values(prediction) == oracle(log, user_id, as_of_ms, hand)
            else:
                assert row.degraded == ("as_of_too_old",)
                assert as_of_ms < max(NOW_MS, served.windows.frontier_ms) - 120_000
    finally:
        await served.close()


async def test_requests_during_a_round_trip_share_the_next(served):
    await served.stream(transaction("a"))
    first = asyncio.create_task(served.ask(user_id=1))
    await served.reading()
    rest = await asyncio.gather(*(served.ask(user_id=1, amount=None) for _ in range(9)))
    await first
    assert served.batches() == 2
    assert {values(p) for p in rest} == {(1, 1_000)}


async def test_a_batch_is_bounded(served):
    await served.live()
    await asyncio.gather(*(served.ask(user_id=i) for i in range(predictor.MAX_BATCH + 1)))
    assert served.batches() == 2


async def test_more_requests_than_the_bound_are_refused_at_once(environ):
    served = Served(environ, max_in_flight=3, read_timeout_ms=5_000)
    await served.live()
    await served.client.execute_command("CLIENT", "PAUSE", "300")
    waiting = [asyncio.create_task(served.ask(user_id=i)) for i in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(errors.Overloaded):
        await served.ask(user_id=9)
    assert not any(task.done() for task in waiting)
    assert [p.record.decision.row.user_id for p in await asyncio.gather(*waiting)] == [0, 1, 2]
    assert served.predictor.in_flight == 0
    await served.close()


async def test_old_transactions_that_wait_for_postgres_keep_no_young_one_waiting(environ):
    """They are looked up first, and a silent server uses up all of their time."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as silent:
        port = silent.getsockname()[1]
        away = {"DATABASE_URL": f"postgresql://x@127.0.0.1:{port}/x?sslmode=disable"}
        served = Served(environ | away, max_in_flight=4)
        await served.pool
        await served.live()
        old = {"amount": 1, "timestamp": transactions.format_ms(NOW_MS - 86_400_000)}
        waiting = [
            asyncio.create_task(served.ask(user_id=1, transaction_id=f"old-{i}", **old))
            for i in range(400)
        ]
        await asyncio.sleep(0.2)
        assert served.predictor.in_flight == 0
        for i in range(8):
            young = await served.ask(user_id=1, transaction_id=f"young-{i}", amount=1)
            assert not young.replayed
        done = [task for task in waiting if task.done()]
        assert len(done) == 400 - 128
        assert {type(task.exception()) for task in done} == {errors.Overloaded}
        rest = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(each) for each in rest} == {errors.Overloaded, errors.DecisionsUnavailable}
        await served.store.close()
        (await served.pool).terminate()


async def test_a_batch_that_fails_fails_alone_and_replies_do_not_cross(environ):
    served = Served(environ, read_timeout_ms=60)
    await served.stream(*(transaction("a", user_id=i, amount_minor=i) for i in range(1, 9)))
    await served.client.execute_command("CLIENT", "PAUSE", "400")
    failed = await asyncio.gather(*(served.ask(user_id=i) for i in (1, 2)), return_exceptions=True)
    assert [type(error) for error in failed] == [errors.FeaturesUnavailable] * 2
    await served.client.ping()
    answered = await asyncio.gather(*(served.ask(user_id=i) for i in range(8, 0, -1)))
    assert [values(p) for p in answered] == [(1, i) for i in range(8, 0, -1)]
    await served.close()


async def test_a_request_that_waited_too_long_is_refused_without_another_wait(environ):
    served = Served(environ, read_timeout_ms=100, max_in_flight=1_000)
    await served.client.execute_command("CLIENT", "PAUSE", "500")
    first = asyncio.create_task(served.ask(user_id=0))
    await asyncio.sleep(0.001)
    many = predictor.MAX_BATCH + 1
    rest = await asyncio.gather(
        *(served.ask(user_id=i) for i in range(many)), return_exceptions=True
    )
    assert {type(error) for error in rest} <= {errors.Overloaded, errors.FeaturesUnavailable}
    assert isinstance(rest[-1], errors.Overloaded)
    with pytest.raises(errors.FeaturesUnavailable):
        await first
    await served.close()


async def test_a_client_that_goes_away_takes_no_other_request_with_it(served):
    await served.stream(transaction("a"))
    for gone in range(3):
        asks = [asyncio.create_task(served.ask(user_id=1)) for _ in range(3)]
        await served.reading()
        asks[gone].cancel()
        left = [task for i, task in enumerate(asks) if i != gone]
        assert [values(p) for p in await asyncio.gather(*left)] == [(1, 1_000)] * 2
        assert asks[gone].cancelled()
    assert served.predictor.in_flight == 0


async def test_an_unreadable_value_degrades_its_own_user_only(served):
    await served.stream(transaction("a", user_id=1), transaction("a", user_id=2))
    await served.credit(1, 700)
    key = served.store._key(1)
    whole = await served.client.hget(key, served.store._fields.window)
    for broken in (b"\x0a\x03abc", whole[:-1], b"\x0a", b"\xff\xff", whole[:9]):
        await served.client.hset(key, served.store._fields.window, broken)
        bad, good = await asyncio.gather(served.ask(user_id=1), served.ask(user_id=2))
        assert (values(bad), bad.record.decision.row.degraded) == (None, ("recent_unreadable",))
        assert bad.record.decision.row.credit_score == 700
        assert (values(good), good.record.decision.row.degraded) == ((1, 1_000), ())


async def test_values_that_cannot_be_had_are_null_and_never_zero(served):
    unknown = await served.ask(user_id=7)
    assert (values(unknown), unknown.record.decision.row.degraded) == (None, ("owner_missing",))
    await served.live(caught_up_ms=NOW_MS - 61_000)
    silent = await served.ask(user_id=7)
    assert (values(silent), silent.record.decision.row.degraded) == (None, ("stale",))
    await served.live()
    known = await served.ask(user_id=7)
    assert (values(known), known.record.decision.row.degraded) == ((0, 0), ())


async def test_a_moment_before_what_is_kept_says_so(served):
    await served.stream(transaction("a", user_id=1))
    for user_id in (1, 2):
        for ago_ms, degraded in ((120_000, ()), (120_001, ("as_of_too_old",))):
            stamp = transactions.format_ms(NOW_MS - ago_ms)
            row = (await served.ask(user_id=user_id, timestamp=stamp)).record.decision.row
            assert row.degraded == degraded


async def test_many_events_are_answered_approximately_and_say_so(served):
    many = [transaction(f"t{i}", at_ms=NOW_MS - i * 1_000) for i in range(599, -1, -1)]
    await served.stream(*many)
    now = await served.ask(user_id=1)
    assert (values(now), now.record.decision.row.approximate) == ((600, 600_000), False)
    served.now_ms = NOW_MS + 1_500
    later = await served.ask(user_id=1)
    assert later.record.decision.row.approximate
    assert values(later)[0] in (599, 600)  # the oldest slice is cut, and counts whole


async def test_one_in_hand_that_a_summed_slice_may_hold_is_not_called_exact(served):
    many = [transaction(f"t{i}", at_ms=NOW_MS - 1 - i * 200) for i in range(599, -1, -1)]
    await served.stream(*many)
    newest, folded = many[-1], many[-301]
    exact = await served.ask(**in_hand(newest))
    assert (values(exact)[0], exact.record.decision.row.approximate) == (600, False)
    unsure = await served.ask(**in_hand(folded))
    assert unsure.record.decision.row.approximate
    assert values(unsure)[0] in (300, 301)


async def test_a_credit_score_is_read_until_its_time_is_over(served):
    await served.live()
    await served.credit(1, 700, at_ms=NOW_MS - 30 * 86_400_000)
    assert (await served.ask(user_id=1)).record.decision.row.credit_score == 700
    served.now_ms += 1
    assert (await served.ask(user_id=1)).record.decision.row.credit_score is None


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({}, "user_id"),
        ({"user_id": "1"}, "user_id"),
        ({"user_id": True}, "user_id"),
        ({"user_id": 2**63}, "user_id"),
        ({"user_id": 1, "amount": 1}, "transaction_id"),
        ({"user_id": 1, "currency": "USD"}, "transaction_id"),
        ({"user_id": 1, "merchant_id": "m"}, "transaction_id"),
        ({"user_id": 1, "transaction_id": "a"}, "amount"),
        ({"user_id": 1, "transaction_id": "", "amount": 1}, "transaction_id"),
        ({"user_id": 1, "transaction_id": "a", "amount": "1"}, "amount"),
        ({"user_id": 1, "transaction_id": "a", "amount": 1.001}, "amount"),
        ({"user_id": 1, "transaction_id": "a", "amount": -1}, "amount"),
        ({"user_id": 1, "transaction_id": "a", "amount": 1, "currency": "EUR"}, "currency"),
        ({"user_id": 1, "transaction_id": "a", "amount": 1, "merchant_id": 5.5}, "merchant_id"),
        ({"user_id": 1, "timestamp": NOW_MS}, "timestamp"),
        ({"user_id": 1, "timestamp": "2026-09-21"}, "timestamp"),
        ({"user_id": 1, "timestamp": transactions.format_ms(NOW_MS + 60_001)}, "timestamp"),
    ],
)
async def test_a_wrong_request_names_the_field(served, document, field):
    with pytest.raises(errors.InvalidInput) as caught:
        served.predictor.parse(document)
    assert caught.value.field == field


async def test_an_amount_without_an_id_is_told_why_it_is_refused(served):
    with pytest.raises(errors.InvalidInput, match="whether the stream has counted"):
        served.predictor.parse({"user_id": 1, "amount": 1})


async def test_null_is_absent_and_later_fields_are_ignored(served):
    document = {"user_id": 1, "amount": None, "transaction_id": None, "device": {"os": "x"}}
    parsed = served.predictor.parse(document)
    assert parsed == predictor.Request(1, NOW_MS, trace_id=parsed.trace_id)


async def test_a_transaction_in_hand_without_a_time_happens_now(served):
    parsed = served.predictor.parse({"user_id": 1, "transaction_id": "a", "amount": 12.5})
    assert parsed.in_hand == transactions.Transaction("a", 1, 1_250, "USD", "", NOW_MS)
    assert parsed.as_of_ms == NOW_MS


async def test_the_fence_of_a_prediction_is_the_row_s(served):
    await served.stream(transaction("a"), transaction("b"))
    found = await served.ask(user_id=1)
    assert (found.record.decision.row.fence, found.record.partition) == (
        fences.Fence(1, 2, NOW_MS),
        0,
    )
    unknown = await served.ask(user_id=2)
    assert (unknown.record.decision.row.fence, unknown.record.partition) == (None, None)


async def test_a_latency_is_told_from_the_arrival_on_and_by_its_stages(served, monkeypatch):
    await served.live()
    read, now_s = served.store.read, 1_000.0

    async def in_30_ms(*arguments):
        nonlocal now_s
        found = await read(*arguments)
        now_s += 0.03
        return found

    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    monkeypatch.setattr(served.store, "read", in_30_ms)
    first = asyncio.create_task(served.ask(user_id=1))
    await served.reading()
    answers = await asyncio.gather(first, served.ask(user_id=2))
    assert [answer.retrieval_ms for answer in answers] == [pytest.approx(30), pytest.approx(60)]
    assert [answer.record.latency_ms for answer in answers] == [
        {"wait": 0.0, "features": 30.0, "model": 0.0},
        {"wait": 30.0, "features": 30.0, "model": 0.0},
    ]
