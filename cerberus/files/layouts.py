"""The layout of records in a data file, and the command-line options that describe it."""

import argparse
import datetime
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from cerberus import errors, transactions
from cerberus.files import datafiles

REQUIRED = ("transaction_id", "user_id", "amount", "timestamp")
OPTIONAL = ("currency", "merchant_id")
TIMESTAMP_FORMATS = ("rfc3339", "utc", "epoch_s", "epoch_ms")
AMOUNT_UNITS = ("major", "minor")
_DIGITS = 25  # fewer than Decimal computes with
_WHOLE = re.compile(r"([+-]?\d{1,20})(\.0+)?", re.ASCII)
_DECIMAL = re.compile(r"[+-]?\d{1,20}(\.\d{1,12})?", re.ASCII)
_OFFSET = re.compile(r"([Zz]|[+-]\d\d:\d\d)$", re.ASCII)
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of a file hold the fields of a record, and in which format.

    Attributes:
        columns: Columns by field; a field that is missing here has a column of its own name.
        constants: Texts by field, the same for all rows.
        timestamp_format: One of `TIMESTAMP_FORMATS`; "utc" is RFC 3339 that may lack the offset.
        amount_unit: "major", such as 12.50, or "minor": cents.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    timestamp_format: str = "rfc3339"
    amount_unit: str = "major"

    def column(self, name: str) -> str:
        """Return the column that holds a field."""
        return self.columns.get(name, name)

    def open(
        self, path: pathlib.Path, required: Sequence[str], optional: Sequence[str] = ()
    ) -> datafiles.File:
        """Open a file of records.

        Raises:
            InvalidInput: naming the required field that has neither column nor constant.
        """
        file = datafiles.File(path, [self.column(name) for name in (*required, *optional)])
        for name in (*required, *optional):
            column = self.column(name)
            if file.columns and file.columns.count(column) > 1 and name not in self.constants:
                raise errors.InvalidInput(
                    name, f"{path.name} has several columns {column!r}: keep one"
                )
        for name in required:
            column = self.column(name)
            if file.columns is None or name in self.constants or column in file.columns:
                continue
            raise errors.InvalidInput(
                name,
                f"{path.name} has no column {column!r}, only {', '.join(file.columns)}; give "
                f"--column {name}=COLUMN or --constant {name}=VALUE",
            )
        return file

    def pick(self, row: datafiles.Row, names: Iterable[str]) -> dict[str, Any]:
        """Return a row's fields by name, without empty cells.

        Raises:
            InvalidInput: The row cannot be read.
        """
        if row.broken:
            raise errors.InvalidInput("value", row.broken)
        return {
            name: self.constants[name] if name in self.constants else found
            for name in names
            if name in self.constants
            or (found := _cell(row.values.get(self.column(name)))) not in ("", None)
        }

    def moment(self, value: Any, name: str = "timestamp") -> Any:
        """Return a moment as RFC 3339; a value in another format may come back unchanged.

        Raises:
            InvalidInput: The format is a number since the Unix epoch, and the value is not one.
        """
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            value = datetime.datetime.combine(value, datetime.time())
        if isinstance(value, datetime.datetime):
            aware = value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
            return _rfc_3339((aware - _EPOCH) // datetime.timedelta(milliseconds=1))
        if self.timestamp_format.startswith("epoch"):
            if (number := _decimal(value)) is None:
                raise errors.InvalidInput(name, f"must be {self.timestamp_format}")
            scale = 1 if self.timestamp_format == "epoch_ms" else 1000
            return _rfc_3339(math.floor(number * scale))
        if self.timestamp_format == "utc" and isinstance(value, str) and not _OFFSET.search(value):
            return f"{value}Z"
        return value

    def transaction(self, row: datafiles.Row, currency: str) -> transactions.Transaction:
        """Read a row as a transaction, by the rules of the topic.

        Raises:
            InvalidInput: naming the field.
        """
        found = self.pick(row, (*REQUIRED, *OPTIONAL))
        document = {
            "transaction_id": text(found.get("transaction_id")),
            "user_id": whole(found.get("user_id")),
            "amount": self._amount(found.get("amount")),
            "currency": found.get("currency"),
            "merchant_id": text(found.get("merchant_id")),
            "timestamp": self.moment(found.get("timestamp")),
        }
        return transactions.Transaction(
            transaction_id=transactions.parse_text(document, "transaction_id"),
            user_id=transactions.parse_user_id(document),
            amount_minor=transactions.parse_amount(document),
            currency=transactions.parse_currency(document, currency),
            merchant_id=transactions.parse_text(document, "merchant_id", default=""),
            event_ms=transactions.parse_timestamp(document),
        )

    def _amount(self, value: Any) -> Any:
        if self.amount_unit == "major" and type(value) in (int, float):
            return value
        if (number := _decimal(value)) is None:
            return value
        cents = number if self.amount_unit == "minor" else number * 100
        if cents != cents.to_integral_value():
            finer = "must have at most two decimal places"
            whole_cents = "must be a whole number of cents"
            raise errors.InvalidInput(
                "amount", whole_cents if self.amount_unit == "minor" else finer
            )
        # The nearest double to a two-place decimal is the quotient of its cents.
        return int(cents) / 100


def text(value: Any) -> Any:
    """Return a name as text, even if it is stored as a whole number."""
    number = whole(value)
    return str(number) if type(number) is int and not isinstance(value, str) else value


def whole(value: Any) -> Any:
    """Return a whole number as int, even if it is stored as text or as a double."""
    if isinstance(value, str) and (found := _WHOLE.fullmatch(value)):
        return int(found[1])
    number = _decimal(value) if isinstance(value, (float, Decimal)) else None
    return value if number is None or number % 1 else int(number)


def _decimal(value: Any) -> Decimal | None:
    """Return a number exactly; None if it is not a number, or implausibly large."""
    number = None
    if isinstance(value, str):
        number = Decimal(value) if _DECIMAL.fullmatch(value) else None
    elif type(value) is int or (isinstance(value, Decimal) and value.is_finite()):
        number = Decimal(value)
    elif isinstance(value, float) and math.isfinite(value):
        number = Decimal(repr(value))
    return number if number is not None and number.adjusted() < _DIGITS else None


def _rfc_3339(ms: int) -> str:
    try:
        return transactions.format_ms(ms)
    except (OverflowError, ValueError):
        return ""


def _cell(value: Any) -> Any:
    """Return None for the NaN that Parquet and pandas write into empty cells."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `read_options` reads."""
    many: dict[str, Any] = {"action": "append", "default": [], "type": pair}
    parser.add_argument(
        "--column",
        metavar="FIELD=COLUMN",
        help="the column that holds a field, if its name differs",
        **many,
    )
    parser.add_argument(
        "--constant", metavar="FIELD=VALUE", help="a field's value in every row", **many
    )
    parser.add_argument(
        "--timestamp-format",
        choices=TIMESTAMP_FORMATS,
        default=TIMESTAMP_FORMATS[0],
        help="the format of times; utc: rfc3339 whose offset may be missing",
    )
    parser.add_argument(
        "--amount-unit",
        choices=AMOUNT_UNITS,
        default=AMOUNT_UNITS[0],
        help="major: such as 12.50; minor: cents",
    )


def pair(text: str) -> tuple[str, str]:
    """Read an option's `NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def read_options(
    chosen: argparse.Namespace, fields: Mapping[str, Iterable[str]]
) -> dict[str, Layout]:
    """Return the layout of each kind of file.

    Args:
        chosen: The parsed options of `add_options`; `labels.label` is a field of labels only.
        fields: The fields of each kind.

    Raises:
        InvalidInput: naming a field that no kind has.
    """
    found: dict[str, tuple[dict[str, str], dict[str, str]]] = {kind: ({}, {}) for kind in fields}
    for which, pairs in enumerate((chosen.column, chosen.constant)):
        for name, value in pairs:
            kind, _, bare = name.rpartition(".")
            kinds = [k for k in fields if bare in fields[k] and kind in ("", k)]
            if not kinds:
                known = sorted({n for names in fields.values() for n in names})
                raise errors.InvalidInput(
                    name, f"is not a field; the fields are {', '.join(known)}"
                )
            for k in kinds:
                found[k][which][bare] = value
    return {
        kind: Layout(columns, constants, chosen.timestamp_format, chosen.amount_unit)
        for kind, (columns, constants) in found.items()
    }
