"""Read the rows of a CSV, JSON or Parquet file in pieces, from any row on.

One piece is in memory at a time, however long the file is. A row is identified by its line in a
file of lines (the first line is 1), by its number in a JSON array or a Parquet file.
"""

import csv
import glob
import hashlib
import pathlib
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from cerberus import documents, errors
from cerberus.files import texts
from cerberus.files.rows import KNOWN, START, Position, Row

CSV, LINES, ARRAY, PARQUET = "csv", "lines", "array", "parquet"
SUFFIXES = (
    dict.fromkeys((".csv", ".tsv", ".txt"), CSV)
    | dict.fromkeys((".jsonl", ".ndjson", ".json"), LINES)
    | dict.fromkeys((".parquet", ".pq"), PARQUET)
)
REJECTS = ".rejects.jsonl"
"""How the name of a file of rejected rows ends."""
_PIECE_BYTES, _HEAD_BYTES = 8 << 20, 1 << 20
_SHOWN = 5
_PARTITION = re.compile(r"([^=/]+)=([^=/]*)")


def kind_of(path: pathlib.Path) -> str:
    """Return the format by a file's name; empty if it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1], "") if suffixes else ""


def parts(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the data files that a path names: itself, all below a folder, or those of a glob.

    Raises:
        InvalidInput: There is none.
    """
    if path.is_dir():
        found = [each for each in path.rglob("*") if _is_part(each.relative_to(path))]
    elif path.exists() or not glob.has_magic(str(path)):
        found = [path]
    else:
        named = map(pathlib.Path, glob.glob(str(path), recursive=True))
        found = [each for each in named if _is_part(pathlib.Path(each.name))]
    found = sorted(each for each in found if each.is_file())
    if not found:
        raise errors.InvalidInput(str(path), "does not exist, or holds no data file")
    return found


def left_out(path: pathlib.Path) -> str:
    """Say which files below a folder `parts` leaves out for their suffix; empty if none."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else []
    others = sorted(
        str(below)
        for each in files
        if not kind_of(below := each.relative_to(path))
        and not any(part.startswith(("_", ".")) for part in below.parts)
    )
    shown = ", ".join(others[:_SHOWN]) + ", …" * (len(others) > _SHOWN)
    return f"{path} has {len(others)} files of other suffixes, left out: {shown}" if others else ""


def root_of(path: pathlib.Path) -> pathlib.Path | None:
    """Return the folder that `path` searches; None if it names one file."""
    if path.is_dir():
        return path
    if path.exists() or not glob.has_magic(str(path)):
        return None
    return next(each for each in path.parents if not glob.has_magic(str(each)))


def _is_part(path: pathlib.Path) -> bool:
    hidden = any(part.startswith(("_", ".")) for part in path.parts)
    return bool(kind_of(path)) and not hidden and not path.name.endswith(REJECTS)


def _partition_value(written: str) -> str | None:
    # As Hive and Spark write it.
    return None if written == "__HIVE_DEFAULT_PARTITION__" else urllib.parse.unquote(written)


class File:
    """One file, opened again for each reading.

    Args:
        path: The file; its suffix gives the format.
        fields: The fields that are wanted of each row.
        select: SQL that maps columns to fields; a field that it does not name has its own column.
        encoding: The encoding of a text that is not UTF-8.
        root: The folder that was asked for; `name=value` below it are columns.

    Attributes:
        path: The file.
        name: Its name, from the folder on that was asked for.
        size: Its size in bytes.
        columns: Names of all its columns; None in JSON, where each row has its own.
        fields: The fields that its rows can have.
        total: What `done` returns at the end of the file; None if that is not known.
        unit: The unit of `total`: "B" or "rows".

    Raises:
        InvalidInput: The suffix is unknown, the header is broken, the file is not Parquet, or the
            SQL does not fit it.
    """

    def __init__(
        self,
        path: pathlib.Path,
        fields: Sequence[str],
        select: str = "",
        encoding: str = "",
        root: pathlib.Path | None = None,
    ) -> None:
        self.path = path
        self.name = str(path.relative_to(root.parent)) if root else path.name
        self.size = path.stat().st_size
        self._kind = kind_of(path)
        below = path.relative_to(root).parts[:-1] if root else ()
        named = [m for part in below if (m := _PARTITION.fullmatch(part))]
        self._told = {urllib.parse.unquote(m[1]): _partition_value(m[2]) for m in named}
        if not self._kind:
            raise errors.InvalidInput(
                path.name,
                f"its name must end in one of {', '.join(SUFFIXES)}, perhaps followed by .gz",
            )
        self._mapping: Any = None
        if select or self._kind == PARQUET:
            from cerberus.files import mappings  # takes 0.3 s, which a plain text does not need

            self._mapping = mappings.Mapping(select, fields)
        wanted = self._mapping.wanted if self._mapping else list(fields)
        self.total, self.unit = self._open(wanted, encoding)
        known = None if self.columns is None else [*self.columns, *self._told]
        self._picked = self._pick(wanted, known)
        given = self._mapping.given if self._mapping else []
        own = {name.lower() for name in (*self._picked, *self._told)}
        self.fields = {f for f in fields if f in given or known is None or f in own}
        if self._mapping:
            kinds = dict.fromkeys((*self._picked, *self._told), "VARCHAR")
            found = self._source.columns if self._kind == PARQUET else {}
            self._mapping.bind(kinds | {name: found[name] for name in self._picked if found})

    def _open(self, wanted: Sequence[str], encoding: str) -> tuple[int | None, str]:
        self.columns: list[str] | None = None
        if self._kind == PARQUET:
            from cerberus.files import parquet

            self._source = parquet.Parquet(self.path)
            self.columns = list(self._source.columns)
            return self._source.rows, "rows"
        self._text = texts.Text(self.path, encoding)
        if self._kind == CSV:
            try:
                self._header = texts.header(self._text, wanted)
            except (ValueError, *texts.BROKEN) as error:
                raise errors.InvalidInput(self.path.name, f"its header {error}") from error
            self.columns = self._header.cells
        elif self._kind == LINES:
            try:
                with self._text.open() as file:
                    head = file.read(texts.LINE_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
            except texts.BROKEN:
                head = b""  # whatever it is: reading its rows says where it is damaged
            self._kind = ARRAY if head.startswith(b"[") else LINES
        return None if self._text.packed else self.size, "B"

    def _pick(self, wanted: Sequence[str], known: Sequence[str] | None) -> dict[str, int]:
        """Return the columns to read, with their places in a row."""
        if known is None:
            # Every object has its own columns; values that the reader knows take precedence.
            return dict.fromkeys((name for name in wanted if name not in KNOWN), 0)
        names = {name.lower() for name in wanted}
        found = [(name, i) for i, name in enumerate(known) if name.lower() in names]
        lower = [name.lower() for name, _ in found]
        for name, _ in found:
            if lower.count(name.lower()) > 1:
                raise errors.InvalidInput(
                    name.lower(), f"{self.path.name} has several columns {name!r}: keep one"
                )
        return {name: i for name, i in found if name not in self._told}

    def done(self, position: Position) -> int:
        """Return how much of `total` lies before a position."""
        return position.rows if self.unit == "rows" else position.bytes

    def fingerprint(self) -> str:
        """Return a hash of the whole content. Cost: a second per GB."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def first_fingerprint(self) -> str:
        """Return the hash by which earlier releases know the file: of its size and first MiB."""
        with self.path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        return hashlib.sha256(b"%d\0%s" % (self.size, head)).hexdigest()

    def pieces(self, size: int, start: Position = START) -> Iterator[tuple[list[Row], Position]]:
        """Yield up to `size` rows at a time, from `start` on, with the position after the last.

        A piece has fewer rows where they are long, or where the SQL leaves some out.

        Raises:
            InvalidInput: naming the last row that could be read.
        """
        at = start
        try:
            read = self._parquet_pieces if self._kind == PARQUET else self._text_pieces
            for rows, after in read(size, start):
                yield rows, after
                at = after
        except texts.BROKEN as error:
            raise errors.InvalidInput(
                self.path.name, f"cannot be read behind row {at.rows}: {error}"
            ) from error

    def _text_pieces(self, size: int, start: Position) -> Iterator[tuple[list[Row], Position]]:
        reader = {CSV: self._csv_rows, LINES: self._json_rows, ARRAY: self._elements}[self._kind]
        rows: list[Row] = []
        begin = at = start
        for row, at in reader(start):
            rows.append(row)
            if len(rows) == size or at.bytes - begin.bytes >= _PIECE_BYTES:
                yield self._mapped(rows, begin), at
                rows, begin = [], at
        if rows:
            yield self._mapped(rows, begin), at

    def _mapped(self, rows: list[Row], begin: Position) -> list[Row]:
        if not self._mapping:
            return rows
        from cerberus.files import mappings

        numbered = [(begin.rows + 1 + i, row) for i, row in enumerate(rows) if not row.broken]
        names = list(self._picked)
        columns = {name: [row.values.get(name) for _, row in numbered] for name in names}
        table = mappings.table([row.line for _, row in numbered], columns)
        numbers = [number for number, _ in numbered]
        table = mappings.complete(table, self._told, self.path.name, numbers)
        broken = [row for row in rows if row.broken]
        return sorted(broken + self._mapping.rows(table), key=lambda row: row.line)

    def _csv_rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        header, told = self._header, self._told
        if not start.bytes:
            start = header.end._replace(rows=start.rows)
        width = len(header.cells)
        # The SQL has its own spelling of a column; a field has one.
        picked = [(name if self._mapping else name.lower(), i) for name, i in self._picked.items()]
        with self._text.open(start.bytes) as file:
            lines = texts.Lines(file, start, self._text.encoding)
            reader = csv.reader(lines, delimiter=header.delimiter, strict=True)
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
                if not broken and len(cells) != width:
                    broken = f"has {len(cells)} cells, the header {width}"
                if broken and lines.at.lines > line:
                    # A surplus quote has swallowed the lines after it: only its own is rejected.
                    lines.put_back()
                    reader = csv.reader(lines, delimiter=header.delimiter, strict=True)
                values = {} if broken else {name: cells[i] or None for name, i in picked}
                rows += 1
                _, passed, size = lines.at
                yield (
                    Row(line, told | values if told else values, broken),
                    Position(rows, passed, size),
                )

    def _json_rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        with self._text.open(start.bytes) as file:
            lines = texts.Lines(file, start, self._text.encoding)
            rows, line = start.rows, lines.begin_row()
            for text in lines:
                if lines.broken or text.strip():
                    rows += 1
                    row = self._json_row(line, text, lines.broken)
                    yield row, lines.at._replace(rows=rows)
                line = lines.begin_row()

    def _elements(self, start: Position) -> Iterator[tuple[Row, Position]]:
        broken = f"is longer than {texts.LINE_BYTES} bytes, or the array does not end behind it"
        with self._text.open(start.bytes) as file:
            for raw, at in texts.Elements(file, start):
                yield self._json_row(at.rows, raw or b"", "" if raw is not None else broken), at

    def _json_row(self, line: int, text: str | bytes, broken: str) -> Row:
        if broken:
            return Row(line, {}, broken)
        try:
            found = documents.read(text)
        except orjson.JSONDecodeError as error:
            return Row(line, {}, f"is not JSON: {error}")
        except documents.Repeated as error:
            return Row(line, {}, f"{error}")
        if not isinstance(found, dict):
            return Row(line, {}, "must be a JSON object")
        return Row(line, self._told | found if self._told else found)

    def _parquet_pieces(self, size: int, start: Position) -> Iterator[tuple[list[Row], Position]]:
        from cerberus.files import mappings, parquet

        at = start.rows
        broken = f"has a cell of more than {parquet.CELL_BYTES} bytes"
        for table, long in self._source.batches(list(self._picked), at):
            whole = mappings.complete(table, self._told, self.path.name)
            for begin in range(0, whole.num_rows, size):
                some = whole.slice(begin, size)
                first, at = at + 1, at + some.num_rows
                rows = self._mapping.rows(some)
                if lines := [line for line in long if first <= line <= at]:
                    rows = [row for row in rows if row.line not in lines]
                    rows += [Row(line, {}, broken) for line in lines]
                    rows.sort(key=lambda row: row.line)
                yield rows, Position(at, at)
