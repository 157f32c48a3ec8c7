"""Rows of a data file: CSV, JSON lines or Parquet, piece by piece, from any row on.

It does no I/O but reading the file, and holds one piece in memory, however long the file is. A row
is identified by its line: in a CSV file the header is line 1, in a Parquet file the first row is.
"""

import csv
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from cerberus import documents, errors

_SUFFIXES = {".csv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json"} | dict.fromkeys(
    (".parquet", ".pq"), "parquet"
)
_DELIMITERS = (",", ";", "\t", "|")
_HEAD_BYTES, _LINE_BYTES, _ROW_LINES = 1 << 20, 1 << 20, 100


class Position(NamedTuple):
    """How much of a file lies before a place: rows, lines, and bytes of a text file."""

    rows: int = 0
    lines: int = 0
    bytes: int = 0


START = Position()


class Row(NamedTuple):
    """One row: its values by column, or why it cannot be read."""

    line: int
    values: Mapping[str, Any]
    broken: str = ""


class File:
    """One file, opened again for each reading.

    Args:
        path: The file; its suffix gives the format.
        wanted: Names of the needed columns; others are not read from a Parquet file.

    Attributes:
        path: The file.
        size: Its size in bytes.
        columns: Names of all its columns; None in JSON lines, where each row has its own.
        total: What `done` returns at the end of the file.
        unit: The unit of `total`: "B" or "rows".

    Raises:
        InvalidInput: The suffix is unknown, the header is broken, or the file is not Parquet.
    """

    def __init__(self, path: pathlib.Path, wanted: Sequence[str]) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._kind = _SUFFIXES.get(path.suffix.lower(), "")
        self._wanted = set(wanted)
        self.total, self.unit = self.size, "B"
        self.columns: list[str] | None = None
        if self._kind == "csv":
            self.columns = self._header()
        elif self._kind == "parquet":
            found = _parquet(path)
            self.total, self.unit = found.metadata.num_rows, "rows"
            self.columns = list(found.schema_arrow.names)
        elif not self._kind:
            raise errors.InvalidInput(
                path.name, f"its name must end in one of {', '.join(_SUFFIXES)}"
            )

    def done(self, position: Position) -> int:
        """Return how much of `total` lies before a position."""
        return position.rows if self.unit == "rows" else position.bytes

    def fingerprint(self) -> str:
        """Return a hash of the size and the first MiB, which identifies the file."""
        with self.path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        return hashlib.sha256(b"%d\0%s" % (self.size, head)).hexdigest()

    def pieces(self, size: int, start: Position = START) -> Iterator[tuple[list[Row], Position]]:
        """Yield up to `size` rows at a time, from `start` on, with the position after the last.

        Raises:
            InvalidInput: The file is not Parquet.
        """
        if self._kind == "parquet":
            yield from self._parquet_pieces(size, start)
            return
        rows: list[Row] = []
        at = start
        for row, at in self._csv_rows(start) if self._kind == "csv" else self._json_rows(start):
            rows.append(row)
            if len(rows) == size:
                yield rows, at
                rows = []
        if rows:
            yield rows, at

    def _header(self) -> list[str]:
        with self.path.open("rb") as file:
            lines = _Lines(file, START)
            header = next(lines, "")
        try:
            if header.strip() and not lines.broken:
                return _split(header)[1]
            broken = lines.broken or "is empty"
        except csv.Error as error:
            broken = f"is not CSV: {error}"
        raise errors.InvalidInput(self.path.name, f"its header {broken}")

    def _csv_rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        with self.path.open("rb") as file:
            lines = _Lines(file, START)
            delimiter, header = _split(next(lines, ""))
            if start.bytes:
                file.seek(start.bytes)
                lines = _Lines(file, start)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            rows = start.rows
            while True:
                line = lines.begin_row()
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    cells, lines.broken = [""], f"is not CSV: {error}"
                if not cells and not lines.broken:
                    continue  # an empty line
                broken = lines.broken
                if not broken and len(cells) != len(header):
                    broken = f"has {len(cells)} cells, the header {len(header)}"
                if not broken and lines.at.lines - line >= _ROW_LINES:
                    broken = f"has a cell of more than {_ROW_LINES} lines"
                if broken and lines.at != lines.second:
                    # A surplus quote has swallowed the lines after it: only its own is rejected.
                    file.seek(lines.second.bytes)
                    lines = _Lines(file, lines.second)
                    reader = csv.reader(lines, delimiter=delimiter, strict=True)
                values = {} if broken else dict(zip(header, cells, strict=True))
                rows += 1
                yield Row(line, values, broken), lines.at._replace(rows=rows)

    def _json_rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        with self.path.open("rb") as file:
            file.seek(start.bytes)
            lines = _Lines(file, start)
            rows = start.rows
            for line in lines:
                broken, lines.broken = lines.broken, ""
                if not broken and not line.strip():
                    continue
                rows += 1
                values: Any = {}
                try:
                    values = {} if broken else documents.read(line)
                except orjson.JSONDecodeError as error:
                    broken = f"is not JSON: {error}"
                except documents.Repeated as error:
                    broken = f"{error}"
                if not isinstance(values, dict):
                    broken = "must be a JSON object"
                yield Row(lines.at.lines, values, broken), lines.at._replace(rows=rows)

    def _parquet_pieces(self, size: int, start: Position) -> Iterator[tuple[list[Row], Position]]:
        file = _parquet(self.path)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        first, skipped = 0, 0
        while first < len(groups) and skipped + groups[first] <= start.rows:
            skipped += groups[first]
            first += 1
        columns = [name for name in file.schema_arrow.names if name in self._wanted]
        rest = range(first, len(groups))
        for batch in file.iter_batches(size, row_groups=list(rest), columns=columns):
            passed = max(0, start.rows - skipped)
            begin = skipped + min(passed, batch.num_rows)
            skipped += batch.num_rows
            if begin < skipped:
                yield _parquet_rows(batch.slice(passed), begin + 1), Position(skipped, skipped)


class _Lines:
    """Yields the lines of a UTF-8 text and keeps its position; `broken` says why one is invalid."""

    def __init__(self, file: Any, at: Position) -> None:
        self._file = file
        self.at = self.second = at
        self.broken = ""
        self._first = True

    def begin_row(self) -> int:
        """Return the line where the next row begins; `second` becomes the position after it."""
        self.broken, self._first = "", True
        return self.at.lines + 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        raw = self._file.readline(_LINE_BYTES)
        if not raw:
            raise StopIteration
        size = len(raw)
        if size == _LINE_BYTES and not raw.endswith(b"\n"):
            self.broken = f"is longer than {_LINE_BYTES} bytes"
            while (more := self._file.readline(_LINE_BYTES)) and not more.endswith(b"\n"):
                size += len(more)
            size, raw = size + len(more), b"\n"
        if not self.at.bytes:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        self.at = self.at._replace(lines=self.at.lines + 1, bytes=self.at.bytes + size)
        if self._first:
            self.second, self._first = self.at, False
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            self.broken = "is not UTF-8"
            return str(raw, "utf-8", "replace")


def _split(header: str) -> tuple[str, list[str]]:
    """Return a CSV file's delimiter, guessed from its header, and the header's cells."""
    delimiter = max(_DELIMITERS, key=header.count)
    return delimiter, next(csv.reader([header], delimiter=delimiter), [])


def _parquet_rows(batch: Any, line: int) -> list[Row]:
    """Return rows from `line` on; one that Python cannot hold (the year 10000) is broken."""
    try:
        return [Row(line + i, values) for i, values in enumerate(batch.to_pylist())]
    except (ArithmeticError, LookupError, ValueError) as error:
        if batch.num_rows == 1:
            return [Row(line, {}, f"cannot be read: {error}")]
    half = batch.num_rows // 2
    return _parquet_rows(batch.slice(0, half), line) + _parquet_rows(batch.slice(half), line + half)


def _parquet(path: pathlib.Path) -> Any:
    import pyarrow.parquet  # takes a second, which no CSV file needs

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise errors.InvalidInput(path.name, f"is not a Parquet file: {error}") from error
