"""A row of a data file, and a place in one."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Position(NamedTuple):
    """How much of a file lies before a place: rows, lines, and bytes of its text as UTF-8."""

    rows: int = 0
    lines: int = 0
    bytes: int = 0


START = Position()
KNOWN = ROW_NUMBER, FILE_NAME = "row_number", "file_name"
"""Values that a mapping can use beside the row's columns."""


class Row(NamedTuple):
    """One row: its values by column, or why it cannot be read.

    Attributes:
        line: Its line in a file of lines, else its number; the first is 1.
        values: Its values by column.
        broken: Why it cannot be read; empty if it can.
        field: Which field `broken` is about; "value": the whole row.
    """

    line: int
    values: Mapping[str, Any]
    broken: str = ""
    field: str = "value"


class Ms(int):
    """A time from a column of a time type, in ms since the Unix epoch."""


class Single(float):
    """A single-precision number, as the shortest decimal that rounds to it."""
