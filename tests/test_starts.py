"""A start is never behind an offset that can matter; what is missing does not go undoubted."""

import collections
import dataclasses

from hypothesis import event, given
from hypothesis import strategies as st

from cerberus import partition, transactions, window
from cerberus.stream import starts

SPANS = window.Spans(("1s", "3s"), 700, 500)
BEGIN_MS = 1_000_000
Record = collections.namedtuple("Record", "offset timestamp value")


@st.composite
def logs(draw, back_ms):
    """Draw records, stamped up to `back_ms` too early, of events at most the skew ahead of that.

    Some are stamped as they arrive, long after their event.
    """
    steps = st.tuples(
        st.integers(0, 700),
        st.integers(0, back_ms),
        st.integers(-6_000, SPANS.max_future_skew_ms) | st.integers(-BEGIN_MS // 2, 0),
    )
    now_ms, log = BEGIN_MS, []
    for offset, (step_ms, early_ms, ahead_ms) in enumerate(draw(st.lists(steps, max_size=40))):
        now_ms += step_ms
        stamp_ms = now_ms - early_ms
        txn = transactions.Transaction(f"t{offset}", 1, 1 << offset, "USD", "", stamp_ms + ahead_ms)
        log.append((Record(offset, stamp_ms, b""), txn))
    return log


def played(start, log, stored=False):
    """Let a partition take everything from where it starts, and what is stored from before."""
    part = partition.Partition(0, SPANS, start)
    if stored and start.seeded_until_ms is not None:
        part.seed({1}, [transaction for _, transaction in log[: start.begin]])
    for record, transaction in log[start.begin :]:
        part.take(record, transaction)
    return part


def at_or_after(log, begin, from_ms):
    return next((r.offset for r, _ in log[begin:] if r.timestamp >= from_ms), None)


@st.composite
def situations(draw, back_ms=SPANS.allowed_lateness_ms):
    """Draw a log, of which retention has taken a part, a commit, and how far a replay reaches."""
    log = draw(logs(back_ms))
    committed = draw(st.integers(0, len(log)))
    begin = draw(st.just(0) | st.integers(0, len(log)))
    frontier_ms = played(partition.Start(1, 0, 0), log[:committed]).windows.frontier_ms
    known_from_ms = draw(st.sampled_from([0, 0, None, BEGIN_MS]))
    commit = starts.Commit(committed, frontier_ms, epoch=1, count=1, known_from_ms=known_from_ms)
    first = (begin, log[begin][0].timestamp) if begin < len(log) else None
    told = starts.Log(begin, len(log), first, 1)
    replay_span_ms = draw(st.sampled_from([1_000, 2_000, 3_000]))
    from_ms = starts.replay_from_ms(commit, SPANS, replay_span_ms)
    facts = starts.Facts(
        epoch=1,
        moved=None,
        replay_span_ms=replay_span_ms,
        found=at_or_after(log, begin, from_ms),
        stored=draw(st.booleans()),
        imported_until_ms=None,
        now_ms=max((r.timestamp for r, _ in log), default=BEGIN_MS),
    )
    return log, told, commit, facts


def assert_right_or_doubted(part, whole):
    """Compare windows with those of the whole log, as of every time that is kept and later ones."""
    lowest_ms = whole.windows.frontier_ms - SPANS.slack_ms
    for as_of_ms in range(lowest_ms + 1, whole.windows.frontier_ms + SPANS.longest_ms, 97):
        stats, wanted = part.windows.stats(1, as_of_ms), whole.windows.stats(1, as_of_ms)
        for span_ms, found, right in zip(SPANS.spans_ms, stats, wanted, strict=True):
            doubted = part.known_from_ms is None or as_of_ms - span_ms < part.known_from_ms
            event(f"doubted: {doubted}")
            assert doubted or found == right


@given(situations(back_ms=5_000))
def test_a_start_is_never_later_than_an_offset_that_can_matter(situation):
    log, told, commit, facts = situation
    start = starts.plan_start(told, commit, SPANS, facts)
    reach_ms = min(SPANS.longest_ms, facts.replay_span_ms)
    since_ms = commit.frontier_ms - reach_ms - SPANS.slack_ms
    matter = [r.offset for r, t in log[told.begin : commit.offset] if t.event_ms > since_ms]
    event(f"begins behind the log's begin: {start.begin > told.begin}")
    assert start.begin <= min([max(commit.offset, told.begin), *matter])
    assert told.begin <= start.begin <= start.commit


@given(situations())
def test_what_is_replayed_equals_the_whole_log_wherever_it_is_not_doubted(situation):
    log, told, commit, facts = situation
    start = starts.plan_start(told, commit, SPANS, facts)
    whole = played(partition.Start(1, 0, commit.offset), log)
    assert_right_or_doubted(played(start, log, facts.stored), whole)


@given(logs(SPANS.allowed_lateness_ms), st.data())
def test_a_gap_is_doubted_however_many_records_are_read_between_its_fetch_and_it(log, data):
    begin = data.draw(st.integers(0, len(log)))
    end = data.draw(st.integers(begin, len(log)))
    known = data.draw(st.integers(0, begin))
    now_ms = max((r.timestamp for r, _ in log), default=BEGIN_MS) + SPANS.allowed_lateness_ms
    part = played(partition.Start(1, 0, 0), log[:known])
    part.miss(end, now_ms)
    for record, transaction in log[known:begin] + log[end:]:
        part.take(record, transaction)
    assert_right_or_doubted(part, played(partition.Start(1, 0, 0), log))


@given(situations())
def test_what_no_replay_reaches_is_seeded_or_doubted(situation):
    _, told, commit, facts = situation
    start = starts.plan_start(told, commit, SPANS, facts)
    long = SPANS.longest_ms > facts.replay_span_ms
    assert (start.seeded_until_ms is not None) == long
    if long and commit.frontier_ms and not facts.stored and start.begin > 0:
        assert start.known_from_ms is None or start.known_from_ms >= facts.now_ms
    if commit.known_from_ms is None or commit.offset < told.begin:
        assert start.known_from_ms is None or start.known_from_ms >= facts.now_ms
    if start.known_from_ms is None:
        assert told.end > told.begin  # the next record will say from when on all is known


@given(situations(), st.sampled_from(["none", "foreign"]))
def test_without_metadata_of_ours_a_log_is_read_from_its_start(situation, what):
    _, told, commit, facts = situation
    bare = None if what == "none" else starts.Commit(commit.offset)
    assert starts.replay_from_ms(bare, SPANS, facts.replay_span_ms) is None
    start = starts.plan_start(told, bare, SPANS, dataclasses.replace(facts, found=None))
    assert start.begin == told.begin
    assert start.commit == (told.begin if bare is None else max(told.begin, commit.offset))
    assert (start.known_from_ms == 0) == (told.begin == 0)


def test_nothing_behind_the_commit_is_skipped_though_a_later_record_is_the_first_so_late():
    facts = starts.Facts(1, None, SPANS.longest_ms, 9, True, None, BEGIN_MS)
    commit = starts.Commit(7, BEGIN_MS, epoch=1, count=1)
    start = starts.plan_start(starts.Log(5, 12, (5, 1), 1), commit, SPANS, facts)
    assert start.begin <= start.commit == 7
    assert (start.known_from_ms, start.floor_ms) == (0, None)


def test_what_an_emptied_log_held_may_lie_ahead_of_the_clock_by_the_skew():
    now_ms = BEGIN_MS
    facts = starts.Facts(1, None, SPANS.longest_ms, None, False, None, now_ms)
    commit = starts.Commit(3, now_ms, epoch=1, count=1)
    start = starts.plan_start(starts.Log(3, 3, None, 1), commit, SPANS, facts)
    assert start.known_from_ms == now_ms + SPANS.max_future_skew_ms


def test_rows_lack_where_an_epoch_rose_over_seeds_or_an_import_reaches_the_windows():
    start = partition.Start(2, 5, 5, seeded_until_ms=BEGIN_MS)
    risen, same = (starts.Commit(5, BEGIN_MS, epoch=epoch, count=1) for epoch in (1, 2))
    assert starts.lacks_rows(start, risen, SPANS)
    assert not starts.lacks_rows(start, same, SPANS)
    assert not starts.lacks_rows(partition.Start(2, 5, 5), risen, SPANS)
    reaching = dataclasses.replace(start, imported_until_ms=BEGIN_MS - SPANS.keep_ms + 1)
    assert starts.lacks_rows(reaching, same, SPANS)
    earlier = dataclasses.replace(start, imported_until_ms=BEGIN_MS - SPANS.keep_ms)
    assert not starts.lacks_rows(earlier, same, SPANS)
