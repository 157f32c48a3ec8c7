"""Read a Parquet file in batches with DuckDB, from any row on."""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import pyarrow

from cerberus import errors
from cerberus.files import engine

CELL_BYTES = 16_384
_BATCH_ROWS = 4_096
_LONG = "__long"
_GLOB = re.compile(r"([*?\[])")


class Parquet:
    """A Parquet file.

    Attributes:
        columns: Its columns and their SQL types.
        rows: How many rows it has.

    Raises:
        InvalidInput: It is not Parquet.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._database = engine.database()
        self._source = _GLOB.sub(r"[\1]", str(path))
        try:
            described = self._told("DESCRIBE FROM read_parquet($1, hive_partitioning = false)")
            self.columns: dict[str, str] = {name: kind for name, kind, *_ in described}
            [(self.rows,)] = self._told("SELECT num_rows FROM parquet_file_metadata($1)")
            # A fixed length of 16 bytes is a UUID, whether or not the file says so.
            fixed = self._told(
                "SELECT name FROM parquet_schema($1) WHERE type = 'FIXED_LEN_BYTE_ARRAY' "
                "AND type_length = '16' AND coalesce(logical_type, 'UUIDType()') = 'UUIDType()' "
                "AND converted_type IS NULL"
            )
            self._uuids = {name for (name,) in fixed}
        except duckdb.Error as error:
            raise errors.InvalidInput(
                path.name, f"is not a Parquet file that can be read: {engine.reason(error)}"
            ) from error

    def _told(self, query: str) -> list[tuple[Any, ...]]:
        return self._database.execute(query, [self._source]).fetchall()

    def batches(self, columns: Sequence[str], start: int) -> Iterator[tuple[Any, list[int]]]:
        """Yield Arrow tables for `Mapping.rows`, and the rows with too long a cell.

        Args:
            columns: The columns to read.
            start: How many rows to pass over.

        Raises:
            InvalidInput: naming the last row that could be read.
        """
        at = start
        sizes = [size for name in columns if (size := self._size(name))]
        cells = (
            f"CASE WHEN {size} <= {CELL_BYTES} THEN {quoted} END AS {quoted}"
            if (size := self._size(name)) and (quoted := engine.quoted(name))
            else self._cell(name)
            for name in columns
        )
        query = (
            f"SELECT {', '.join((f'file_row_number + 1 AS {engine.LINE}', *cells))}, "
            f"coalesce(greatest({', '.join(sizes) or '0'}), 0) > {CELL_BYTES} AS {_LONG} "
            "FROM read_parquet($1, file_row_number = true, hive_partitioning = false) "
            "WHERE file_row_number >= $2"
        )
        try:
            read = engine.session(self._database.cursor()).sql(query, params=[self._source, start])
            for batch in read.to_arrow_reader(_BATCH_ROWS):
                table = pyarrow.Table.from_batches([batch])
                long = table.filter(table[_LONG])[engine.LINE].to_pylist() if sizes else []
                yield table, long
                at += table.num_rows
        except (duckdb.Error, pyarrow.ArrowException, OSError) as error:
            said = f"cannot be read behind row {at}: {engine.reason(error)}"
            if "allocate" in said:
                said += f'; "NULL AS FIELD" leaves a column out that needs {engine.MEMORY} at once'
            raise errors.InvalidInput(self._path.name, said) from error

    def _size(self, column: str) -> str:
        """Return SQL for a cell's size in bytes; empty for types of a small fixed size."""
        name, kind = engine.quoted(column), self.columns[column]
        if column in self._uuids:
            return ""
        if kind == "VARCHAR":
            return f"strlen({name})"
        if kind == "BLOB":
            return f"octet_length({name})"
        nested = kind.startswith(("STRUCT", "MAP", "UNION")) or kind.endswith("]")
        return f"strlen({name}::VARCHAR)" if nested else ""

    def _cell(self, column: str) -> str:
        name = engine.quoted(column)
        return f"{name}::UUID::VARCHAR AS {name}" if column in self._uuids else name
