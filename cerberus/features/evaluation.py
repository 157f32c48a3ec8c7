"""From windows to model inputs: the one definition that stream, request and replay share.

The online row of a user carries its own window, packed (`Recent`), so the reader computes the
aggregates as of its own clock and adds the transaction in hand exactly once, whether or not the
stream has counted it. A silent user's count falls to zero by itself.
"""

import enum
from dataclasses import dataclass

from cerberus import transactions, window
from cerberus.features import fences, packed

STALE_MS = 5_000
AHEAD_MS = 2_000
"""How far ahead of its own clock a reader accepts another process's time: the error of NTP, and the
time between reading the clock and the store's answer. Beyond that it doubts the row, because an
owner that dies with a fast clock would pass as live until that time."""


class Doubt(enum.StrEnum):
    """Why values may be wrong: the reasons in `degraded`, explained in docs/windowing.md."""

    OWNER_MISSING = "owner_missing"
    REPLAYING = "replaying"
    REBUILDING = "rebuilding"
    RESTORING = "restoring"
    STALE = "stale"
    CLOCK_AHEAD = "clock_ahead"
    WARMING = "warming"
    AS_OF_TOO_OLD = "as_of_too_old"
    SPLIT_USER = "split_user"
    RECENT_UNREADABLE = "recent_unreadable"
    CREDIT_SCORE_UNREADABLE = "credit_score_unreadable"


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """The inputs of one decision, with all that is needed to judge and repeat it.

    Attributes:
        user_id: The user.
        as_of_ms: The moment that the values describe.
        stats: One entry a span, exact integers; None when they cannot be had.
        credit_score: 300 to 850; None when unknown or expired.
        amount_minor: Of the transaction in hand; None when a user alone is asked about.
        fence: The prefix of the log behind `stats`; None when no row was there.
        degraded: Why the values may be wrong, by `Doubt`; empty when they are exact.
        approximate: An edge of a window cut a tile.
    """

    user_id: int
    as_of_ms: int
    stats: tuple[window.WindowStats, ...] | None
    credit_score: int | None
    amount_minor: int | None = None
    fence: fences.Fence | None = None
    degraded: tuple[str, ...] = ()
    approximate: bool = False


@dataclass(frozen=True, slots=True)
class OnlineRow:
    """What the online store holds of one user: either part may be missing, or `unreadable`.

    `unreadable` holds the doubts of parts that cannot be read.
    `split_ms` is the newest event of the user that arrived in another partition than `partition`.
    `score_ms` is the time from which the credit score is valid; 0 without a score.
    """

    user_id: int
    recent: packed.Recent | None
    credit_score: int | None
    partition: int
    state: fences.PartitionState | None
    unreadable: tuple[Doubt, ...] = ()
    split_ms: int = 0
    score_ms: int = 0


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules by which rows are evaluated.

    Attributes:
        spans: The window definition.
        max_staleness_ms: How long the owner may be silent before streamed values are refused.
    """

    spans: window.Spans
    max_staleness_ms: int


def as_of(
    online: OnlineRow,
    as_of_ms: int,
    in_hand: transactions.Transaction | None,
    *,
    now_ms: int,
    rules: Rules,
) -> FeatureRow:
    """Evaluate an online row at `as_of_ms`, with the transaction in hand counted exactly once.

    A missing row of a live partition is a true zero. Where the owner is silent for longer than
    `max_staleness_ms`, or unknown with no row, the streamed values are None, never zero.
    """
    recent, state, spans = online.recent, online.state, rules.spans
    if state is not None and recent is not None and recent.fence.epoch < state.epoch:
        recent = recent if state.state != fences.LIVE else None
    stats: tuple[window.WindowStats, ...] | None = None
    approximate = False
    silent_ms = now_ms - state.caught_up_ms if state else 0
    unreadable = Doubt.RECENT_UNREADABLE in online.unreadable
    known = recent is not None or (state is not None and not unreadable)
    if known and silent_ms <= rules.max_staleness_ms:
        stats, approximate = _stats(recent, as_of_ms, in_hand, spans)
    return FeatureRow(
        user_id=online.user_id,
        as_of_ms=as_of_ms,
        stats=stats,
        credit_score=online.credit_score,
        amount_minor=in_hand.amount_minor if in_hand else None,
        fence=recent.fence if recent else None,
        degraded=_doubts(online, recent, as_of_ms, now_ms, spans),
        approximate=approximate,
    )


def _doubts(
    online: OnlineRow, recent: packed.Recent | None, as_of_ms: int, now_ms: int, spans: window.Spans
) -> tuple[str, ...]:
    """Say why values computed from `recent`, None for no row, may be wrong."""
    doubts: list[str] = [*online.unreadable]
    state, after_ms = online.state, as_of_ms - spans.longest_ms
    latest_ms = now_ms + AHEAD_MS
    elsewhere = online.recent is not None and online.recent.partition != online.partition
    if elsewhere or after_ms < online.split_ms:
        doubts.append(Doubt.SPLIT_USER)
    if (
        online.score_ms > latest_ms
        or (recent is not None and recent.fence.as_of_ms > latest_ms + spans.max_future_skew_ms)
        or (state is not None and state.caught_up_ms > latest_ms)
    ):
        doubts.append(Doubt.CLOCK_AHEAD)
    if state is None:
        return (*doubts, Doubt.OWNER_MISSING)
    if state.state != fences.LIVE:
        doubts.append(state.state)
    if now_ms - state.caught_up_ms > STALE_MS:
        doubts.append(Doubt.STALE)
    if after_ms < state.known_from(online.user_id, online.partition):
        doubts.append(Doubt.WARMING)
    elif recent is None:
        # A row is dropped when a kept length has passed: until then nobody has an older event.
        if as_of_ms < now_ms - spans.slack_ms:
            doubts.append(Doubt.AS_OF_TOO_OLD)
    elif after_ms < recent.lower_ms:
        doubts.append(Doubt.AS_OF_TOO_OLD if recent.complete else Doubt.WARMING)
    return tuple(doubts)


def _stats(
    recent: packed.Recent | None,
    as_of_ms: int,
    in_hand: transactions.Transaction | None,
    spans: window.Spans,
) -> tuple[tuple[window.WindowStats, ...], bool]:
    without = in_hand.id_hash64 if in_hand else None
    approximate = False
    result = []
    for span_ms in spans.spans_ms:
        stats = window.EMPTY
        if recent is not None:
            stats, rough, _ = recent.stats(as_of_ms - span_ms, as_of_ms, without)
            approximate |= rough
        if in_hand is not None:
            stats = window.WindowStats(stats.count + 1, stats.total_minor + in_hand.amount_minor)
        result.append(stats)
    return tuple(result), approximate
