"""Read the text of a file, unpacked and as UTF-8, by lines or elements, from any place on.

A reader holds one line, however large the file is or becomes when it is unpacked.
"""

import codecs
import csv
import gzip
import io
import pathlib
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

from cerberus import errors
from cerberus.files.rows import START, Position

LINE_BYTES, ROW_LINES = 1 << 20, 100
BROKEN = (EOFError, OSError, zlib.error)
"""What reading raises where a file is damaged."""
_CHUNK_BYTES, _HEADER_LINES = 1 << 16, 30
_DELIMITERS = (",", ";", "\t", "|")
_GZIP = b"\x1f\x8b"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # first, because UTF-16's mark is a prefix of it
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # Excel's own first line
_OUTSIDE = re.compile(rb'["{}\[\],]')


class Text:
    """The text of a file, whatever its encoding; gzip is recognised by its first bytes.

    Args:
        path: The file.
        encoding: Its encoding; a byte order mark says otherwise. Empty: UTF-8.

    Attributes:
        encoding: The encoding in which it is read.
        packed: Whether the file is compressed.

    Raises:
        InvalidInput: There is no such encoding.
    """

    def __init__(self, path: pathlib.Path, encoding: str = "") -> None:
        self._path = path
        with path.open("rb") as file:
            self.packed = file.read(2) == _GZIP
        try:
            with self._unpacked() as file:
                head = file.read(4)
        except BROKEN as error:
            raise errors.InvalidInput(path.name, f"cannot be read: {error}") from error
        marked = (name for mark, name in _MARKS if head.startswith(mark))
        try:
            b"a".decode(encoding or "utf-8", "replace")  # it refuses what is no encoding of texts
            self.encoding = codecs.lookup(next(marked, encoding or "utf-8")).name
        except (LookupError, ValueError) as error:
            raise errors.InvalidInput("--encoding", str(error)) from error

    def open(self, skip_bytes: int = 0) -> Any:
        """Open it as UTF-8 after so many bytes; undecodable input yields invalid UTF-8."""
        file = self._unpacked()
        if self.encoding != "utf-8":
            file = io.BufferedReader(_Recoded(file, self.encoding), _CHUNK_BYTES)
        elif not self.packed:
            file.seek(skip_bytes)
            return file
        while skip_bytes and (passed := len(file.read(min(skip_bytes, LINE_BYTES)))):
            skip_bytes -= passed
        return file

    def _unpacked(self) -> Any:
        return gzip.open(self._path) if self.packed else self._path.open("rb")


class _Recoded(io.RawIOBase):
    def __init__(self, file: Any, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        more = True
        while more and not self._left:
            read = self._file.read(_CHUNK_BYTES)
            more = bool(read)
            # The marker of undecodable input becomes a byte that UTF-8 never contains.
            said = self._decoder.decode(read, final=not more).encode("utf-8", "replace")
            self._left = said.replace(b"\xef\xbf\xbd", b"\xff")
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class Lines:
    """Yields the lines of an open text and keeps its position; `broken` says why one is invalid.

    Args:
        file: The text, opened at `at`.
        at: Where it begins.
        encoding: Its encoding, to name it.
    """

    def __init__(self, file: Any, at: Position, encoding: str = "utf-8") -> None:
        self._file = file
        self._encoding = encoding
        self.at = at
        self.broken = ""
        self._ahead: list[tuple[bytes, int]] = []
        self._row: list[tuple[bytes, int]] = []
        self._row_bytes = 0

    def begin_row(self) -> int:
        """Return the line where the next row begins."""
        self.broken, self._row, self._row_bytes = "", [], 0
        return self.at.lines + 1

    def put_back(self) -> None:
        """Take the row's first line only; the others are read again."""
        for _, size in self._row[1:]:
            self.at = self.at._replace(lines=self.at.lines - 1, bytes=self.at.bytes - size)
        self._ahead += self._row[:0:-1]

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        if len(self._row) == ROW_LINES or self._row_bytes > LINE_BYTES:
            raise csv.Error(f"a row has more than {ROW_LINES} lines, or {LINE_BYTES} bytes")
        raw, size = self._ahead.pop() if self._ahead else self._read()
        if not raw:
            raise StopIteration
        if not self.at.bytes:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        self._row.append((raw, size))
        self._row_bytes += size
        rows, lines, passed = self.at
        self.at = Position(rows, lines + 1, passed + size)
        if size >= LINE_BYTES and raw == b"\n":
            self.broken = f"is longer than {LINE_BYTES} bytes"
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            self.broken = f"is not {self._encoding.upper()}: --encoding says which encoding it has"
            return str(raw, "utf-8", "replace")

    def _read(self) -> tuple[bytes, int]:
        """Return a line and its size; one that is too long is returned as an empty one."""
        raw = self._file.readline(LINE_BYTES)
        size = len(raw)
        if size < LINE_BYTES or raw.endswith(b"\n"):
            return raw, size
        while (more := self._file.readline(LINE_BYTES)) and not more.endswith(b"\n"):
            size += len(more)
        return b"\n", size + len(more)


class Header(NamedTuple):
    """The header of a CSV file: its cells, their delimiter, and where the rows begin."""

    cells: list[str]
    delimiter: str
    end: Position


def header(text: Text, wanted: Sequence[str]) -> Header:
    """Find a CSV file's header: the one of the first lines that names most wanted columns.

    Args:
        text: The file's text.
        wanted: Names of columns, in any case.

    Raises:
        ValueError: saying what is wrong with it.
    """
    names = {name.lower() for name in wanted}
    best, found, broken = None, -1, ""
    delimiters: Sequence[str] = _DELIMITERS
    with text.open() as file:
        lines = Lines(file, START, text.encoding)
        for _ in range(_HEADER_LINES):
            lines.begin_row()
            if not (line := next(lines, "")):
                break
            if "\0" in line:
                lines.broken = "contains NUL characters: --encoding says which encoding it has"
            if lines.broken or not line.strip():
                broken, lines.broken = broken or lines.broken, ""
                continue
            if told := _SEPARATOR.fullmatch(line):
                delimiters = (told[1],)
                continue
            for delimiter in sorted(delimiters, key=line.count, reverse=True):
                try:
                    cells = next(csv.reader([line], delimiter=delimiter), [])
                except csv.Error as error:
                    broken = broken or f"is not CSV: {error}"
                    continue
                matched = len(names.intersection(cell.strip().lower() for cell in cells))
                if matched > found and not (broken and not matched):
                    best, found = Header([c.strip() for c in cells], delimiter, lines.at), matched
    if best is None:
        raise ValueError(broken or "is empty")
    return best


class Elements:
    """Yields the elements of an open JSON array as bytes, with the position after each.

    The array is split at commas without parsing, so an invalid element affects only itself. An
    element of more than `LINE_BYTES` is yielded as None, and so is a missing end of the array.

    Args:
        file: The text, opened behind `at`.
        at: Where to continue.
    """

    def __init__(self, file: Any, at: Position) -> None:
        self._file = file
        self._rows, self._passed = at.rows, at.bytes
        self._depth, self._inside, self._skip = int(at.bytes > 0), False, 0
        self._kept: list[bytes] = []
        self._size = 0
        self._ended = False

    def __iter__(self) -> Iterator[tuple[bytes | None, Position]]:
        while chunk := self._file.read(_CHUNK_BYTES):
            if (yield from self._split(chunk)):
                break
            self._passed += len(chunk)
        if not self._ended:
            yield None, Position(self._rows + 1, self._rows + 1, self._passed)

    def _split(self, chunk: bytes) -> Generator[tuple[bytes | None, Position], None, bool]:
        begin, i = 0, self._skip
        while True:
            if self._inside:
                i, self._inside = _within(chunk, i)
                if self._inside:
                    break
            if not (found := _OUTSIDE.search(chunk, i)):
                break
            i, mark = found.end(), found[0]
            if mark == b'"':
                self._inside = True
            elif mark in b"{[":
                self._depth += 1
                begin = i if self._depth == 1 else begin
            elif self._depth > 1:
                self._depth -= mark != b","
            elif self._depth and mark != b"}":  # a comma between elements, or the end
                self._keep(chunk[begin : i - 1])
                begin = i
                whole = b"".join(self._kept)
                if mark == b"," or whole.strip() or self._size > LINE_BYTES:
                    self._rows += 1
                    at = Position(self._rows, self._rows, self._passed + i)
                    yield whole if self._size <= LINE_BYTES else None, at
                self._kept, self._size = [], 0
                if mark == b"]":
                    self._ended = not (chunk[i:] + self._file.read(_CHUNK_BYTES)).strip()
                    return True
        self._skip = max(0, i - len(chunk))
        if self._depth:
            self._keep(chunk[begin:])
        return False

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        self._kept = [*self._kept, part] if self._size <= LINE_BYTES else []


def _within(chunk: bytes, i: int) -> tuple[int, bool]:
    """Return where the JSON string around `i` ends, and whether it continues after the chunk."""
    quote = chunk.find(b'"', i)
    while True:
        escape = chunk.find(b"\\", i, quote if quote >= 0 else len(chunk))
        if escape < 0:
            return (quote + 1, False) if quote >= 0 else (max(i, len(chunk)), True)
        i = escape + 2
        if 0 <= quote < i:
            quote = chunk.find(b'"', i)
