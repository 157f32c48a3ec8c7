"""The tables of Postgres: numbered migrations, the windows' columns, the coming months.

Calls raise `StoreUnavailable` when Postgres does not answer within 10 s.
"""

import datetime
import pathlib
from collections.abc import Sequence

import asyncpg

from cerberus import labels
from cerberus.features import declared
from cerberus.postgres import label_rows, months, refusals
from cerberus.postgres import pool as postgres_pool

_MIGRATIONS = {
    path.name: path.read_text()
    for path in sorted((pathlib.Path(__file__).parent / "migrations").glob("*.sql"))
}
_MIGRATION_S = 3600  # a table with years in it is rewritten
_MIGRATION_LOCK = 7_237_001
_APPLIED = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())
"""
_STATS = "user_transaction_stats"


def span_columns(spans: Sequence[str]) -> dict[str, str]:
    """Return the columns of the streamed view's history, with their types: two for each window."""
    return {each.name: each.kind.sql for each in declared.streamed(spans)}


class Schema:
    """Brings the tables up to date; safe for concurrent use.

    Args:
        pool: The shared pool.
        spans: Names of the windows, such as ("10m",); each has two columns in the history.
        label_rules: Rules for the views, written once; None leaves them as they are.
        patience: How long a new partition waits for its table.
    """

    def __init__(
        self,
        pool: asyncpg.Pool,
        spans: Sequence[str],
        label_rules: labels.Rules | None = None,
        patience: months.Patience = months.ONCE,
    ) -> None:
        self._pool = pool
        self._columns = span_columns(spans)
        self._label_rules = label_rules
        self._patience = patience
        self._rules_written = False

    async def migrate(self, now: datetime.datetime | None = None) -> list[str]:
        """Bring the schema up to date and return what was applied. Idempotent: yes.

        In one transaction, under a lock, it applies each numbered file once, adds columns of new
        windows and writes the rules of labels for the views. Then it adds the partitions of the
        coming months, each by itself, and skips those whose lock is not free.
        """
        async with postgres_pool.connection(self._pool) as connection, connection.transaction():
            await connection.execute(postgres_pool.NO_IDLING)
            lock = "SELECT pg_advisory_xact_lock($1)"
            await connection.execute(lock, _MIGRATION_LOCK, timeout=_MIGRATION_S)
            applied = await _apply_missing(connection)
            await self._add_columns(connection)
            if self._label_rules is not None and (applied or not self._rules_written):
                await label_rows.write_rules(connection, self._label_rules)
        self._rules_written = True
        coming = months.coming(now or datetime.datetime.now(datetime.UTC))
        # Not in the transaction above: writers would wait until it ends.
        async with postgres_pool.connection(self._pool) as connection:
            for table in months.TABLES:
                await months.add(connection, table, coming, self._patience)
        return applied

    async def _add_columns(self, connection: asyncpg.Connection) -> None:
        present = await connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass", _STATS
        )
        for column in self._columns.keys() - {row["attname"] for row in present}:
            kind = self._columns[column]
            await connection.execute(f"ALTER TABLE {_STATS} ADD COLUMN {column} {kind}")

    async def check(self, *, makes_tables: bool = False) -> None:
        """Ask Postgres whether it takes writes.

        Args:
            makes_tables: Whether this process needs the permission to create tables.

        Raises:
            StoreUnavailable: Postgres does not answer, or takes no writes.
            ConfigError: Postgres refuses the address, the user or the permission.
        """
        async with postgres_pool.connection(self._pool) as connection:
            await postgres_pool.prove(connection)
            if makes_tables:
                await refusals.check_rights(connection)


async def _apply_missing(connection: asyncpg.Connection) -> list[str]:
    await connection.execute(_APPLIED)
    done = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
    missing = [name for name in _MIGRATIONS if name not in done]
    for name in missing:
        await connection.execute(_MIGRATIONS[name], timeout=_MIGRATION_S)
        await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", name)
    return missing
