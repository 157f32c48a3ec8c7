"""The laws of windows, against an oracle that shares no code with them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cerberus import transactions, window
from cerberus.features import evaluation, fences
from cerberus.features import packed as packed_windows

SPANS = window.Spans(names=("20s", "1m"), allowed_lateness_ms=3_000, max_future_skew_ms=2_000)
KEEP_MS = 65_000
START_MS = 1_700_000_000_000

events = st.builds(
    transactions.Transaction,
    transaction_id=st.sampled_from([f"t{i}" for i in range(12)]),
    user_id=st.integers(1, 3),
    amount_minor=st.integers(0, 10**6),
    currency=st.just("USD"),
    merchant_id=st.sampled_from(["", "m1", "m2"]),
    event_ms=st.integers(0, 30).map(lambda i: START_MS + i * 7_001)
    | st.integers(0, 200_000).map(lambda ms: START_MS + ms),
)
logs = st.lists(events, max_size=60)


class Oracle:
    """Brute force over the whole log: a list, no order, no eviction."""

    def __init__(self):
        self.kept = []
        self.frontier = 0

    def observe(self, t):
        self.frontier = max(self.frontier, t.event_ms)
        if t.event_ms <= self.frontier - KEEP_MS:
            return "expired"
        for other in self.kept:
            if (other.user_id, other.transaction_id, other.event_ms) == (
                t.user_id,
                t.transaction_id,
                t.event_ms,
            ):
                return "duplicate" if other.amount_minor == t.amount_minor else "conflict"
        self.kept.append(t)
        return "accepted"

    def stats(self, user_id, as_of_ms, span_ms):
        inside = [
            t.amount_minor
            for t in self.kept
            if t.user_id == user_id and as_of_ms - span_ms < t.event_ms <= as_of_ms
        ]
        return len(inside), sum(inside)


def summary(stats):
    return [(s.count, s.total_minor) for s in stats]


@settings(max_examples=500, deadline=None)
@given(logs)
def test_every_prefix_equals_brute_force_for_every_user_and_every_answerable_moment(log):
    windows, oracle = window.PartitionWindows(SPANS), Oracle()
    for t in log:
        assert windows.observe(t).value == oracle.observe(t)
        assert windows.frontier_ms == oracle.frontier
        for user_id in (1, 2, 3):
            for back_ms in (0, 1, 999, 5_000):
                as_of_ms = oracle.frontier - back_ms
                assert summary(windows.stats(user_id, as_of_ms)) == [
                    oracle.stats(user_id, as_of_ms, 20_000),
                    oracle.stats(user_id, as_of_ms, 60_000),
                ]


@settings(max_examples=300, deadline=None)
@given(logs, st.data())
def test_a_replay_from_anywhere_before_what_is_kept_gives_the_uninterrupted_state(log, data):
    cut = data.draw(st.integers(0, len(log)))
    whole = window.PartitionWindows(SPANS)
    for t in log[:cut]:
        whole.observe(t)
    bound = whole.frontier_ms - KEEP_MS
    needed = next((i for i, t in enumerate(log[:cut]) if t.event_ms > bound), cut)
    replayed = window.PartitionWindows(SPANS)
    for t in log[data.draw(st.integers(0, needed)) : cut]:
        replayed.observe(t)
    for t in log[cut:]:
        assert replayed.observe(t) == whole.observe(t)
    for user_id in (1, 2, 3):
        as_of_ms = whole.frontier_ms
        assert replayed.stats(user_id, as_of_ms) == whole.stats(user_id, as_of_ms)


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=30, unique_by=lambda t: t.id_hash64), st.randoms())
def test_any_order_inside_the_slack_gives_the_same_window(log, rng):
    log = [t for t in log if t.event_ms > START_MS + 200_000 - KEEP_MS]
    shuffled = rng.sample(log, len(log))
    left, right = window.PartitionWindows(SPANS), window.PartitionWindows(SPANS)
    for a, b in zip(log, shuffled, strict=True):
        left.observe(a)
        right.observe(b)
    for user_id in (1, 2, 3):
        a, b = left.user(user_id), right.user(user_id)
        assert kept(a) == kept(b)


@settings(max_examples=300, deadline=None)
@given(logs, st.integers(1, 3), st.integers(0, 5_000), st.booleans())
def test_the_packed_window_answers_as_the_window_and_counts_the_one_in_hand_once(
    log, user_id, back_ms, streamed
):
    windows, oracle = window.PartitionWindows(SPANS), Oracle()
    for t in log:
        windows.observe(t)
        oracle.observe(t)
    as_of_ms = max(windows.frontier_ms, START_MS) - back_ms
    in_hand = transactions.Transaction("in-hand", user_id, 12_345, "USD", "", as_of_ms)
    if streamed:
        windows.observe(in_hand)
    else:
        oracle.observe(in_hand)
    user = windows.user(user_id)
    fence = fences.Fence(1, len(log), windows.frontier_ms)
    recent = None
    if user:
        packed = packed_windows.pack(user, fence, 3, windows.lower_ms, SPANS)
        recent = packed_windows.unpack(packed, SPANS)
        assert (recent.fence, recent.partition, recent.complete) == (fence, 3, True)
    now_ms = max(as_of_ms, windows.frontier_ms)
    state = fences.PartitionState(1, len(log), "live", now_ms)
    row = evaluation.as_of(
        evaluation.OnlineRow(user_id, recent, 700, 3, state),
        as_of_ms,
        in_hand,
        now_ms=now_ms,
        rules=evaluation.Rules(SPANS, 60_000),
    )
    if streamed:
        oracle.observe(in_hand)
    assert row.degraded == ()
    assert summary(row.stats) == [
        oracle.stats(user_id, as_of_ms, 20_000),
        oracle.stats(user_id, as_of_ms, 60_000),
    ]


@pytest.mark.parametrize("names", [("1s",), ("10m",), ("23d",)])
def test_the_longest_windows_and_the_greatest_lateness_can_be_packed(names):
    spans = window.Spans(names, 86_400_000, 3_600_000)
    user, now_ms = window.UserWindow(), START_MS + spans.keep_ms
    step_ms = 2 * spans.keep_ms // 70_000
    times = [now_ms + spans.keep_ms - i * step_ms for i in range(70_000)]
    for i, event_ms in enumerate(reversed(times)):
        user.insert(window.Event(event_ms, 1, i, 0))
    fence = fences.Fence(1, 5, now_ms)
    recent = packed_windows.unpack(
        packed_windows.pack(user, fence, 0, now_ms - spans.keep_ms, spans), spans
    )
    for as_of_ms in (now_ms, now_ms + spans.slack_ms, now_ms + spans.keep_ms):
        after_ms = as_of_ms - spans.longest_ms
        told = recent.stats(after_ms, as_of_ms)[0].count
        true = user.stats(after_ms, as_of_ms).count
        a_tile = packed_windows.tile_ms(spans) // step_ms + 1
        assert abs(told - true) <= 2 * a_tile


@pytest.mark.parametrize(("short_ms", "reason"), [(0, ()), (1, ("warming",))])
def test_a_row_whose_window_reaches_behind_what_is_known_says_so(short_ms, reason):
    user = window.UserWindow()
    user.insert(window.Event(START_MS, 500, 1, 0))
    fence = fences.Fence(1, 9, START_MS)
    lower_ms = START_MS - SPANS.longest_ms + short_ms
    recent = packed_windows.unpack(packed_windows.pack(user, fence, 0, lower_ms, SPANS), SPANS)
    row = evaluation.as_of(
        evaluation.OnlineRow(1, recent, None, 0, fences.PartitionState(1, 9, "live", START_MS)),
        START_MS,
        None,
        now_ms=START_MS,
        rules=evaluation.Rules(SPANS, 60_000),
    )
    assert row.degraded == reason


def kept(user):
    if user is None:
        return []
    found = user.columns(0)
    totals = found.totals - found.before
    return [c.tolist() for c in (found.times, totals, found.ids, found.merchants)]


def test_users_with_nothing_left_vanish_when_the_frontier_moves_on():
    windows = window.PartitionWindows(SPANS)
    rng = random.Random(1)
    for i in range(5_000):
        event_ms = START_MS + i * 100 - rng.randrange(3_000)
        windows.observe(transactions.Transaction(f"t{i}", i, 100, "USD", "", event_ms))
    assert len(windows) <= (KEEP_MS + 4_000) / 100


def test_above_256_events_only_the_edge_tile_is_inexact_and_says_so():
    windows = window.PartitionWindows(SPANS)
    for i in range(2_000):
        windows.observe(transactions.Transaction(f"t{i}", 1, 100, "USD", "", START_MS + i * 30))
    fence, user = fences.Fence(1, 2_000, windows.frontier_ms), windows.user(1)
    assert user is not None
    packed = packed_windows.pack(user, fence, 0, windows.lower_ms, SPANS)
    recent = packed_windows.unpack(packed, SPANS)
    exact = windows.stats(1, windows.frontier_ms)[0]
    after_ms = windows.frontier_ms - 20_000
    stats, approximate, _ = recent.stats(after_ms, windows.frontier_ms)
    edge = packed_windows.tile_ms(SPANS) // 30 + 1
    assert 0 <= stats.count - exact.count <= edge
    assert approximate == (stats != exact) or approximate


@pytest.mark.parametrize("damage", [b"", b"\x02" + b"\0" * 60, b"\x01" + b"\0" * 20])
def test_bytes_of_another_format_are_refused(damage):
    with pytest.raises(ValueError, match="recent"):
        packed_windows.unpack(damage, SPANS)


@pytest.mark.parametrize("users", [1, 300_000])
def test_a_user_with_all_events_and_all_users_with_one_are_both_exact(users):
    windows, count = window.PartitionWindows(window.Spans()), 300_000
    for i in range(count):
        at = START_MS + 600_000 * i // count
        windows.observe(transactions.Transaction(f"t{i}", i % users, 100, "USD", "", at))
    each = count // users
    for user_id in (0, users // 2, users - 1):
        assert summary(windows.stats(user_id, windows.frontier_ms)) == [(each, each * 100)]
    assert len(windows) == users


def test_a_user_may_pay_more_than_64_bits_hold_as_long_as_the_window_does_not():
    user, amount = window.UserWindow(), 2**55
    for i in range(1_000):
        assert user.insert(window.Event(i, amount, i, 0)) is window.Outcome.ACCEPTED
        user.evict(i - 10)
        assert user.stats(i - 5, i) == window.WindowStats(min(i + 1, 5), min(i + 1, 5) * amount)
