"""What is older than is kept leaves Postgres, whole months at a time; the coming months get in.

One clock for all tables: the beginning of the oldest month of which something is still kept. So
nothing that is kept lacks its other half, and up to a month more than asked for is kept.
"""

import datetime
import logging
from collections.abc import Awaitable, Callable

import asyncpg

from cerberus import errors, months, offline, pools, settings, supervision

log = logging.getLogger(__name__)

_LOOK_S, _RETRY_S = 3600.0, 60.0
_TIME = "timestamptz 'epoch' + {}::bigint * interval '1 millisecond'"
_STATS = "user_transaction_stats"
_ROWS = {f"{table}_default": f"{column} < $1" for table, column in months.TABLES.items()} | {
    _STATS: f"event_timestamp < {_TIME.format('$1')}",
    "labels": "labelled_ms < $1",
}
"""What lies in no month's partition, and which rows of it are older than $1."""
_DUE = {table: f"SELECT EXISTS (SELECT FROM {table} WHERE {_ROWS[table]})" for table in _ROWS} | {
    _STATS: "SELECT NOT EXISTS (SELECT FROM retention "
    f"WHERE table_name = '{_STATS}' AND kept_from_ms >= $1)"
}
"""Whether a table is to be read: the history once a month, for an index would cost each event."""
_WITH = {
    "transactions_default": f"DELETE FROM {_STATS} AS s USING gone WHERE s.user_id = gone.user_id "
    f"AND s.event_timestamp >= {_TIME.format('gone.event_ms')} "
    f"AND s.event_timestamp < {_TIME.format('(gone.event_ms + 1)')}"
}
"""So what comes late there is found by the transaction that was stored with it."""
_CLEAR = f"""
INSERT INTO retention (table_name, kept_from_ms) VALUES ('{_STATS}', $1)
ON CONFLICT (table_name) DO UPDATE SET kept_from_ms = excluded.kept_from_ms
"""
Beat = Callable[[], Awaitable[None]]


class Retention:
    """The task that keeps the tables in order: one across all instances at a time.

    Args:
        config: Settings; at 0 `retention_days` nothing is removed.
        store: Its tables, and who is the one.
        clock: The time, in UTC.
    """

    def __init__(
        self,
        config: settings.Settings,
        store: offline.OfflineStore,
        clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._days = config.retention_days
        self._store = store
        self._clock = clock

    async def run(self, progress: supervision.Progress) -> None:
        """Look every hour, until told to stop."""
        while not progress.stopping.is_set():
            wait_s = _LOOK_S
            try:
                await self._store.migrate(self._clock())
                async with self._store.singleton("retention") as still_held:
                    if still_held is not None and not await self.sweep(progress, still_held):
                        wait_s = _RETRY_S
            except errors.StoreUnavailable as error:
                log.warning("waiting: %s", error, extra={"action": "retention_waits"})
                wait_s = _RETRY_S
            progress.beat()
            await progress.wait(wait_s)

    async def sweep(self, progress: supervision.Progress, still_held: Beat) -> bool:
        """Remove what is older than is kept; False when something is in use and is left for later.

        Idempotent: yes; what has nothing old in it is not read.

        Raises:
            StoreUnavailable: Postgres did not answer.
        """
        if not self._days:
            return True
        before = months.kept_from(self._clock(), self._days)
        all_gone = True
        async with pools.connection(self._store.pool) as connection:
            for table in months.TABLES:
                dropped, gone = await months.drop(connection, table, before)
                all_gone &= gone
                for name in dropped:
                    log.info("%s is dropped", name, extra={"action": "month_dropped"})
            for table in _ROWS:
                await still_held()
                await self._clear(connection, table, months.to_ms(before), progress)
        return all_gone

    async def _clear(
        self,
        connection: asyncpg.Connection,
        table: str,
        before_ms: int,
        progress: supervision.Progress,
    ) -> None:
        if not await connection.fetchval(_DUE[table], before_ms):
            return
        count = 0
        rows = months.delete(connection, table, _ROWS[table], before_ms, _WITH.get(table, ""))
        async for deleted in rows:
            count += deleted
            progress.beat()
            if progress.stopping.is_set():
                return
        if table == _STATS:
            await connection.execute(_CLEAR, before_ms)
        log.info("%s: %d rows removed", table, count, extra={"action": "rows_removed"})
