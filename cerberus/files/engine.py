"""DuckDB, which reads Parquet files and runs the SQL that maps a file's columns to fields.

Both run in memory of their own, at most `MEMORY` each. What a caller writes as SQL runs where there
is no file, no network and no setting to change, on one batch of rows at a time: so each row is
mapped by itself, and an import that is continued maps the rest of a file like the whole.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Mapping_
from typing import Any

import duckdb
import orjson
import pyarrow

from cerberus import errors
from cerberus.files.rows import FILE_NAME, ROW_NUMBER, THROUGH_A_DOUBLE, Ms, Row, Single

MEMORY = "512MB"
CELL_BYTES = 16_384
_BATCH_ROWS = 4_096
_LINE, _LONG = "__line", "__long"
_TIMES = ("DATE", "TIMESTAMP")
_MARK = "__inexact_"
_INEXACT = {
    "DOUBLE": "abs({}) >= 9007199254740992",
    "FLOAT": "abs({}) >= 16777216",
    "VARCHAR": r"regexp_full_match({}, '[+-]?\d+(\.\d+)?[eE][+-]?\d+')",
}
IDS = ("transaction_id", "user_id", "merchant_id")
"""Fields whose digits must be those that were written."""
_TEXT = "VARCHAR"
_QUOTED = re.compile(r"'.*'|\".*\"")
_GLOB = re.compile(r"([*?\[])")


def _database() -> duckdb.DuckDBPyConnection:
    config: dict[str, Any] = {
        "threads": 1,
        "memory_limit": MEMORY,
        "temp_directory": "",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
    }
    return _session(duckdb.connect(":memory:", config=config))


def _session(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    connection.execute("SET TimeZone = 'UTC'")
    # What is read ahead is lost where a file turns out to be damaged.
    connection.execute("SET streaming_buffer_size = '1KB'")
    return connection


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def reason(error: Exception) -> str:
    """Return what DuckDB says in one line."""
    first = str(error).splitlines()[0]
    said = first.partition("Error: ")[2] or first
    # It may repeat what stands in the file, which must not control a terminal.
    return said if said.isprintable() else ascii(said)[1:-1]


def _without_values(error: Exception) -> str:
    """Say why SQL fails on a row, without what stands in it."""
    return _QUOTED.sub("…", reason(error))


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
        self._database = _database()
        self._source = _GLOB.sub(r"[\1]", str(path))
        try:
            described = self._told("DESCRIBE FROM read_parquet($1, hive_partitioning = false)")
            self.columns: dict[str, str] = {name: kind for name, kind, *_ in described}
            [(self.rows,)] = self._told("SELECT num_rows FROM parquet_file_metadata($1)")
            # 16 bytes of a fixed length are a UUID, whether or not the file says so.
            fixed = self._told(
                "SELECT name FROM parquet_schema($1) WHERE type = 'FIXED_LEN_BYTE_ARRAY' "
                "AND type_length = '16' AND coalesce(logical_type, 'UUIDType()') = 'UUIDType()' "
                "AND converted_type IS NULL"
            )
            self._uuids = {name for (name,) in fixed}
        except duckdb.Error as error:
            raise errors.InvalidInput(
                path.name, f"is not a Parquet file that can be read: {reason(error)}"
            ) from error

    def _told(self, query: str) -> list[tuple[Any, ...]]:
        return self._database.execute(query, [self._source]).fetchall()

    def batches(self, columns: Sequence[str], start: int) -> Iterator[tuple[Any, list[int]]]:
        """Yield Arrow tables for `Mapping.rows`, and which of their rows have too long a cell.

        Args:
            columns: The columns to read.
            start: How many rows to pass over.

        Raises:
            InvalidInput: naming the row behind which the file cannot be read.
        """
        at = start
        sizes = [size for name in columns if (size := self._size(name))]
        cells = (
            f"CASE WHEN {size} <= {CELL_BYTES} THEN {_name(name)} END AS {_name(name)}"
            if (size := self._size(name))
            else self._cell(name)
            for name in columns
        )
        query = (
            f"SELECT {', '.join((f'file_row_number + 1 AS {_LINE}', *cells))}, "
            f"coalesce(greatest({', '.join(sizes) or '0'}), 0) > {CELL_BYTES} AS {_LONG} "
            "FROM read_parquet($1, file_row_number = true, hive_partitioning = false) "
            "WHERE file_row_number >= $2"
        )
        try:
            read = _session(self._database.cursor()).sql(query, params=[self._source, start])
            for batch in read.to_arrow_reader(_BATCH_ROWS):
                table = pyarrow.Table.from_batches([batch])
                long = table.filter(table[_LONG])[_LINE].to_pylist() if sizes else []
                yield table, long
                at += table.num_rows
        except (duckdb.Error, pyarrow.ArrowException, OSError) as error:
            said = f"cannot be read behind row {at}: {reason(error)}"
            if "allocate" in said:
                said += (
                    f'; --select "NULL AS FIELD" leaves a column out that needs {MEMORY} at once'
                )
            raise errors.InvalidInput(self._path.name, said) from error

    def _size(self, column: str) -> str:
        """Return the SQL of a cell's bytes; empty where all cells have the same few."""
        name, kind = _name(column), self.columns[column]
        if column in self._uuids:
            return ""
        if kind == _TEXT:
            return f"strlen({name})"
        if kind == "BLOB":
            return f"octet_length({name})"
        nested = kind.startswith(("STRUCT", "MAP", "UNION")) or kind.endswith("]")
        return f"strlen({name}::VARCHAR)" if nested else ""

    def _cell(self, column: str) -> str:
        name = _name(column)
        return f"{name}::UUID::VARCHAR AS {name}" if column in self._uuids else name


class Mapping:
    """SQL that makes fields of columns: a list of expressions, each named, perhaps with a WHERE.

    Args:
        select: The SQL behind `FROM data SELECT`; may be empty.
        fields: The fields; one that the SQL does not name has a column of its own name.

    Attributes:
        given: The fields that the SQL names.
        wanted: The columns that it reads, and those that fields may have of their own.

    Raises:
        InvalidInput: The SQL is not such a list.
    """

    def __init__(self, select: str, fields: Sequence[str]) -> None:
        self._select = select.strip()
        self._database = _database()
        # Nothing but the caller's own SQL runs here, and only on tables of this process.
        self._database.execute("SET enable_external_access = false")
        self._database.execute("SET lock_configuration = true")
        self._fields = fields
        self._tree = self._parsed() if self._select else {}
        items = self._node["select_list"] if self._tree else []
        self._items = {self._named(item): item for item in items}
        if len(self._items) < len(items):
            raise errors.InvalidInput("--select", "names a field twice")
        self.given = list(self._items)
        read = [*_columns(self._node)] if self._tree else []
        self.wanted = [*dict.fromkeys(read), *(f for f in fields if f not in self.given)]
        self._query = ""
        self._outputs: list[tuple[str, str]] = []
        self._guards: list[str] = []

    @property
    def _node(self) -> dict[str, Any]:
        node: dict[str, Any] = self._tree["statements"][0]["node"]
        return node

    def _parsed(self) -> dict[str, Any]:
        query = "SELECT json_serialize_sql($1)"
        [said] = self._database.execute(query, [f"FROM data SELECT {self._select}\n"]).fetchall()
        tree: dict[str, Any] = json.loads(said[0])
        if tree["error"]:
            raise errors.InvalidInput(
                "--select",
                f"is not SQL: {tree['error_message']}; a column whose name is a word of SQL stands "
                'in double quotes, such as "at"',
            )
        node = tree["statements"][0]["node"]
        extra = ("modifiers", "group_expressions", "having", "qualify", "sample")
        plain = node["type"] == "SELECT_NODE" and not any(node[name] for name in extra)
        if not plain or node["aggregate_handling"] != "STANDARD_HANDLING":
            raise errors.InvalidInput(
                "--select", "must be expressions with names, such as amt AS amount, and a WHERE"
            )
        volatile = self._database.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'"
        )
        known = {name for (name,) in volatile.fetchall()}
        for each in _walk(node):
            if each.get("class") == "WINDOW" or each.get("function_name") in known:
                raise errors.InvalidInput(
                    "--select",
                    "maps each row by itself: use row_number and file_name for ids, and no "
                    "window or random function",
                )
        return tree

    def _named(self, item: Mapping_[str, Any]) -> str:
        name = item["alias"] or (item.get("column_names") or [""])[-1]
        for field in self._fields:
            if name.lower() == field:
                return field
        raise errors.InvalidInput(
            "--select",
            f"{name or 'an expression'} is not a field; name each by AS, and the fields are "
            f"{', '.join(self._fields)}",
        )

    def bind(self, columns: Mapping_[str, str]) -> None:
        """Prepare it for a file.

        Args:
            columns: The columns that are read, with their SQL types.

        Raises:
            InvalidInput: The SQL does not fit them.
        """
        own = [n for n in columns if n.lower() in self._fields and n.lower() not in self.given]
        kinds = {_LINE: "BIGINT", ROW_NUMBER: "BIGINT", FILE_NAME: _TEXT} | dict(columns)
        self._guards = self._guarded(columns)
        names = [_LINE, *(f"{_name(name)} AS {name.lower()}" for name in own), *self._guards]
        inner = f"FROM data SELECT {', '.join(names)}" + (
            f", {self._select}\n" * bool(self._select)
        )
        empty = ", ".join(f"NULL::{kind} AS {_name(name)}" for name, kind in kinds.items())
        try:
            described = self._database.execute(
                f"DESCRIBE WITH data AS (SELECT {empty} WHERE false) {inner}"
            ).fetchall()
        except duckdb.Error as error:
            raise errors.InvalidInput("--select", reason(error)) from error
        self._outputs = [(n.lower(), k) for n, k, *_ in described if n.lower() in self._fields]
        made = [_output(name, kind) for name, kind in self._outputs]
        marks = [guard.rpartition(" AS ")[2] for guard in self._guards]
        self._query = f"SELECT {', '.join((_LINE, *marks, *made))} FROM ({inner})"

    def _guarded(self, columns: Mapping_[str, str]) -> list[str]:
        """Return SQL that says of each id that is computed whether its columns are exact."""
        kinds = {name.lower(): kind for name, kind in columns.items()}
        found = []
        for field in IDS:
            read = _columns(self._items[field]) if field in self._items else ()
            tests = [
                _INEXACT[kinds[name.lower()]].format(_name(name))
                for name in dict.fromkeys(read)
                if kinds.get(name.lower()) in _INEXACT
            ]
            if tests:
                found.append(f"coalesce({' OR '.join(tests)}, false) AS {_MARK}{field}")
        return found

    def rows(self, table: Any) -> list[Row]:
        """Map a table; a row that the SQL cannot map comes as a broken one.

        Args:
            table: An Arrow table with the columns of `bind`, `__line` and what `add_known` adds.
        """
        if not table.num_rows:
            return []
        self._database.register("data", table)
        try:
            return self._made(self._database.execute(self._query).fetchall())
        except duckdb.Error as error:
            if table.num_rows == 1:
                return [self._broken(table[_LINE][0].as_py(), error)]
        half = table.num_rows // 2
        return self.rows(table.slice(0, half)) + self.rows(table.slice(half))

    def _made(self, found: list[tuple[Any, ...]]) -> list[Row]:
        first = 1 + len(self._guards)
        names = [name for name, _ in self._outputs]
        typed = [
            (i, Ms if kind.startswith(_TIMES) else Single)
            for i, (_, kind) in enumerate(self._outputs)
            if kind.startswith(_TIMES) or kind == "FLOAT"
        ]
        rows = []
        for line, *cells in found:
            values = dict(zip(names, cells[first - 1 :], strict=True))
            for i, kind in typed:
                value = values[names[i]]
                values[names[i]] = None if value is None else kind(value)
            rows.append(Row(line, values))
            if first > 1 and any(cells[: first - 1]):
                mark = self._guards[cells.index(True)].rpartition(_MARK)[2]
                rows[-1] = Row(line, {}, THROUGH_A_DOUBLE, mark)
        return rows

    def _broken(self, line: int, error: duckdb.Error) -> Row:
        """Name the field whose expression fails on the only row of `data`."""
        for field, item in self._items.items():
            node = self._node | {"select_list": [item]}
            statement = self._tree["statements"][0] | {"node": node}
            one = json.dumps(self._tree | {"statements": [statement]})
            try:
                [said] = self._database.execute("SELECT json_deserialize_sql($1)", [one]).fetchall()
                self._database.execute(said[0]).fetchall()
            except duckdb.Error as found:
                return Row(line, {}, _without_values(found), field)
        return Row(line, {}, _without_values(error))


def table(lines: Sequence[int], columns: Mapping_[str, Sequence[Any]]) -> Any:
    """Return a table of texts for `Mapping.rows`; values of JSON become the text that they are."""
    made = {name: pyarrow.array(map(_text, cells), "string") for name, cells in columns.items()}
    return pyarrow.table({_LINE: pyarrow.array(lines, "int64"), **made})


def complete(rows: Any, told: Mapping_[str, str], name: str, numbers: Any = None) -> Any:
    """Add to a table what its folder's and file's names say, and each row's number."""
    numbers = rows[_LINE] if numbers is None else pyarrow.array(numbers, "int64")
    known = {key: pyarrow.repeat(value, rows.num_rows) for key, value in told.items()}
    known = {ROW_NUMBER: numbers, FILE_NAME: pyarrow.repeat(name, rows.num_rows)} | known
    for column, values in known.items():
        if column not in rows.column_names:
            rows = rows.append_column(column, values)
    return rows


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(orjson.dumps(value), "utf-8") if type(value) is not float else repr(value)


def _output(name: str, kind: str) -> str:
    if kind.startswith(_TIMES):
        # epoch_ms() rounds, and so does a cast; what is finer than a millisecond is cut off.
        if kind == "TIMESTAMP_NS":
            return f"epoch_ns({name}) // 1000000"
        moment = name if kind == "TIMESTAMP WITH TIME ZONE" else f"{name}::TIMESTAMP"
        return f"epoch_us({moment}) // 1000"
    return f"{name}::VARCHAR" if kind in ("FLOAT", "UUID") else name


def _walk(tree: Any) -> Iterator[Mapping_[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for each in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _walk(each)


def _columns(tree: Any) -> Iterator[str]:
    """Yield the columns that parsed SQL refers to."""
    for each in _walk(tree):
        if each.get("class") == "COLUMN_REF":
            names = each["column_names"]
            yield names[1] if names[0].lower() == "data" and len(names) > 1 else names[0]
