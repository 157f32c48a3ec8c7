"""One user's rows in Postgres: finding and removing them.

Calls raise `StoreUnavailable` when Postgres does not answer; a statement may take 10 minutes.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from cerberus import transactions
from cerberus.postgres import pool as postgres_pool

_STATEMENT_S = 600
_TABLES = (
    "transactions",
    "user_transaction_stats",
    "history_due",
    "decisions",
    "credit_scores",
    "synthetic_truth",
)
_IDS = """
SELECT transaction_id, event_ms FROM transactions WHERE user_id = $1
UNION SELECT transaction_id, as_of_ms FROM decisions
WHERE user_id = $1 AND transaction_id IS NOT NULL
"""
# A label without a user applies to all transactions with its id, so it stays when another user has
# such a transaction.
_SHARED = "SELECT transaction_id FROM labels WHERE user_id IS NULL AND transaction_id = ANY($1)"
_OTHERS = """
SELECT transaction_id FROM transactions WHERE transaction_id = ANY($1) AND user_id <> $2
UNION SELECT transaction_id FROM decisions WHERE transaction_id = ANY($1) AND user_id <> $2
"""
_LABELS = "user_id = $1 OR user_id IS NULL AND transaction_id = ANY($2)"


@dataclass(frozen=True, slots=True)
class Person:
    """What Postgres holds on one user.

    Attributes:
        user_id: The user.
        rows: Number of rows by table.
        decision_ids: Decision ids of the user's transactions, sorted; claims in Redis are named
            after them.
        label_ids: Transaction ids whose labels name no user and that no other user has.
    """

    user_id: int
    rows: Mapping[str, int]
    decision_ids: tuple[uuid.UUID, ...]
    label_ids: tuple[str, ...]


class Persons:
    """Reads and deletes one user's rows of every table.

    Args:
        pool: The shared pool.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def find(self, user_id: int) -> Person:
        """Count a user's rows; labels and claims are found through the transactions."""
        async with postgres_pool.connection(self._pool) as connection:
            paid = await _fetch(connection, _IDS, user_id)
            label_ids = await _label_ids(connection, user_id, [row[0] for row in paid])
            rows = {}
            for table in _TABLES:
                count = f"SELECT count(*) FROM {table} WHERE user_id = $1"
                [(rows[table],)] = await _fetch(connection, count, user_id)
            count = f"SELECT count(*) FROM labels WHERE {_LABELS}"
            [(rows["labels"],)] = await _fetch(connection, count, user_id, label_ids)
        decision_ids = {transactions.decision_id(user_id, *row) for row in paid}
        return Person(user_id, rows, tuple(sorted(decision_ids)), tuple(label_ids))

    async def remove(self, person: Person) -> dict[str, int]:
        """Delete all rows in one transaction; return their number by table. Idempotent: yes."""
        user_id, removed = person.user_id, {}
        async with postgres_pool.connection(self._pool) as connection, connection.transaction():
            removed["labels"] = await _delete(
                connection, f"labels WHERE {_LABELS}", user_id, person.label_ids
            )
            for table in _TABLES:
                removed[table] = await _delete(connection, f"{table} WHERE user_id = $1", user_id)
        return removed


async def _label_ids(
    connection: asyncpg.Connection, user_id: int, transaction_ids: list[str]
) -> list[str]:
    found = {row[0] for row in await _fetch(connection, _SHARED, list(set(transaction_ids)))}
    if found:
        found -= {row[0] for row in await _fetch(connection, _OTHERS, list(found), user_id)}
    return list(found)


async def _fetch(connection: asyncpg.Connection, query: str, *arguments: Any) -> list[Any]:
    rows: list[Any] = await connection.fetch(query, *arguments, timeout=_STATEMENT_S)
    return rows


async def _delete(connection: asyncpg.Connection, rows: str, *arguments: Any) -> int:
    done = await connection.execute(f"DELETE FROM {rows}", *arguments, timeout=_STATEMENT_S)
    return int(done.rpartition(" ")[2])
