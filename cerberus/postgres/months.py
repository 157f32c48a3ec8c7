"""Tables by month: partitions are made before their month begins, and dropped in whole.

Both need a lock that readers and writers of the table wait behind. So the wait for it is cut short
and left to a later attempt: a row whose month has no partition is kept in the default one.
"""

import asyncio
import contextlib
import datetime
import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

import asyncpg

TABLES = {"transactions": "event_ms", "decisions": "as_of_ms"}
"""The partitioned tables, and what in ms they are partitioned by."""
AHEAD = 3
"""How many months have partitions, this one included."""
_LOCK_MS, _WORK_MS = 500, 3_000
_PAUSE_S = 1.0
TRIES = 5
"""How often it is tried to change what others use, where that has time."""
_BLOCKS = 512
_OF_TABLE = """
SELECT c.relname::text FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE i.inhparent = $1::regclass ORDER BY 1
"""
# Another makes it, or the default partition has rows of it.
_NEVER = (
    asyncpg.CheckViolationError,
    asyncpg.DuplicateTableError,
    asyncpg.UniqueViolationError,
)
# Another reads or writes there, or the default partition takes long to search.
_IN_USE = (
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.DeadlockDetectedError,
)


def start_of(moment: datetime.datetime) -> datetime.datetime:
    """Return the beginning of a moment's month, in UTC."""
    return datetime.datetime(moment.year, moment.month, 1, tzinfo=datetime.UTC)


def of_ms(ms: int) -> datetime.datetime:
    """Return the beginning of the month of ms since the Unix epoch."""
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return start_of(epoch + datetime.timedelta(milliseconds=ms))


def to_ms(moment: datetime.datetime) -> int:
    """Return a moment as ms since the Unix epoch."""
    return int(moment.timestamp()) * 1000


def kept_from(now: datetime.datetime, days: int) -> datetime.datetime:
    """Return the beginning of the oldest month of which something is kept for `days`."""
    return start_of(now.astimezone(datetime.UTC) - datetime.timedelta(days=days))


def coming(now: datetime.datetime) -> list[datetime.datetime]:
    """Return the beginnings of this month and the next ones."""
    return [
        datetime.datetime(now.year + m // 12, m % 12 + 1, 1, tzinfo=datetime.UTC)
        for m in range(now.month - 1, now.month - 1 + AHEAD)
    ]


async def add(
    connection: asyncpg.Connection,
    table: str,
    starts: Iterable[datetime.datetime],
    tries: int = 1,
) -> list[str]:
    """Add the partitions of the months that begin then, and return which were missing.

    Idempotent: yes. A month whose first rows are in the default partition already stays there, and
    one whose lock is not had within 0.5 s, however often that is tried, is left to the next call.
    """
    made = []
    for start in starts:
        name = _name(table, start)
        if await connection.fetchval("SELECT to_regclass($1)", name) is not None:
            continue
        low, high = to_ms(start), to_ms(start_of(start + datetime.timedelta(days=31)))
        create = f"CREATE TABLE {name} PARTITION OF {table} FOR VALUES FROM ({low}) TO ({high})"
        with contextlib.suppress(*_NEVER):
            if await _changed(connection, create, tries):
                made.append(name)
    return made


async def drop(
    connection: asyncpg.Connection, table: str, before: datetime.datetime
) -> tuple[list[str], bool]:
    """Drop the partitions of months that were over at `before`, which begins one.

    Idempotent: yes.

    Returns:
        Those dropped, and whether all were: at one that stays in use it ends, after 8 s.
    """
    dropped: list[str] = []
    for (name,) in await connection.fetch(_OF_TABLE, table):
        if not _over(name, before):
            continue
        if not await _changed(connection, f"DROP TABLE {name}", TRIES):
            return dropped, False
        dropped.append(name)
    return dropped, True


async def delete(
    connection: asyncpg.Connection, table: str, condition: str, value: Any, also: str = ""
) -> AsyncIterator[int]:
    """Delete the rows for which `condition` holds of $1, 4 MB of the table a statement.

    Reads the table once, by place: it needs no index, and no batch is searched for twice.

    Args:
        connection: To the tables.
        table: To read.
        condition: In SQL.
        value: $1.
        also: What else each statement deletes, in SQL; the rows deleted here are `gone`.

    Yields:
        How many rows each statement has deleted.
    """
    size = "SELECT pg_relation_size($1::regclass) / current_setting('block_size')::integer"
    blocks = await connection.fetchval(size, table)
    for at in range(0, blocks, _BLOCKS):
        query = (
            f"WITH gone AS (DELETE FROM {table} WHERE ctid >= '({at},0)' "
            f"AND ctid < '({at + _BLOCKS},0)' AND {condition} RETURNING *)"
        )
        if also:
            query += f", more AS ({also})"
        yield await connection.fetchval(f"{query} SELECT count(*) FROM gone", value)


async def _changed(connection: asyncpg.Connection, statement: str, tries: int) -> bool:
    """Change a table without holding anyone up; False when it stays in use."""
    for left in reversed(range(tries)):
        with contextlib.suppress(*_IN_USE):
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = {_LOCK_MS}")
                await connection.execute(f"SET LOCAL statement_timeout = {_WORK_MS}")
                await connection.execute(statement)
            return True
        if left:
            await asyncio.sleep(_PAUSE_S)
    return False


def _name(table: str, start: datetime.datetime) -> str:
    return f"{table}_{start:%Y_%m}"


def _over(name: str, before: datetime.datetime) -> bool:
    """Say whether a partition is of a month that was over at `before`; the default one is not."""
    found = re.search(r"_(\d{4})_(\d\d)$", name)
    return found is not None and (int(found[1]), int(found[2])) < (before.year, before.month)
