"""Decisions in Postgres, one row a transaction, never changed, and the models that made them.

Calls raise `StoreUnavailable` when Postgres does not answer within 10 s.
"""

import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import asyncpg
import orjson

from cerberus import transactions
from cerberus.decisions import models, policy
from cerberus.decisions import records as decision_records
from cerberus.postgres import pool as postgres_pool

# How columns are sent, stored and read that unnest cannot carry or the table holds in another form.
_SENT = {"features": "text", "degraded": "text", "latency_ms": "text"}
_STORED = {
    "features": "features::jsonb",
    "degraded": "string_to_array(degraded, ',')",
    "latency_ms": "latency_ms::jsonb",
    "trace_id": "nullif(trace_id, '')",
    "decided_ms": "timestamptz 'epoch' + decided_ms * interval '1 millisecond'",
}
_READ = {"decided_ms": "(extract(epoch FROM decided_at) * 1000)::bigint AS decided_ms"}
_NAMES = {"decided_ms": "decided_at"}
_INSERT = """
INSERT INTO decisions ({names}) SELECT {stored} FROM unnest({sent}) AS r ({columns})
ON CONFLICT (decision_id, as_of_ms) DO NOTHING
""".format(
    names=", ".join(_NAMES.get(column, column) for column in decision_records.COLUMNS),
    stored=", ".join(_STORED.get(column, column) for column in decision_records.COLUMNS),
    sent=", ".join(
        f"${i}::{_SENT.get(column, kind)}[]"
        for i, (column, kind) in enumerate(decision_records.COLUMNS.items(), 1)
    ),
    columns=", ".join(decision_records.COLUMNS),
)
_SELECT = "SELECT {} FROM decisions".format(
    ", ".join(_READ.get(column, column) for column in decision_records.COLUMNS)
)
_FIND = f"""{_SELECT}
WHERE (decision_id, as_of_ms) IN (SELECT * FROM unnest($1::uuid[], $2::bigint[]))
"""
# The limit is hidden from the planner, which would sort where it expects less than a page, and its
# estimate may be wrong.
_OF = """{select}
WHERE {key} = $1 AND (as_of_ms, decision_id) < ($2, $3)
ORDER BY as_of_ms DESC, decision_id DESC LIMIT (SELECT $4::bigint)
"""
_OF_TRANSACTION = _OF.format(select=_SELECT, key="transaction_id")
_OF_USER = _OF.format(select=_SELECT, key="user_id")
_REGISTER = """
INSERT INTO artifacts (sha256, kind, content, manifest) VALUES ($1, $2, $3, $4)
ON CONFLICT (sha256) DO NOTHING
"""
_PAGE = 2_000
LAST = (2**63 - 1, uuid.UUID(int=2**128 - 1))
Position = tuple[int, uuid.UUID]


def insert(records: Iterable[decision_records.Record]) -> tuple[str, list[list[Any]]]:
    """Return the statement that stores records, and its arguments; existing rows stay."""
    by_id = {record.decision_id: record for record in records}
    # Sorted, so that two writers lock rows in one order.
    return _INSERT, postgres_pool.columns(
        [_row(by_id[name]) for name in sorted(by_id)], len(decision_records.COLUMNS)
    )


class Ledger:
    """Reads and writes decisions; safe for concurrent use.

    Args:
        pool: The shared pool.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def write(self, records: Sequence[decision_records.Record]) -> None:
        """Store records; the first one under an id stays. Idempotent: yes."""
        query, arguments = insert(records)
        async with postgres_pool.connection(self._pool) as connection:
            await connection.execute(query, *arguments)

    async def register(self, model: models.Model) -> None:
        """Keep a model and its policy, so that its decisions can be repeated. Idempotent: yes."""
        manifest = orjson.dumps(model.manifest).decode()
        rules = model.policy
        async with postgres_pool.connection(self._pool) as connection:
            await connection.execute(_REGISTER, model.sha256, "model", model.content, manifest)
            await connection.execute(_REGISTER, rules.sha256, "policy", rules.content, None)

    async def find(
        self, wanted: Sequence[transactions.Transaction]
    ) -> dict[uuid.UUID, decision_records.Record]:
        """Return the decisions that were made on transactions, by their ids.

        Asks only a server that takes writes: a standby may lack the latest decisions.
        """
        if not wanted:
            return {}
        names = [decision_records.of_transaction(transaction) for transaction in wanted]
        times_ms = [transaction.event_ms for transaction in wanted]
        found = await self._fetch(_FIND, names, times_ms, prove=True)
        return {record.decision_id: record for record in found}

    async def get(self, decision_id: uuid.UUID) -> decision_records.Record | None:
        """Return the decision with this id, or None."""
        found = await self._fetch(f"{_SELECT} WHERE decision_id = $1", decision_id)
        return found[0] if found else None

    async def of_transaction(
        self, transaction_id: str, limit: int, before: Position = LAST
    ) -> list[decision_records.Record]:
        """Return the decisions on all transactions with this id, in the order of `of_user`."""
        return await self._fetch(_OF_TRANSACTION, transaction_id, *before, limit)

    async def of_user(
        self, user_id: int, limit: int, before: Position = LAST
    ) -> list[decision_records.Record]:
        """Return a user's decisions older than `before` (as_of_ms, decision_id), newest first."""
        return await self._fetch(_OF_USER, user_id, *before, limit)

    async def count(self, since_ms: int) -> int:
        """Return how many decisions are as of this moment or later."""
        query = "SELECT count(*) FROM decisions WHERE as_of_ms >= $1"
        async with postgres_pool.connection(self._pool) as connection:
            return int(await connection.fetchval(query, since_ms, timeout=600))

    async def since(self, since_ms: int) -> AsyncIterator[list[decision_records.Record]]:
        """Yield all decisions as of this moment or later, in pages, in no order."""
        query = f"{_SELECT} WHERE as_of_ms >= $1"
        async with postgres_pool.connection(self._pool) as connection, connection.transaction():
            rows = await connection.cursor(query, since_ms)
            while page := await rows.fetch(_PAGE, timeout=600):
                yield [_record(row) for row in page]

    async def model(self, model_sha256: str, policy_sha256: str) -> models.Model | None:
        """Return the model and policy of these versions.

        None when they are not kept, or when this version of the service cannot read them.
        """
        query = "SELECT sha256, content, manifest FROM artifacts WHERE sha256 = ANY($1)"
        async with postgres_pool.connection(self._pool) as connection:
            rows = await connection.fetch(query, [model_sha256, policy_sha256])
        kept = {row["sha256"]: row for row in rows}
        if not {model_sha256, policy_sha256} <= kept.keys():
            return None
        try:
            manifest = models.read_manifest(kept[model_sha256]["manifest"].encode())
            rules = policy.Policy.parse(kept[policy_sha256]["content"])
            return models.Model.build(kept[model_sha256]["content"], manifest, rules)
        except (TypeError, ValueError):
            return None

    async def _fetch(
        self, query: str, *arguments: Any, prove: bool = False
    ) -> list[decision_records.Record]:
        async with postgres_pool.connection(self._pool) as connection:
            if prove:
                await postgres_pool.prove(connection)
            rows = await connection.fetch(query, *arguments)
        return [_record(row) for row in rows]


def _row(record: decision_records.Record) -> tuple[Any, ...]:
    columns = record.columns()
    columns["features"] = orjson.dumps(columns["features"]).decode()
    columns["degraded"] = ",".join(columns["degraded"])
    columns["latency_ms"] = orjson.dumps(columns["latency_ms"]).decode()
    return tuple(columns.values())


def _record(row: Mapping[str, Any]) -> decision_records.Record:
    parsed = {name: orjson.loads(row[name]) for name in ("features", "latency_ms")}
    return decision_records.from_columns(dict(row) | parsed)
