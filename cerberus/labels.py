"""Labels: the truth about a transaction, reported later, in a closed vocabulary.

`labelled_at` is when the source found it out; `seen_ms`, when the label first arrived, is set by
the store. The newest `labelled_at` wins.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from cerberus import documents, errors, transactions

FRAUD, CHARGEBACK = "fraud", "chargeback"
VOCABULARY = (
    FRAUD,
    CHARGEBACK,
    "account_takeover",
    "friendly_fraud",
    "legitimate",
    "false_positive",
)
MAX_ITEMS = 1_000


@dataclass(frozen=True, slots=True)
class Rules:
    """When a missing label counts as genuine, and what counts as fraud.

    Attributes:
        maturity_ms: After this long without a fraud label, a transaction that was not declined is
            genuine.
        friendly_fraud_positive: Whether `friendly_fraud` is fraud.
    """

    maturity_ms: int
    friendly_fraud_positive: bool


@dataclass(frozen=True, slots=True)
class Label:
    """What one source reported about a transaction.

    Attributes:
        transaction_id: 1 to 128 characters; the transaction itself may come later, or never.
        label: One of `VOCABULARY`.
        source: Who reported it, 1 to 128 characters.
        labelled_ms: When the source found it out, ms since the Unix epoch.
        user_id: The user of the transaction; None applies to every transaction with that id.
    """

    transaction_id: str
    label: str
    source: str
    labelled_ms: int
    user_id: int | None = None


Parsed = Label | errors.InvalidInput


def parse(document: Mapping[str, Any], latest_ms: int) -> Label:
    """Read a label; fields that are not known are passed over.

    Args:
        document: As it came.
        latest_ms: A later `labelled_at` is refused: it would win for ever.

    Raises:
        InvalidInput: naming the field.
    """
    label = document.get("label")
    if label not in VOCABULARY:
        raise errors.InvalidInput("label", f"must be one of {', '.join(VOCABULARY)}")
    try:
        labelled_ms = transactions.parse_timestamp({"timestamp": document.get("labelled_at")})
    except errors.InvalidInput as error:
        raise errors.InvalidInput("labelled_at", error.reason) from error
    if labelled_ms > latest_ms:
        raise errors.InvalidInput("labelled_at", "lies in the future")
    return Label(
        transaction_id=transactions.parse_text(document, "transaction_id"),
        label=label,
        source=transactions.parse_text(document, "source"),
        labelled_ms=labelled_ms,
        user_id=None if document.get("user_id") is None else transactions.parse_user_id(document),
    )


def parse_request(document: Mapping[str, Any], latest_ms: int) -> list[Parsed]:
    """Read one label, or `{"labels": […]}` with 1 to 1,000, each on its own. Cost: 2 µs each.

    Raises:
        InvalidInput: `labels` is no such list, or the one label is wrong.
    """
    if "labels" not in document:
        return [parse(document, latest_ms)]
    items = document["labels"]
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_ITEMS:
        raise errors.InvalidInput("labels", f"must be a list of 1 to {MAX_ITEMS} labels")
    return [_parsed(item, latest_ms) for item in items]


def _parsed(item: Any, latest_ms: int) -> Parsed:
    try:
        if not isinstance(item, dict):
            raise errors.InvalidInput("labels", "must hold JSON objects")
        return parse(item, latest_ms)
    except errors.InvalidInput as error:
        return error


def decode(value: bytes | None, latest_ms: int) -> Label:
    """Read one record of topic `labels`.

    Raises:
        InvalidInput: naming the field.
    """
    try:
        document = documents.read(value or b"")
    except orjson.JSONDecodeError as error:
        raise errors.InvalidInput("value", f"is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise errors.InvalidInput("value", "must be a JSON object")
    return parse(document, latest_ms)


def encode(label: Label) -> bytes:
    """Write one record of topic `labels`; `decode` reads back the same label."""
    return orjson.dumps(
        {
            "transaction_id": label.transaction_id,
            "label": label.label,
            "source": label.source,
            "labelled_at": transactions.format_ms(label.labelled_ms),
            "user_id": label.user_id,
        }
    )


def key(label: Label) -> bytes:
    """Return the Kafka key: all labels of a transaction are in one partition."""
    return label.transaction_id.encode()
