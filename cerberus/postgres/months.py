"""Tables by month: partitions are made before their month begins, and dropped as a whole.

Both need a lock that blocks readers and writers of the table. The wait for it is therefore short,
and a later attempt follows: until then, rows go to the default partition.
"""

import asyncio
import contextlib
import datetime
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

import asyncpg

TABLES = {"transactions": "event_ms", "decisions": "as_of_ms"}
"""The partitioned tables, and the column in ms that they are partitioned by."""
AHEAD = 3
"""How many months have partitions, this one included."""
BLOCKS = 512
"""How many blocks of a table a statement deletes from: 4 MB."""
_OF_TABLE = """
SELECT c.relname::text FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE i.inhparent = $1::regclass ORDER BY 1
"""
# Another instance makes it, or the default partition has rows of that month.
_NEVER = (
    asyncpg.CheckViolationError,
    asyncpg.DuplicateTableError,
    asyncpg.UniqueViolationError,
)
# Others read or write the table, or the default partition takes long to search.
_IN_USE = (
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.DeadlockDetectedError,
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a change waits for a table that others use.

    Attributes:
        tries: How many attempts the change gets.
        lock_ms: How long an attempt waits for the lock, while others wait behind it.
        work_ms: How long an attempt may take.
        pause_s: How long to wait before the next attempt.
    """

    tries: int = 1
    lock_ms: int = 500
    work_ms: int = 3_000
    pause_s: float = 1.0


ONCE, PATIENT = Patience(), Patience(tries=5)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a table to delete.

    Attributes:
        table: The table.
        condition: SQL that is true for the rows; it refers to an argument as $1.
        also: SQL that deletes more in each statement; it refers to the deleted rows as `gone`.
    """

    table: str
    condition: str
    also: str = ""


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
    """Return the beginning of the oldest month that overlaps the last `days` days."""
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
    patience: Patience = ONCE,
) -> list[str]:
    """Add the partitions of the months that begin at `starts`, and return the names of new ones.

    Idempotent: yes. A month that already has rows in the default partition stays there. A month
    whose lock is not granted in time is left to the next call.
    """
    made = []
    for start in starts:
        name = _name(table, start)
        if await connection.fetchval("SELECT to_regclass($1)", name) is not None:
            continue
        low, high = to_ms(start), to_ms(start_of(start + datetime.timedelta(days=31)))
        create = f"CREATE TABLE {name} PARTITION OF {table} FOR VALUES FROM ({low}) TO ({high})"
        with contextlib.suppress(*_NEVER):
            if await _changed(connection, create, patience):
                made.append(name)
    return made


async def drop(
    connection: asyncpg.Connection,
    table: str,
    before: datetime.datetime,
    patience: Patience = PATIENT,
) -> tuple[list[str], bool]:
    """Drop the partitions of months that end at or before `before`, the first moment of a month.

    Idempotent: yes.

    Returns:
        The names of dropped partitions, and whether all are dropped. It stops at the first one
        that stays in use: for 8 s, by default.
    """
    dropped: list[str] = []
    for (name,) in await connection.fetch(_OF_TABLE, table):
        if not _over(name, before):
            continue
        if not await _changed(connection, f"DROP TABLE {name}", patience):
            return dropped, False
        dropped.append(name)
    return dropped, True


async def delete(
    connection: asyncpg.Connection, rows: Rows, value: Any, blocks: int = BLOCKS
) -> AsyncIterator[int]:
    """Delete rows, `blocks` blocks of their table a statement.

    It reads the table once, block by block, so it needs no index and searches no block twice.

    Args:
        connection: A connection outside a transaction.
        rows: Which rows.
        value: The argument $1 of their condition.
        blocks: How many blocks to read in a statement.

    Yields:
        How many rows each statement has deleted.
    """
    size = "SELECT pg_relation_size($1::regclass) / current_setting('block_size')::integer"
    for at in range(0, await connection.fetchval(size, rows.table), blocks):
        query = (
            f"WITH gone AS (DELETE FROM {rows.table} WHERE ctid >= '({at},0)' "
            f"AND ctid < '({at + blocks},0)' AND {rows.condition} RETURNING *)"
        )
        if rows.also:
            query += f", more AS ({rows.also})"
        yield await connection.fetchval(f"{query} SELECT count(*) FROM gone", value)


async def _changed(connection: asyncpg.Connection, statement: str, patience: Patience) -> bool:
    """Change a table without blocking others for long; False when it stays in use."""
    for left in reversed(range(patience.tries)):
        with contextlib.suppress(*_IN_USE):
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = {patience.lock_ms}")
                await connection.execute(f"SET LOCAL statement_timeout = {patience.work_ms}")
                await connection.execute(statement)
            return True
        if left:
            await asyncio.sleep(patience.pause_s)
    return False


def _name(table: str, start: datetime.datetime) -> str:
    return f"{table}_{start:%Y_%m}"


def _over(name: str, before: datetime.datetime) -> bool:
    """Say whether a partition's month ends at or before `before`; False for the default one."""
    found = re.search(r"_(\d{4})_(\d\d)$", name)
    return found is not None and (int(found[1]), int(found[2])) < (before.year, before.month)
