"""Decisions and labels as they may be, and what a reader of the whole table would say of them."""

import dataclasses
import uuid

from served import NOW_MS

from cerberus import labels, transactions, window
from cerberus.decisions import models, records
from cerberus.features import evaluation

DAY_MS = 86_400_000
POSITIVE = {"fraud", "chargeback", "account_takeover"}
GOOD = {
    "transaction_id": "order-1",
    "label": "fraud",
    "source": "bank",
    "labelled_at": transactions.format_ms(NOW_MS),
}


def label(transaction_id="order-1", what="fraud", source="bank", at=NOW_MS, user_id=None):
    return labels.Label(transaction_id, what, source, at, user_id)


def decided(
    transaction_id, at_ms, *, user_id=1, action="approve", minor=1000, model="ab", late_ms=0
):
    """Return a decision on a transaction; without a `transaction_id`, on a user alone."""
    row = evaluation.FeatureRow(user_id, at_ms, (window.WindowStats(2, 1999),), 700, minor)
    paid = transactions.Transaction(transaction_id or "", user_id, minor, "USD", "m", at_ms)
    return records.Record(
        decision_id=records.of_transaction(paid) if transaction_id else uuid.uuid4(),
        decision=models.Decision(row, -1.0, 0.5, models.LEGIT, action, model, "cd"),
        transaction=paid if transaction_id else None,
        door=records.STREAM,
        partition=None,
        decided_ms=at_ms + late_ms,
        spans=("10m",),
    )


@dataclasses.dataclass
class Told:
    """All that was told, and when it first reached us."""

    seen: dict = dataclasses.field(default_factory=dict)

    def tell(self, some, seen_ms):
        """Take labels; return which are new."""
        new = []
        for each in some:
            new.append(each not in self.seen)
            self.seen.setdefault(each, seen_ms)
        return new

    def of(self, record, t_ms):
        """Return the label of a decision that was known at t."""
        paid = record.transaction
        known = [
            (label.labelled_ms, seen_ms, label.label, label.source, label)
            for label, seen_ms in self.seen.items()
            if seen_ms <= t_ms
            and label.transaction_id == paid.transaction_id
            and label.user_id in (None, paid.user_id)
        ]
        return max(known, key=lambda one: one[:4])[4] if known else None


def matured(record, t_ms, maturity_ms):
    return max(record.decided_ms, record.transaction.event_ms) + maturity_ms <= t_ms


def truth(record, label, t_ms, rules):
    """Say whether it was fraud; None when nobody can know."""
    if label is not None:
        friendly = label.label == "friendly_fraud" and rules.friendly_fraud_positive
        return label.label in POSITIVE or friendly
    if record.decision.action != "decline" and matured(record, t_ms, rules.maturity_ms):
        return False
    return None


def key(told):
    return (told.transaction_id, told.user_id, told.label, told.source, told.labelled_ms)


async def kept(pool):
    rows = await pool.fetch(
        "SELECT transaction_id, user_id, label, source, labelled_ms, seen_ms FROM labels"
    )
    return {tuple(row)[:5]: row["seen_ms"] for row in rows}
