"""Whether a record of the log is a transaction or a dead letter.

Pure: it depends on the record's bytes and timestamp alone, so every replay judges alike.
"""

from dataclasses import dataclass
from typing import Protocol

from cerberus import errors, transactions, window


class Record(Protocol):
    """What is read of a Kafka record."""

    @property
    def offset(self) -> int:
        """Its place in the log."""

    @property
    def timestamp(self) -> int:
        """Its own time, ms."""

    @property
    def value(self) -> bytes | None:
        """Its bytes."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record for the dead-letter topic, and the reason."""

    offset: int
    reason: str


def judge(
    record: Record, currency: str, spans: window.Spans
) -> transactions.Transaction | Rejected:
    """Read a record; what is refused is refused at every replay."""
    try:
        transaction = transactions.decode(record.value, currency)
    except errors.InvalidInput as error:
        return Rejected(record.offset, str(error))
    ahead_ms = transaction.event_ms - record.timestamp
    if ahead_ms > spans.max_future_skew_ms:
        return Rejected(record.offset, f"timestamp: lies {ahead_ms} ms ahead of the record's own")
    return transaction
