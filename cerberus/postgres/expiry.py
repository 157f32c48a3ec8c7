"""Removal of rows older than the retention from Postgres, whole months at a time.

Calls raise `StoreUnavailable` when Postgres does not answer within 10 s.
"""

import datetime
import logging
from collections.abc import AsyncGenerator

import asyncpg

from cerberus.postgres import months
from cerberus.postgres import pool as postgres_pool

log = logging.getLogger(__name__)

_TIME = "timestamptz 'epoch' + {}::bigint * interval '1 millisecond'"
_STATS = "user_transaction_stats"
_ROWS = {f"{table}_default": f"{column} < $1" for table, column in months.TABLES.items()} | {
    _STATS: f"event_timestamp < {_TIME.format('$1')}",
    "labels": "labelled_ms < $1",
}
"""Tables without a partition for each month, and the condition for rows older than $1."""
_DUE = {table: f"SELECT EXISTS (SELECT FROM {table} WHERE {_ROWS[table]})" for table in _ROWS} | {
    _STATS: "SELECT NOT EXISTS (SELECT FROM retention "
    f"WHERE table_name = '{_STATS}' AND kept_from_ms >= $1)"
}
"""Whether a table has to be read; the history once a month: an index would slow every event."""
_WITH = {
    "transactions_default": f"DELETE FROM {_STATS} AS s USING gone WHERE s.user_id = gone.user_id "
    f"AND s.event_timestamp >= {_TIME.format('gone.event_ms')} "
    f"AND s.event_timestamp < {_TIME.format('(gone.event_ms + 1)')}"
}
"""Late rows of the history are found through the transaction that was stored with them."""
_CLEAR = f"""
INSERT INTO retention (table_name, kept_from_ms) VALUES ('{_STATS}', $1)
ON CONFLICT (table_name) DO UPDATE SET kept_from_ms = excluded.kept_from_ms
"""
BY_MONTH = tuple(months.TABLES)
"""Tables whose whole months are dropped."""
BY_ROW = tuple(_ROWS)
"""Tables whose rows are deleted."""


class Expiry:
    """Removes rows older than the retention. Every call is idempotent.

    Args:
        pool: The shared pool.
        patience: How long the removal of a month waits for its table.
        blocks: How many blocks of a table a statement deletes from.
    """

    def __init__(
        self,
        pool: asyncpg.Pool,
        patience: months.Patience = months.PATIENT,
        blocks: int = months.BLOCKS,
    ) -> None:
        self._pool = pool
        self._patience = patience
        self._blocks = blocks

    async def now(self) -> datetime.datetime:
        """Return the time by the clock of Postgres, in UTC."""
        async with postgres_pool.connection(self._pool) as connection:
            told: datetime.datetime = await connection.fetchval("SELECT clock_timestamp()")
        return told.astimezone(datetime.UTC)

    async def drop(self, table: str, before: datetime.datetime) -> bool:
        """Drop the months of a table in `BY_MONTH` that end at or before `before`.

        Args:
            table: One of `BY_MONTH`.
            before: The first moment of a month.

        Returns:
            Whether all were dropped. It stops at the first one that stays in use: for 8 s, by
            default.
        """
        async with postgres_pool.connection(self._pool) as connection:
            dropped, all_gone = await months.drop(connection, table, before, self._patience)
        for name in dropped:
            log.info("dropped %s", name, extra={"action": "month_dropped"})
        return all_gone

    async def clear(self, table: str, before: datetime.datetime) -> AsyncGenerator[int, None]:
        """Delete the rows of a table in `BY_ROW` that are older than `before`.

        Yields:
            How many rows each statement has deleted; nothing for a table without old rows.
        """
        before_ms, count = months.to_ms(before), 0
        async with postgres_pool.connection(self._pool) as connection:
            if not await connection.fetchval(_DUE[table], before_ms):
                return
            rows = months.Rows(table, _ROWS[table], _WITH.get(table, ""))
            async for deleted in months.delete(connection, rows, before_ms, self._blocks):
                count += deleted
                yield deleted
            if table == _STATS:
                await connection.execute(_CLEAR, before_ms)
        log.info("%s: removed %d rows", table, count, extra={"action": "rows_removed"})
