"""A decision with all its inputs: it is claimed, stored, published, shown, and can be repeated."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from cerberus import transactions, window
from cerberus.decisions import models
from cerberus.features import declared, evaluation, fences

HTTP, STREAM = "http", "stream"
VERSION = 1
"""The version of the bytes that `Record.pack` writes for other processes."""
COLUMNS = {
    "decision_id": "uuid",
    "as_of_ms": "bigint",
    "user_id": "bigint",
    "transaction_id": "text",
    "amount_minor": "bigint",
    "currency": "text",
    "merchant_id": "text",
    "door": "text",
    "features": "jsonb",
    "degraded": "text[]",
    "approximate": "boolean",
    "score": "float8",
    "probability": "float8",
    "prediction": "text",
    "decision": "text",
    "model_sha256": "text",
    "policy_sha256": "text",
    "fence_epoch": "bigint",
    "fence_offset": "bigint",
    "fence_as_of_ms": "bigint",
    "fence_partition": "integer",
    "latency_ms": "jsonb",
    "trace_id": "text",
    "decided_ms": "bigint",
}
"""What a decision consists of, and the SQL type of each part: for claims and table `decisions`."""


@dataclass(frozen=True, slots=True)
class Record:
    """One decision.

    Attributes:
        decision_id: Of the transaction's identity, or drawn where there was no transaction.
        decision: What was decided, with the feature row as it was served.
        transaction: In hand; None when a user alone was asked about.
        door: "http" or "stream", whichever came first.
        partition: Whose log the row's fence belongs to; None without a fence.
        decided_ms: Wall clock.
        latency_ms: By stage, ms.
        spans: Names of the windows that the row's values describe.
        trace_id: 32 hexadecimal digits (W3C Trace Context); empty when the caller gave none.
    """

    decision_id: uuid.UUID
    decision: models.Decision
    transaction: transactions.Transaction | None
    door: str
    partition: int | None
    decided_ms: int
    spans: tuple[str, ...]
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    trace_id: str = ""

    def columns(self) -> dict[str, Any]:
        """Return the record flat, in the order of `COLUMNS`; `from_columns` reads it back."""
        decision, row, txn = self.decision, self.decision.row, self.transaction
        epoch, offset, as_of_ms = row.fence or (None, None, None)
        return {
            "decision_id": self.decision_id,
            "as_of_ms": row.as_of_ms,
            "user_id": row.user_id,
            "transaction_id": txn and txn.transaction_id,
            "amount_minor": row.amount_minor,
            "currency": txn and txn.currency,
            "merchant_id": txn and txn.merchant_id,
            "door": self.door,
            "features": show_features(row, self.spans),
            "degraded": row.degraded,
            "approximate": row.approximate,
            "score": decision.score,
            "probability": decision.probability,
            "prediction": decision.prediction,
            "decision": decision.action,
            "model_sha256": decision.model_sha256,
            "policy_sha256": decision.policy_sha256,
            "fence_epoch": epoch,
            "fence_offset": offset,
            "fence_as_of_ms": as_of_ms,
            "fence_partition": self.partition,
            "latency_ms": self.latency_ms,
            "trace_id": self.trace_id,
            "decided_ms": self.decided_ms,
        }

    def pack(self, version: int = VERSION) -> bytes:
        """Write the record for another process; `unpack` reads back the same one.

        Args:
            version: 1 is a JSON object of `columns` with its version; 0 is the JSON array that
                releases before versions were introduced wrote, and the only form they read.
        """
        if version >= VERSION:
            return orjson.dumps({"version": VERSION, **self.columns()})
        decision, row, txn = self.decision, self.decision.row, self.transaction
        return orjson.dumps(
            [
                self.decision_id.hex,
                self.door,
                self.partition,
                self.decided_ms,
                self.latency_ms,
                self.trace_id,
                self.spans,
                [decision.score, decision.probability, decision.prediction, decision.action],
                [decision.model_sha256, decision.policy_sha256],
                txn and [txn.transaction_id, txn.amount_minor, txn.currency, txn.merchant_id],
                row.user_id,
                row.as_of_ms,
                row.stats and [(s.count, s.total_minor) for s in row.stats],
                row.credit_score,
                row.fence and tuple(row.fence),
                row.degraded,
                row.approximate,
            ]
        )

    def differing(self, other: transactions.Transaction) -> str | None:
        """Name the field in which a transaction of the same identity has other content.

        A merchant that only one of them names is no difference.
        """
        mine = self.transaction
        if mine is None or mine.amount_minor != other.amount_minor:
            return "amount"
        merchants = {mine.merchant_id, other.merchant_id} - {""}
        return "merchant_id" if len(merchants) > 1 else None

    def public(self) -> dict[str, Any]:
        """Lay it out as topic `decisions` and `GET /decisions` show it."""
        decision, row, txn = self.decision, self.decision.row, self.transaction
        shown: dict[str, Any] = {
            "decision_id": str(self.decision_id),
            "transaction_id": txn and txn.transaction_id,
            "user_id": row.user_id,
            "amount": txn and txn.amount_minor / 100,
            "currency": txn and txn.currency,
            "merchant_id": txn and txn.merchant_id,
            "as_of": transactions.format_ms(row.as_of_ms),
            "door": self.door,
            "decision": decision.action,
            "prediction": decision.prediction,
            "probability": decision.probability,
            "score": decision.score,
            "features": show_features(row, self.spans),
            "degraded": row.degraded,
            "approximate": row.approximate,
            "fence": fence(row.fence, self.partition),
            "model_version": decision.model_sha256,
            "policy_version": decision.policy_sha256,
            "latency_ms": self.latency_ms,
            "trace_id": self.trace_id or None,
            "decided_at": transactions.format_ms(self.decided_ms),
        }
        return shown


def from_columns(told: Mapping[str, Any]) -> Record:
    """Read what `Record.columns` returned; other keys are ignored.

    Raises:
        KeyError: A column is missing.
    """
    spans, stats, credit_score = read_features(told["features"])
    return Record(
        decision_id=told["decision_id"],
        decision=models.Decision(
            row=_row(told, stats, credit_score),
            score=told["score"],
            probability=told["probability"],
            prediction=told["prediction"],
            action=told["decision"],
            model_sha256=told["model_sha256"],
            policy_sha256=told["policy_sha256"],
        ),
        transaction=_transaction(told),
        door=told["door"],
        partition=told["fence_partition"],
        decided_ms=told["decided_ms"],
        spans=spans,
        latency_ms=told["latency_ms"],
        trace_id=told["trace_id"] or "",
    )


def _row(
    told: Mapping[str, Any],
    stats: tuple[window.WindowStats, ...] | None,
    credit_score: int | None,
) -> evaluation.FeatureRow:
    prefix = None
    if told["fence_epoch"] is not None:
        prefix = fences.Fence(told["fence_epoch"], told["fence_offset"], told["fence_as_of_ms"])
    return evaluation.FeatureRow(
        user_id=told["user_id"],
        as_of_ms=told["as_of_ms"],
        stats=stats,
        credit_score=credit_score,
        amount_minor=told["amount_minor"],
        fence=prefix,
        degraded=tuple(told["degraded"]),
        approximate=told["approximate"],
    )


def _transaction(told: Mapping[str, Any]) -> transactions.Transaction | None:
    if told["transaction_id"] is None:
        return None
    return transactions.Transaction(
        transaction_id=told["transaction_id"],
        user_id=told["user_id"],
        amount_minor=told["amount_minor"],
        currency=told["currency"] or "",
        merchant_id=told["merchant_id"] or "",
        event_ms=told["as_of_ms"],
    )


def unpack(value: bytes) -> Record:
    """Read what `Record.pack` wrote in any version up to the present one.

    Raises:
        ValueError: The bytes are of a later version, or not a decision.
    """
    try:
        told = orjson.loads(value)
        if isinstance(told, list):
            return _from_array(told)
        if told["version"] == VERSION:
            return from_columns(told | {"decision_id": uuid.UUID(told["decision_id"])})
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"decision: the bytes are not a decision ({error!r})") from error
    raise ValueError(f"decision: version {told['version']} is later than {VERSION}; update")


def _from_array(told: Sequence[Any]) -> Record:
    """Read version 0."""
    name, door, partition, decided_ms, latency_ms, trace_id, spans = told[:7]
    (score, probability, prediction, action), versions, paid = told[7:10]
    user_id, as_of_ms, stats, credit_score, prefix, degraded, approximate = told[10:]
    row = evaluation.FeatureRow(
        user_id=user_id,
        as_of_ms=as_of_ms,
        stats=stats and tuple(window.WindowStats(*each) for each in stats),
        credit_score=credit_score,
        amount_minor=paid and paid[1],
        fence=prefix and fences.Fence(*prefix),
        degraded=tuple(degraded),
        approximate=approximate,
    )
    transaction = None
    if paid is not None:
        transaction_id, amount_minor, currency, merchant_id = paid
        transaction = transactions.Transaction(
            transaction_id, user_id, amount_minor, currency, merchant_id, as_of_ms
        )
    return Record(
        decision_id=uuid.UUID(hex=name),
        decision=models.Decision(row, score, probability, prediction, action, *versions),
        transaction=transaction,
        door=door,
        partition=partition,
        decided_ms=decided_ms,
        spans=tuple(spans),
        latency_ms=latency_ms,
        trace_id=trace_id,
    )


def fence(prefix: fences.Fence | None, partition: int | None) -> dict[str, int | None] | None:
    """Show which prefix of which partition's log values describe; None without a row."""
    return prefix and {"epoch": prefix.epoch, "offset": prefix.offset, "partition": partition}


def show_features(row: evaluation.FeatureRow, spans: Sequence[str]) -> dict[str, Any]:
    """Name the values as the API shows them; null where they could not be had."""
    shown: dict[str, Any] = {}
    for i, (count, total) in enumerate(map(declared.of_window, spans)):
        stats = row.stats[i] if row.stats is not None else None
        shown[count.public] = stats.count if stats else None
        shown[total.public] = stats.total_minor / 100 if stats else None
    shown[declared.CREDIT_SCORE.public] = row.credit_score
    return shown


def read_features(
    shown: Mapping[str, Any],
) -> tuple[tuple[str, ...], tuple[window.WindowStats, ...] | None, int | None]:
    """Read what `show_features` showed.

    Returns:
        The names of the windows, increasing; their stats; the credit score.
    """
    spans = declared.spans_shown(shown)
    windows = [declared.of_window(span) for span in spans]
    stats = None
    if all(shown[count.public] is not None for count, _ in windows):
        stats = tuple(
            window.WindowStats(shown[count.public], round(shown[total.public] * 100))
            for count, total in windows
        )
    return spans, stats, shown[declared.CREDIT_SCORE.public]


def of_transaction(transaction: transactions.Transaction) -> uuid.UUID:
    """Name the one decision of a transaction."""
    return transactions.decision_id(
        transaction.user_id, transaction.transaction_id, transaction.event_ms
    )
