"""A partition's life as a state machine: whatever happens in whatever order, brute force agrees."""

from types import SimpleNamespace

import oracle
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cerberus import judging, partition, transactions, window
from cerberus.features import packed

SPANS = window.Spans(names=("1m",), allowed_lateness_ms=5_000, max_future_skew_ms=2_000)
START_MS = 1_700_000_000_000
USERS = (1, 2, 3)
users = st.sampled_from(USERS)


class PartitionLife(RuleBasedStateMachine):
    """Records arrive; the owner crashes and replays; the oracle sees the log alone."""

    @initialize()
    def begin(self):
        self.log = []
        self.frontiers = [0]
        self.now_ms = START_MS
        self.told = oracle.Partition(60_000, SPANS.slack_ms, SPANS.max_future_skew_ms)
        self.part = partition.Partition(0, SPANS, partition.Start(1, 0, 0))

    def append(self, user_id, name, amount, at_ms, stamp_ms=None):
        value = transactions.encode(
            transactions.Transaction(name, user_id, amount, "USD", "", at_ms)
        )
        self.append_raw(value, at_ms if stamp_ms is None else stamp_ms)

    def append_raw(self, value, stamp_ms):
        record = SimpleNamespace(offset=len(self.log), timestamp=stamp_ms, value=value)
        self.log.append(record)
        self.told.add(record.offset, record.timestamp, record.value)
        self.frontiers.append(self.told.frontier)
        seen = self.part.take(record, judging.judge(record, "USD", SPANS))
        if isinstance(seen, partition.Observed) and seen.row is not None:
            event = self.told.accepted[-1]
            assert event["offset"] == record.offset
            assert seen.row.stats is not None
            [stats] = seen.row.stats
            assert (stats.count, stats.total_minor) == self.told.decided_on(event)
            late_ms = self.told.frontier - event["at"]
            assert (seen.row.degraded == ()) == (late_ms <= SPANS.slack_ms)

    @rule(user_id=users, amount=st.integers(0, 10**6), step_ms=st.integers(0, 30_000))
    def arrive(self, user_id, amount, step_ms):
        self.now_ms += step_ms
        self.append(user_id, f"t{len(self.log)}", amount, self.now_ms)

    @rule(
        user_id=users,
        amount=st.integers(0, 10**6),
        behind_ms=st.integers(1, 90_000) | st.integers(1, START_MS // 2),
        on_arrival=st.booleans(),
    )
    def arrive_late_or_expired(self, user_id, amount, behind_ms, on_arrival):
        stamp_ms = self.now_ms if on_arrival else None
        at_ms = self.now_ms - behind_ms
        self.append(user_id, f"t{len(self.log)}", amount, at_ms, stamp_ms)

    @rule(
        user_id=users,
        off_ms=st.sampled_from((-1, 0, 1)),
        bound=st.sampled_from((65_000 + 2_000, 60_000)),
    )
    def arrive_at_a_boundary(self, user_id, off_ms, bound):
        at_ms = max(self.told.frontier, START_MS) - bound + off_ms
        self.append(user_id, f"t{len(self.log)}", 7, at_ms)

    @rule(pick=st.randoms(use_true_random=False), more=st.sampled_from([0, 0, 1]))
    def arrive_again_perhaps_with_another_amount(self, pick, more):
        if self.told.accepted:
            e = pick.choice(self.told.accepted)
            self.append(e["user_id"], e["id"], e["cents"] + more, e["at"])

    @rule(user_id=users, ahead_ms=st.integers(2_001, 10**9))
    def arrive_from_the_future(self, user_id, ahead_ms):
        self.append(user_id, "future", 1, self.now_ms + ahead_ms, self.now_ms)

    @rule(value=st.sampled_from([None, b"", b"{}", b"[1]"]))
    def arrive_broken(self, value):
        self.append_raw(value or b"", self.now_ms)

    @rule(behind=st.integers(0, 5), early=st.integers(0, 10))
    def crash_and_replay(self, behind, early):
        """Start anew at an earlier commit, from any record that lies early enough."""
        commit = max(0, len(self.log) - behind)
        since_ms = self.frontiers[commit] - SPANS.keep_ms - SPANS.max_future_skew_ms
        start = next((r.offset for r in self.log if r.timestamp >= since_ms), commit)
        start = max(0, min(start, commit) - early)
        self.part = partition.Partition(0, SPANS, partition.Start(1, start, commit))
        for record in self.log[start:]:
            replaying = record.offset < commit
            assert self.part.state().state == ("replaying" if replaying else "live")
            left = self.part.take(record, judging.judge(record, "USD", SPANS))
            assert (left is None) == replaying

    @invariant()
    def any_row_answers_as_the_log_does(self):
        state = self.part.state()
        assert state.state == "live"
        rows = {user: packed for user, packed, _ in self.part.rows(USERS)}
        for user_id in USERS:
            for back_ms in (0, 1, 777, SPANS.slack_ms):
                as_of_ms = self.told.frontier - back_ms
                wanted = self.told.stats(user_id, as_of_ms)
                [kept] = self.part.windows.stats(user_id, as_of_ms)
                assert (kept.count, kept.total_minor) == wanted
                found = (0, 0)
                if user_id in rows:
                    recent = packed.unpack(rows[user_id], SPANS)
                    stats, approximate, _ = recent.stats(as_of_ms - 60_000, as_of_ms)
                    found = (stats.count, stats.total_minor)
                    assert not approximate
                assert found == wanted


TestPartitionLife = PartitionLife.TestCase
TestPartitionLife.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, print_blob=True
)
TestPartitionLife = pytest.mark.timeout(300)(TestPartitionLife)
