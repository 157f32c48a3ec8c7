"""DuckDB as it is used here: in memory, with a bound in bytes, and without extensions."""

from typing import Any

import duckdb

MEMORY = "512MB"
LINE = "__line"
"""The column of a table that holds each row's line."""


def database() -> duckdb.DuckDBPyConnection:
    """Open a database of its own in memory, at most `MEMORY`."""
    config: dict[str, Any] = {
        "threads": 1,
        "memory_limit": MEMORY,
        "temp_directory": "",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
    }
    return session(duckdb.connect(":memory:", config=config))


def session(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """Set what each connection needs."""
    connection.execute("SET TimeZone = 'UTC'")
    # What is read ahead is lost where a file turns out to be damaged.
    connection.execute("SET streaming_buffer_size = '1KB'")
    return connection


def quoted(column: str) -> str:
    """Return a column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def reason(error: Exception) -> str:
    """Return what DuckDB says in one line."""
    first = str(error).splitlines()[0]
    said = first.partition("Error: ")[2] or first
    # It may repeat what stands in the file, which must not control a terminal.
    return said if said.isprintable() else ascii(said)[1:-1]
