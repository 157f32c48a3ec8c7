"""Decisions as they may be, for property tests: anything that the service itself can have made."""

import struct
import uuid

from hypothesis import strategies as st

from cerberus import transactions, window
from cerberus.decisions import models, policy
from cerberus.decisions import records as decision_records
from cerberus.features import evaluation
from cerberus.features import fences as log_fences

SPANS = ("10m", "1h", "24h")
YEAR_1971_MS = 31_536_000_000
YEAR_2200_MS = 7_258_118_400_000
texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=128)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
floats = st.floats(allow_nan=False, allow_infinity=False)
moments = st.integers(YEAR_1971_MS, YEAR_2200_MS - 1)
fences = st.builds(
    log_fences.Fence, st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(-1, 2**62)
)


@st.composite
def rows(draw, spans=SPANS, transaction=None):
    """Draw a feature row of a transaction in hand, or of a user alone."""
    stats = st.builds(window.WindowStats, st.integers(0, 10**6), st.integers(0, 10**15))
    doubts = st.sets(st.sampled_from(["stale", "warming", "split_user", "recent_unreadable"]))
    return evaluation.FeatureRow(
        user_id=transaction.user_id
        if transaction
        else draw(st.integers(0, transactions.MAX_USER_ID)),
        as_of_ms=transaction.event_ms if transaction else draw(moments),
        stats=draw(st.none() | st.tuples(*[stats] * len(spans))),
        credit_score=draw(st.none() | st.integers(300, 850)),
        amount_minor=transaction and transaction.amount_minor,
        fence=draw(st.none() | fences),
        degraded=tuple(sorted(draw(doubts))),
        approximate=draw(st.booleans()),
    )


paid = st.builds(
    transactions.Transaction,
    transaction_id=texts,
    user_id=st.integers(0, transactions.MAX_USER_ID),
    amount_minor=st.integers(0, transactions.MAX_AMOUNT_MINOR),
    currency=st.sampled_from(["USD", "EUR"]),
    merchant_id=st.just("") | texts,
    event_ms=moments,
)


@st.composite
def records(draw, decide=None, spans=SPANS):
    """Draw a record; with any decision, unless `decide` takes it from the row."""
    transaction = draw(st.none() | paid)
    row = draw(rows(spans[: draw(st.integers(1, len(spans)))], transaction))
    if decide is not None:
        [decision] = decide([row])
    else:
        decision = models.Decision(
            row,
            draw(floats),
            draw(st.floats(0, 1)),
            draw(st.sampled_from([models.FRAUD, models.LEGIT])),
            draw(st.sampled_from([policy.APPROVE, policy.REVIEW, policy.DECLINE])),
            draw(hashes),
            draw(hashes),
        )
    stages = st.sampled_from(["wait", "features", "model"])
    return decision_records.Record(
        decision_id=decision_records.of_transaction(transaction)
        if transaction
        else uuid.UUID(bytes=draw(st.binary(min_size=16, max_size=16)), version=4),
        decision=decision,
        transaction=transaction,
        door=draw(st.sampled_from([decision_records.HTTP, decision_records.STREAM])),
        partition=draw(st.none() | st.integers(0, 2**31 - 1)),
        decided_ms=draw(moments),
        spans=spans[: len(row.stats)] if row.stats else spans,
        latency_ms=draw(st.dictionaries(stages, st.floats(0, 1e6).map(lambda ms: round(ms, 3)))),
        trace_id=draw(st.just("") | st.binary(min_size=16, max_size=16).map(bytes.hex)),
    )


def bits(decision):
    """Return what a decision's floats are made of: equality lets -0.0 be 0.0."""
    return struct.pack(">dd", decision.score, decision.probability)


def decided(name, at_ms, told_by="", amount_minor=1_000, door=decision_records.HTTP):
    """Return one of many decisions that could be taken on a transaction."""
    paid = transactions.Transaction(str(name), 1, amount_minor, "USD", "", at_ms)
    row = evaluation.FeatureRow(
        1, at_ms, (window.WindowStats(1, amount_minor),), None, amount_minor
    )
    decision = models.Decision(row, -1.0, 0.5, models.LEGIT, policy.APPROVE, "ab", "cd")
    name = decision_records.of_transaction(paid)
    return decision_records.Record(
        name, decision, paid, door, None, at_ms, ("10m",), trace_id=f"{told_by:0>32}"
    )
