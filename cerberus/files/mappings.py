"""SQL that maps a file's columns to fields.

What a caller writes as SQL runs where there is no file, no network and no setting to change, on one
batch of rows at a time. So each row is mapped by itself, and an import that is continued maps the
rest of a file as it would have mapped the whole.
"""

import json
import re
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Mapping_
from typing import Any

import duckdb
import orjson
import pyarrow

from cerberus import errors, transactions
from cerberus.files import engine
from cerberus.files.rows import FILE_NAME, ROW_NUMBER, Ms, Row, Single

_PROBE = "TRY({'v': __item}) IS NULL"  # what fails is NULL, and what is NULL is within a struct
_TIMES = ("DATE", "TIMESTAMP")
_MARK = "__inexact_"
_UNREPEATABLE = frozenset(
    "now today get_current_timestamp get_current_time transaction_timestamp current_date "
    "current_localtime current_localtimestamp txid_current current_setting unnest unlist "
    "generate_subscripts".split()
)
_MOMENTS = ("current_timestamp", "current_date", "current_time", "localtime", "localtimestamp")
_INEXACT = {
    "DOUBLE": "abs({}) >= 9007199254740992",
    "FLOAT": "abs({}) >= 16777216",
    "VARCHAR": r"(regexp_full_match({0}, '\s*[+-]?\d+([.,]\d+)?[eE][+-]?\d+\s*') OR "
    r"regexp_full_match({0}, '\s*[+-]?\d{{16,}}[.,]0+\s*') "
    r"AND abs(TRY_CAST(replace({0}, ',', '.') AS DOUBLE)) >= 9007199254740992)",
}
IDS = ("transaction_id", "user_id", "merchant_id")
"""Fields whose digits must be those that were written."""
_QUOTED = re.compile(r"'.*'|\".*\"")


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
        self._database = engine.database()
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
        known = {name for (name,) in volatile.fetchall()} | _UNREPEATABLE
        for each in _walk(node):
            columns = each.get("column_names") or ("",)
            if (
                each.get("class") in ("WINDOW", "SUBQUERY")
                or each.get("function_name") in known
                or columns[0].lower() in _MOMENTS
            ):
                raise errors.InvalidInput(
                    "--select",
                    "maps each row by itself, and always alike: use row_number and file_name for "
                    "ids, and no window, query, random function or time of the clock",
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
        kinds = {engine.LINE: "BIGINT", ROW_NUMBER: "BIGINT", FILE_NAME: "VARCHAR"} | dict(columns)
        self._guards = self._guarded(columns)
        names = [
            engine.LINE,
            *(f"{engine.quoted(name)} AS {name.lower()}" for name in own),
            *self._guards,
        ]
        inner = f"FROM data SELECT {', '.join(names)}" + (
            f", {self._select}\n" * bool(self._select)
        )
        empty = ", ".join(f"NULL::{kind} AS {engine.quoted(name)}" for name, kind in kinds.items())
        try:
            described = self._database.execute(
                f"DESCRIBE WITH data AS (SELECT {empty} WHERE false) {inner}"
            ).fetchall()
        except duckdb.Error as error:
            raise errors.InvalidInput("--select", engine.reason(error)) from error
        self._outputs = [(n.lower(), k) for n, k, *_ in described if n.lower() in self._fields]
        made = [_output(name, kind) for name, kind in self._outputs]
        marks = [guard.rpartition(" AS ")[2] for guard in self._guards]
        self._query = f"SELECT {', '.join((engine.LINE, *marks, *made))} FROM ({inner})"

    def _guarded(self, columns: Mapping_[str, str]) -> list[str]:
        """Return SQL that says of each id that is computed whether its columns are exact."""
        kinds = {name.lower(): kind for name, kind in columns.items()}
        found = []
        for field in IDS:
            read = _columns(self._items[field]) if field in self._items else ()
            tests = [
                _INEXACT[kinds[name.lower()]].format(engine.quoted(name))
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
                return [self._broken(table[engine.LINE][0].as_py(), error)]
        if failed := self._failed():
            first = {field: line for line, field in reversed(failed.items())}
            lines = table[engine.LINE].to_pylist()
            why = {
                field: self.rows(table.slice(lines.index(line), 1))[0].broken
                for field, line in first.items()
            }
            good = table.filter(pyarrow.array([line not in failed for line in lines]))
            broken = [Row(line, {}, why[field], field) for line, field in failed.items()]
            return sorted(self.rows(good) + broken, key=lambda row: row.line)
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
                rows[-1] = Row(line, {}, transactions.THROUGH_A_DOUBLE, mark)
        return rows

    def _failed(self) -> dict[int, str]:
        """Return the rows of `data` on which an expression fails, each with the first such field.

        Empty if what fails is something else, such as the WHERE.
        """
        probes = [self._probe(item) for item in self._items.values()]
        if not probes:
            return {}
        try:
            said = self._database.execute(self._sql([self._probe(None), *probes])).fetchall()
        except duckdb.Error:
            return {}
        fields = list(self._items)
        return {line: fields[marks.index(True)] for line, *marks in said if any(marks)}

    def _probe(self, item: Any) -> Any:
        """Return the tree of an expression that says whether one fails; of the line for None."""
        query = f"FROM data SELECT {'__line' if item is None else _PROBE}"
        said = self._database.execute("SELECT json_serialize_sql($1)", [query]).fetchall()[0][0]

        def put(each: dict[str, Any]) -> dict[str, Any]:
            return item | {"alias": ""} if each.get("column_names") == ["__item"] else each

        return json.loads(said, object_hook=put)["statements"][0]["node"]["select_list"][0]

    def _sql(self, items: Sequence[Any]) -> str:
        """Return the SQL with other expressions."""
        statement = self._tree["statements"][0] | {"node": self._node | {"select_list": items}}
        tree = json.dumps(self._tree | {"statements": [statement]})
        query = "SELECT json_deserialize_sql($1)"
        return str(self._database.execute(query, [tree]).fetchall()[0][0])

    def _broken(self, line: int, error: duckdb.Error) -> Row:
        """Name the field whose expression fails on the only row of `data`."""
        # The line alone tells whether the WHERE fails, which is about no field.
        probes = {"value": self._probe(None), **self._items}
        for field, item in probes.items() if self._items else ():
            try:
                self._database.execute(self._sql([item])).fetchall()
            except duckdb.Error as found:
                return Row(line, {}, _without_values(found), field)
        return Row(line, {}, _without_values(error))


def table(lines: Sequence[int], columns: Mapping_[str, Sequence[Any]]) -> Any:
    """Return a table of texts for `Mapping.rows`; values of JSON become the text that they are."""
    made = {name: pyarrow.array(map(_text, cells), "string") for name, cells in columns.items()}
    return pyarrow.table({engine.LINE: pyarrow.array(lines, "int64"), **made})


def complete(rows: Any, told: Mapping_[str, str | None], name: str, numbers: Any = None) -> Any:
    """Add to a table what its folder's and file's names say, and each row's number."""
    numbers = rows[engine.LINE] if numbers is None else pyarrow.array(numbers, "int64")
    known = {k: pyarrow.repeat(pyarrow.scalar(v, "string"), rows.num_rows) for k, v in told.items()}
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


def _without_values(error: Exception) -> str:
    """Say why SQL fails on a row, without what stands in it."""
    return _QUOTED.sub("…", engine.reason(error))
