"""One card transaction: its fields, its identity, and its format on the wire.

Money is `amount_minor: int` (cents) inside and a decimal with two places outside: sums of binary
fractions drift, and an empty window would keep a balance. Time is `event_ms`, milliseconds since
the Unix epoch, inside and RFC 3339 in UTC outside.
"""

import datetime
import functools
import hashlib
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from cerberus import documents, errors

MAX_AMOUNT_MINOR = 10**12
MAX_USER_ID = 2**63 - 1
MAX_TEXT = 128
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MS = datetime.timedelta(milliseconds=1)
_RFC_3339 = re.compile(
    # Python versions differ about 24:00:00, a second 60 and an offset of +05:60.
    r"\d{4}-\d\d-\d\d[Tt ](?:[01]\d|2[0-3])(?::[0-5]\d){2}(\.\d{1,9})?"
    r"([Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)
_YEAR_2000_MS, _YEAR_2100_MS = 946_684_800_000, 4_102_444_800_000
_YEAR_1971_MS, _YEAR_2200_MS = 31_536_000_000, 7_258_118_400_000
_EXACT = 2**53
THROUGH_A_DOUBLE = (
    "may have lost digits as a floating-point number: export it as text or as an integer"
)
"""Why an id is refused that may differ from the original."""
NO_VALUE = ("\\N", "null", "none", "nan", "n/a", "#n/a", "<na>", "(null)")
"""What programs write for a missing id, in upper or lower case."""
# `12e5` may be hexadecimal; programs write 1.2E+6.
ROUNDED = r"[+-]?\d+(?:[.,]\d+[eE][+-]?|[eE]\+)\d+"
"""The form in which programs write a long number."""
_NO_ID = re.compile("|".join([ROUNDED, *map(re.escape, NO_VALUE)]), re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Transaction:
    """One accepted payment attempt.

    Attributes:
        transaction_id: The client's id for it, 1 to 128 characters.
        user_id: 0 to 2**63 - 1; the Kafka key is its ASCII digits.
        amount_minor: Cents, not negative.
        currency: ISO 4217, the currency of the deployment.
        merchant_id: At most 128 characters; empty when unknown.
        event_ms: When it happened, ms since the Unix epoch.
    """

    transaction_id: str
    user_id: int
    amount_minor: int
    currency: str
    merchant_id: str
    event_ms: int

    @property
    def id_hash64(self) -> int:
        """Hash of the identity (user, id, event time); unsigned 64 bits."""
        return id_hash64(self.user_id, self.transaction_id, self.event_ms)

    @property
    def merchant_hash32(self) -> int:
        """Hash of the merchant; unsigned 32 bits, 0 when unknown."""
        return merchant_hash32(self.merchant_id)


def id_hash64(user_id: int, transaction_id: str, event_ms: int) -> int:
    """Hash an identity to 64 bits.

    The event time is part of it: otherwise a retry with a new timestamp would make a replayed
    window differ from the live one. Cost: about 1 µs.
    """
    digest = hashlib.blake2b(f"{user_id}\0{event_ms}\0{transaction_id}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


@functools.lru_cache(maxsize=65_536)
def merchant_hash32(merchant_id: str) -> int:
    """Hash a merchant to 32 bits; the empty name is 0."""
    if not merchant_id:
        return 0
    digest = hashlib.blake2b(merchant_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def decision_id(user_id: int, transaction_id: str, event_ms: int) -> uuid.UUID:
    """Return the id of the decision on an identity: the same UUIDv8 at every door and replay."""
    name = f"{user_id}\0{event_ms}\0{transaction_id}".encode()
    value = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")
    # Python takes version=8 only from 3.14 on.
    value = value & ~(0xF << 76) | 0x8 << 76
    return uuid.UUID(int=value & ~(0x3 << 62) | 0x2 << 62)


def key(user_id: int) -> bytes:
    """Return the Kafka key of a user, ASCII digits: a user's records share a partition."""
    return b"%d" % user_id


@functools.lru_cache(maxsize=262_144)
def partition_of(user_id: int, partitions: int) -> int:
    """Return the partition where Kafka's default partitioner puts a user (murmur2 of the key)."""
    return (_murmur2(key(user_id)) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        k = (k ^ (k >> 24)) * m & mask
        h = (h * m & mask) ^ k
    if tail := data[whole:]:
        h = (h ^ int.from_bytes(tail, "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return h ^ (h >> 15)


def decode(value: bytes | None, currency: str) -> Transaction:
    """Read one record of topic `transactions`.

    Raises:
        InvalidInput: naming the field; the outcome depends on the record's bytes alone.
    """
    if value is None:
        raise errors.InvalidInput("value", "is empty")
    try:
        document = documents.read(value)
    except orjson.JSONDecodeError as error:
        raise errors.InvalidInput("value", f"is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise errors.InvalidInput("value", "must be a JSON object")
    return Transaction(
        transaction_id=parse_text(document, "transaction_id"),
        user_id=parse_user_id(document),
        amount_minor=parse_amount(document),
        currency=parse_currency(document, currency),
        merchant_id=parse_text(document, "merchant_id", default=""),
        event_ms=parse_timestamp(document),
    )


def encode(transaction: Transaction) -> bytes:
    """Write one record of topic `transactions`; `decode` reads back the same transaction."""
    return orjson.dumps(
        {
            "transaction_id": transaction.transaction_id,
            "user_id": transaction.user_id,
            "amount": transaction.amount_minor / 100,
            "currency": transaction.currency,
            "merchant_id": transaction.merchant_id,
            "timestamp": format_ms(transaction.event_ms),
        }
    )


def parse_user_id(document: Mapping[str, Any]) -> int:
    """Read `user_id`: an integer from 0 to 2**63 - 1, in JSON also in the form 325.0.

    Raises:
        InvalidInput: naming the field.
    """
    value = document.get("user_id")
    if type(value) is not int:
        if value is None:
            raise errors.InvalidInput("user_id", "is missing; it must be an integer")
        value = whole("user_id", value, "an integer")
    if not 0 <= value <= MAX_USER_ID:
        raise errors.InvalidInput("user_id", f"must be between 0 and {MAX_USER_ID}")
    return value


def parse_text(document: Mapping[str, Any], field: str, default: str | None = None) -> str:
    """Read a text of 1 to 128 characters; `default` when the field is absent or null.

    A whole number counts as its digits, because many systems write ids as numbers.

    Raises:
        InvalidInput: naming the field.
    """
    value = document.get(field)
    if not isinstance(value, str):
        if value is None and default is not None:
            return default
        if value is None:
            raise errors.InvalidInput(field, "is missing; it must be a string")
        return str(whole(field, value, "a string"))
    if not 0 < len(value) <= MAX_TEXT and value != default:
        raise errors.InvalidInput(field, f"must have 1 to {MAX_TEXT} characters")
    # Postgres cannot store it, and it separates the fields of an identity.
    if "\0" in value:
        raise errors.InvalidInput(field, "must not contain the NUL character")
    if field.endswith("_id"):
        check_id(field, value)
    return value


def check_id(field: str, value: str) -> None:
    """Refuse a word for a missing value, and a number that has lost digits.

    Otherwise different ids would become the same one.

    Raises:
        InvalidInput: naming the field.
    """
    if _NO_ID.fullmatch(value):
        lost = value[-1].isdecimal()
        reason = THROUGH_A_DOUBLE if lost else f"{value} stands for no value: send null instead"
        raise errors.InvalidInput(field, reason)


def whole(field: str, value: Any, wanted: str) -> int:
    """Read an integer in any form that JSON has for it: 325, 325.0, 3.25e2.

    Args:
        field: Its name.
        value: As a JSON parser returned it; an integer that exceeds 64 bits may be a double.
        wanted: What the field should be, for the refusal.

    Raises:
        InvalidInput: naming the field; the value is not a whole number, or may have lost digits.
    """
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if type(value) is not int and not (type(value) is float and value.is_integer()):
        raise errors.InvalidInput(field, f"must be {wanted}")
    # 2**53 as a double may have been 2**53 + 1.
    if type(value) is int or abs(value) >= _EXACT:
        raise errors.InvalidInput(
            field,
            "was written as a floating-point number above 2**53, or with more digits than 64 bits "
            f"hold, so its last digits are unknown; it must be {wanted}",
        )
    return int(value)


def parse_amount(document: Mapping[str, Any]) -> int:
    """Read `amount`, a number of major units with at most two places, as cents.

    Raises:
        InvalidInput: naming the field.
    """
    value = document.get("amount")
    if type(value) is int:
        minor = value * 100
    elif type(value) is float:
        minor = round(value * 100) if abs(value) < MAX_AMOUNT_MINOR else MAX_AMOUNT_MINOR + 1
        # The nearest double to a two-place decimal is the quotient of its cents; nothing else is.
        if abs(minor) <= MAX_AMOUNT_MINOR and minor / 100 != value:
            raise errors.InvalidInput("amount", "must have at most two decimal places")
    else:
        raise errors.InvalidInput("amount", "must be a number such as 12.50")
    if not 0 <= minor <= MAX_AMOUNT_MINOR:
        raise errors.InvalidInput("amount", f"must be between 0 and {MAX_AMOUNT_MINOR // 100}")
    return minor


def parse_currency(document: Mapping[str, Any], currency: str) -> str:
    """Read `currency`, which must be the deployment's; absent means that one.

    Raises:
        InvalidInput: naming the field.
    """
    value = document.get("currency")
    if value not in (None, currency):
        raise errors.InvalidInput(
            "currency", f"must be {currency}, the currency of this deployment"
        )
    return currency


def parse_timestamp(document: Mapping[str, Any]) -> int:
    """Read `timestamp`, RFC 3339 with an offset, as ms since the Unix epoch (finer is cut off).

    Raises:
        InvalidInput: naming the field; also for 1970, where a wrong unit puts today's times.
    """
    event_ms = parse_moment("timestamp", document.get("timestamp"), first_year=1971)
    if event_ms < _YEAR_1971_MS:
        raise errors.InvalidInput("timestamp", f"must lie between 1971 and 2200{_likely(event_ms)}")
    return event_ms


def parse_moment(field: str, value: Any, first_year: int = 1970) -> int:
    """Read RFC 3339 with an offset, from 1970 on, as ms since the Unix epoch (finer is cut off).

    Args:
        field: Its name.
        value: As it came.
        first_year: Of those that the caller takes, for the refusal.

    Raises:
        InvalidInput: naming the field.
    """
    # What else `fromisoformat` accepts differs between versions of Python.
    if not isinstance(value, str) or not _RFC_3339.fullmatch(value):
        raise errors.InvalidInput(field, "must be RFC 3339 such as 2026-01-31T12:00:00.000Z")
    try:
        moment = datetime.datetime.fromisoformat(value.upper())
        moment_ms = (moment - _EPOCH) // _MS
    except (ValueError, OverflowError, TypeError) as error:
        raise errors.InvalidInput(field, "must be RFC 3339 with Z or an offset") from error
    if not 0 <= moment_ms < _YEAR_2200_MS:
        raise errors.InvalidInput(field, f"must lie between {first_year} and 2200")
    return moment_ms


def _likely(event_ms: int) -> str:
    """Say which unit was probably mistaken for another: today's times then lie in 1970."""
    for factor, said in (
        (10**3, "seconds were read as milliseconds"),
        (10**6, "seconds were read as microseconds, or milliseconds as nanoseconds"),
        (10**9, "seconds were read as nanoseconds"),
    ):
        if _YEAR_2000_MS <= event_ms * factor < _YEAR_2100_MS:
            return f"; it is {format_ms(event_ms * factor)[:10]} if {said}"
    return ""


def format_ms(ms: int) -> str:
    """Write ms since the Unix epoch as RFC 3339 in UTC with three places."""
    moment = _EPOCH + datetime.timedelta(milliseconds=ms)
    return f"{moment.isoformat(timespec='milliseconds')[:23]}Z"
