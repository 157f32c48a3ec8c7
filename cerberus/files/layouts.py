"""Turn a row of a data file into the fields of a record, by the rules of the topic.

A file may write a field in more ways than the topic accepts: a number as text, an id in a column of
doubles, a time in the form of Postgres or Java. If two readings are possible, the row is refused,
and the reason says how to choose one.
"""

import math
import pathlib
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from cerberus import errors, labels, transactions
from cerberus.files import datafiles
from cerberus.files.rows import Ms, Row, Single
from cerberus.postgres import facts, imports

REQUIRED = ("transaction_id", "user_id", "amount", "timestamp")
OPTIONAL = ("currency", "merchant_id")
SELECT_HELP = (
    "DuckDB SQL that maps columns to fields: EXPRESSION AS FIELD, … [WHERE …]; a field that it "
    "does not name is read from the column of the same name"
)
ENCODING_HELP = "the encoding of a text file that is not UTF-8, such as cp1252 or latin-1"
# From here on, a whole number may have changed when it became a floating-point number.
_EXACT, _EXACT_SINGLE = 2**53, 2**24
_CENTS_SINGLE = 2**17  # from here on, single precision does not distinguish cents
_COLUMNS, _MAX_SCORE = 30, 100_000
_DIGITS = 25  # fewer than Decimal computes with
_WHOLE = re.compile(r"([+-]?\d{1,20})(\.0+)?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d{1,20}(\.\d{1,12})?|\.\d{1,12})", re.ASCII)
_PLAIN = re.compile(r"\d{1,12}(\.\d\d?)?", re.ASCII)
_SCIENTIFIC = re.compile(r"[+-]?\d+([.,]\d+)?[eE][+-]?\d+", re.ASCII)
_GROUPED = re.compile(r"\d{1,3}(?:([,'’\u00a0\u202f ])\d{3})(?:\1\d{3})*")
_NOTHING = {each.lower() for each in transactions.NO_VALUE} | {
    *("nil", "na", "nat", "-nan", "undefined", "inf", "-inf"),
    *("#num!", "#value!", "#ref!", "#name?", "#null!", "#div/0!"),
}
_SUSPECT = re.compile(  # matches all that `_judged` may refuse, and nothing common
    r"\s*(?:#+|[+-]?\d[\d.,'’\u00a0\u202f ]*[eE.,'’\u00a0\u202f ][+-]?\d+|"
    + "|".join(map(re.escape, sorted(_NOTHING)))
    + r")\s*",
    re.IGNORECASE,
)
_MOMENT = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d)(:\d\d)?(\.\d{1,9})?"
    r"(?: ?(?:([Zz]|UTC)|([+-]\d\d):?(\d\d)?))(?:\[[\w/+-]+\])?",
    re.ASCII,
)
_LOCAL = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?)?", re.ASCII)
_UNITS = (
    ("seconds", 1, "to_timestamp({}::DOUBLE)"),
    ("milliseconds", 10**3, "epoch_ms({}::BIGINT)"),
    ("microseconds", 10**6, "make_timestamp({}::BIGINT)"),
    ("nanoseconds", 10**9, "make_timestamp_ns({}::BIGINT)"),
)
_SHORTEST = len("2026-11-24T11:00:0Z")  # a longer text with Z is RFC 3339 or invalid
_LIKELY_S = (946_684_800, 4_102_444_800)  # the years 2000 to 2100


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file is read.

    Attributes:
        select: SQL that maps columns to fields, such as "amt AS amount"; a field that it does not
            name is read from the column of the same name.
        encoding: The encoding of a text file that is not UTF-8.
    """

    select: str = ""
    encoding: str = ""

    def open(
        self,
        path: pathlib.Path,
        required: Sequence[str],
        optional: Sequence[str] = (),
        root: pathlib.Path | None = None,
    ) -> datafiles.File:
        """Open a file of records; `root` is the folder that was asked for, if it was one.

        Raises:
            InvalidInput: naming the required field that has neither column nor expression.
        """
        file = datafiles.File(path, (*required, *optional), self.select, self.encoding, root)
        for name in required:
            if name not in file.fields:
                raise errors.InvalidInput(
                    name,
                    f"{path.name} has no column {name!r}, only {_shown(file.columns or ())}; "
                    f'give --select "COLUMN AS {name}"',
                )
        return file


def _shown(columns: Sequence[str]) -> str:
    """List columns with escapes, because the file's author must not control the terminal."""
    more = f" and {len(columns) - _COLUMNS} more" if len(columns) > _COLUMNS else ""
    return ", ".join(c if c.isprintable() else ascii(c) for c in columns[:_COLUMNS]) + more


def values(row: Row) -> Mapping[str, Any]:
    """Return a row's values by field.

    Raises:
        InvalidInput: The row cannot be read.
    """
    if row.broken:
        raise errors.InvalidInput(row.field, row.broken)
    return row.values


def transaction(row: Row, currency: str) -> transactions.Transaction:
    """Read a row as a transaction.

    Raises:
        InvalidInput: naming the field.
    """
    found = values(row)
    document = {
        "transaction_id": text(found.get("transaction_id"), "transaction_id"),
        "user_id": whole(found.get("user_id"), "user_id"),
        "amount": amount(found.get("amount")),
        "currency": filled(found.get("currency")),
        "merchant_id": text(found.get("merchant_id"), "merchant_id"),
        "timestamp": moment(found.get("timestamp"), "timestamp"),
    }
    return transactions.Transaction(
        transaction_id=transactions.parse_text(document, "transaction_id"),
        user_id=transactions.parse_user_id(document),
        amount_minor=transactions.parse_amount(document),
        currency=transactions.parse_currency(document, currency),
        merchant_id=transactions.parse_text(document, "merchant_id", default=""),
        event_ms=transactions.parse_timestamp(document),
    )


def label(row: Row, latest_ms: int) -> labels.Label:
    """Read a row as a label.

    Raises:
        InvalidInput: naming the field.
    """
    found = values(row)
    said = found.get("label")
    word = str(said).lower() if isinstance(said, bool) else text(said, "label")
    document = {
        "transaction_id": text(found.get("transaction_id"), "transaction_id"),
        "label": word,
        "source": text(found.get("source"), "source") or facts.IMPORTED,
        "labelled_at": moment(found.get("labelled_at"), "labelled_at"),
        "user_id": whole(found.get("user_id"), "user_id"),
    }
    return labels.parse(document, latest_ms)


def score(row: Row) -> imports.Score:
    """Read a row as a credit score.

    Raises:
        InvalidInput: naming the field.
    """
    found = values(row)
    found_score = whole(found.get("credit_score"), "credit_score")
    if type(found_score) is not int or not 0 <= found_score <= _MAX_SCORE:
        raise errors.InvalidInput("credit_score", f"must be a whole number from 0 to {_MAX_SCORE}")
    at = moment(found.get("timestamp"), "timestamp")
    return imports.Score(
        user_id=transactions.parse_user_id({"user_id": whole(found.get("user_id"), "user_id")}),
        event_ms=transactions.parse_timestamp({"timestamp": at}),
        score=found_score,
    )


def filled(value: Any) -> Any:
    """Return None for an empty cell, and for the NaN that Parquet and pandas write into one."""
    if value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def text(value: Any, field: str) -> Any:
    """Return a name as text: a number as its digits, 16 bytes as the UUID that they are.

    Raises:
        InvalidInput: It is a number that has lost digits, or a word for a missing value.
    """
    if isinstance(value, str):
        return (_judged(value, field) if _SUSPECT.fullmatch(value) else value) or None
    if isinstance(value, bytes):
        return _of_bytes(value)
    number = whole(value, field)
    return str(number) if type(number) is int else number


def whole(value: Any, field: str) -> Any:
    """Return a whole number as int, even if it is stored as text or as a double.

    Raises:
        InvalidInput: It has lost digits, or is a word for a missing value.
    """
    if isinstance(value, str):
        if _SUSPECT.fullmatch(value):
            value = _judged(value, field)
        return int(found[1]) if (found := _WHOLE.fullmatch(value)) else value or None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        if abs(value) >= (_EXACT_SINGLE if isinstance(value, Single) else _EXACT):
            raise errors.InvalidInput(field, transactions.THROUGH_A_DOUBLE)
        return int(value) if value == int(value) else value
    number = _decimal(value) if isinstance(value, Decimal) else None
    return value if number is None or number % 1 else int(number)


def _judged(value: str, field: str) -> str:
    """Return the text of an id; pandas writes `325.0` if the column has empty cells."""
    bare = value.strip()
    if bare.lower() in _NOTHING or (bare and not bare.strip("#")):
        raise errors.InvalidInput(
            field, f"{value} stands for no value: NULLIF in --select says what is empty"
        )
    transactions.check_id(field, bare)
    if _GROUPED.fullmatch(value):
        raise errors.InvalidInput(field, "has separators between its digits: export it without")
    if (found := _WHOLE.fullmatch(value)) and found[2]:
        if abs(int(found[1])) >= _EXACT:
            raise errors.InvalidInput(field, transactions.THROUGH_A_DOUBLE)
        return found[1]
    return value


def _of_bytes(value: bytes) -> Any:
    try:
        found = str(value, "utf-8")
    except UnicodeDecodeError:
        found = ""
    if found.isprintable() and found:
        return found
    return str(uuid.UUID(bytes=value)) if len(value) == 16 else value


def amount(value: Any) -> Any:
    """Return an amount as the nearest double to its decimal.

    Raises:
        InvalidInput: It has more than two decimal places, or is negative.
    """
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return float(value)
    if isinstance(value, Single) and abs(value) >= _CENTS_SINGLE:
        raise errors.InvalidInput(
            "amount", f"is in single precision, which does not hold cents from {_CENTS_SINGLE} on"
        )
    number = _decimal(value)
    if number is None:
        return filled(value)
    if number < 0:
        raise errors.InvalidInput(
            "amount", "is negative: leave refunds out by a WHERE in --select, or turn the sign"
        )
    if type(value) in (int, float):
        return value
    cents = number * 100
    if cents != cents.to_integral_value():
        raise errors.InvalidInput("amount", "must have at most two decimal places")
    # The nearest double to a two-place decimal is the quotient of its cents.
    return int(cents) / 100


def moment(value: Any, field: str) -> Any:
    """Return a time as RFC 3339; anything else is returned unchanged.

    Raises:
        InvalidInput: It is a number or a local time, which only --select can interpret.
    """
    if isinstance(value, Ms):
        return _rfc_3339(value, field)
    if isinstance(value, str) and value[-1:] == "Z" and len(value) > _SHORTEST:
        return value
    if isinstance(value, str) and (found := _MOMENT.fullmatch(value)):
        day, minute, second, fraction, zulu, hour, more = found.groups()
        offset = "Z" if zulu else f"{hour}:{more or '00'}"
        return f"{day}T{minute}{second or ':00'}{fraction or ''}{offset}"
    if isinstance(value, str) and _LOCAL.fullmatch(value):
        raise errors.InvalidInput(
            field,
            f"has no offset: --select \"timezone('UTC', {field}::TIMESTAMP) AS {field}\", "
            "or another zone, says which time it is",
        )
    scientific = isinstance(value, str) and _SCIENTIFIC.fullmatch(value)
    number = Decimal(value.replace(",", ".")) if scientific else _decimal(value)
    if number is None:
        return filled(value)
    for unit, scale, how in _UNITS:
        if _LIKELY_S[0] <= number / scale < _LIKELY_S[1]:
            raise errors.InvalidInput(
                field,
                f"is a number, probably of {unit}, as {_day(number / scale)}: "
                f'--select "{how.format(field)} AS {field}"',
            )
    raise errors.InvalidInput(field, "is a number: convert it to a time in --select")


def _rfc_3339(ms: int, field: str) -> str:
    for factor in (10**3, 10**6, 10**9):
        if _LIKELY_S[0] <= ms / 1000 / factor < _LIKELY_S[1]:
            raise errors.InvalidInput(
                field,
                f"lies beyond 2200; it is {_day(ms / 1000 / factor)} if milliseconds were read as "
                "seconds, or another unit as a greater one",
            )
    try:
        return transactions.format_ms(ms)
    except (OverflowError, ValueError):
        return ""


def _day(second: Any) -> str:
    return transactions.format_ms(int(second * 1000))[:10]


def _decimal(value: Any) -> Decimal | None:
    """Return a number exactly; None if it is not a number, or implausibly large."""
    number = None
    if isinstance(value, str):
        number = Decimal(value) if _DECIMAL.fullmatch(value) else None
    elif type(value) is int or (isinstance(value, Decimal) and value.is_finite()):
        number = Decimal(value)
    elif isinstance(value, float) and math.isfinite(value):
        number = Decimal(float.__repr__(value))
    return number if number is not None and number.adjusted() < _DIGITS else None
