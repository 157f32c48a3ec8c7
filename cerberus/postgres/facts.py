"""Facts in Postgres: transactions, the history of windows that Feast reads, and log positions.

Every write is idempotent: a replay or a zombie writes the same rows, or older ones, which lose.
Calls raise `StoreUnavailable` when Postgres does not answer within 10 s.
"""

from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from cerberus import transactions, window
from cerberus.decisions import records
from cerberus.features import declared, fences
from cerberus.postgres import ledger, schema
from cerberus.postgres import pool as postgres_pool

IMPORTED = "import"
"""The topic of a transaction that is in no log."""
_PAGE = 2_000
_WRITE_TRANSACTIONS = """
INSERT INTO transactions AS t (topic, user_id, event_ms, transaction_id, amount_minor, currency,
    merchant_id, epoch, partition, log_offset)
SELECT $1, * FROM unnest($2::bigint[], $3::bigint[], $4::text[], $5::bigint[], $6::text[],
    $7::text[], $8::bigint[], $9::integer[], $10::bigint[])
ON CONFLICT (user_id, event_ms, transaction_id) DO UPDATE SET
    amount_minor = excluded.amount_minor, merchant_id = excluded.merchant_id,
    topic = excluded.topic, epoch = excluded.epoch, partition = excluded.partition,
    log_offset = excluded.log_offset
WHERE excluded.epoch > t.epoch
    OR (excluded.epoch = t.epoch AND excluded.log_offset < t.log_offset)
"""
_WRITE_POSITIONS = """
INSERT INTO log_positions AS p (topic, epoch, partition, log_offset)
SELECT $1, e, n, max(o) FROM unnest($2::bigint[], $3::integer[], $4::bigint[]) AS u (e, n, o)
GROUP BY e, n
ON CONFLICT (topic, epoch, partition) DO UPDATE SET log_offset = excluded.log_offset
WHERE excluded.log_offset > p.log_offset
"""
_WRITE_STATS = """
INSERT INTO user_transaction_stats AS s (user_id, event_timestamp, epoch, log_offset, {columns})
SELECT u, timestamptz 'epoch' + t * interval '1 microsecond', e, o, {values}
FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], {arrays})
    AS r (u, t, e, o, {values})
ON CONFLICT (user_id, event_timestamp) DO UPDATE SET
    epoch = excluded.epoch, log_offset = excluded.log_offset, {updates}
WHERE (excluded.epoch, excluded.log_offset) > (s.epoch, s.log_offset)
"""
_IMPORTED = f"""
SELECT user_id, event_ms, transaction_id, amount_minor, currency, merchant_id FROM transactions
WHERE topic = '{IMPORTED}' AND event_ms > $1 AND event_ms <= $2
"""
_SEED = """
SELECT user_id, event_ms, transaction_id, amount_minor, currency, merchant_id FROM transactions
WHERE event_ms > $1 AND topic = $2 AND epoch BETWEEN $3 AND $4 AND partition = $5
    AND log_offset < $6
"""
Pages = AsyncGenerator[list[transactions.Transaction], None]


@dataclass(frozen=True, slots=True)
class TransactionFact:
    """A valid transaction and its place in the log (`log_offset` is the record's own)."""

    transaction: transactions.Transaction
    epoch: int
    partition: int
    log_offset: int


@dataclass(frozen=True, slots=True)
class StatsFact:
    """One row of the streamed view's history; `event_us` is its event timestamp in µs."""

    user_id: int
    event_us: int
    stats: tuple[window.WindowStats, ...]
    fence: fences.Fence


@dataclass(frozen=True, slots=True)
class Prefix:
    """What one partition of a log holds before a fence.

    Attributes:
        topic: The log's topic.
        partition: Number of the partition.
        fence: Its epoch and offset end the prefix.
        since_epoch: Rows stored under this epoch or a later one belong to the same log.
    """

    topic: str
    partition: int
    fence: fences.Fence
    since_epoch: int


class Facts:
    """Reads and writes `transactions`, `user_transaction_stats` and `log_positions`.

    Safe for concurrent use.

    Args:
        pool: The shared pool.
        spans: Names of the windows, such as ("10m",); each has two columns in the history.
    """

    def __init__(self, pool: asyncpg.Pool, spans: Sequence[str]) -> None:
        self._pool = pool
        columns = schema.span_columns(spans)
        self._stats_width = 4 + len(columns)
        self._write_stats = _WRITE_STATS.format(
            columns=", ".join(columns),
            values=", ".join(f"v{i}" for i in range(len(columns))),
            arrays=", ".join(f"${i}::{kind}[]" for i, kind in enumerate(columns.values(), 5)),
            updates=", ".join(f"{column} = excluded.{column}" for column in columns),
        )

    async def write(
        self,
        topic: str,
        facts: Sequence[TransactionFact],
        stats: Sequence[StatsFact],
        decided: Sequence[records.Record],
    ) -> None:
        """Store a batch in one statement: all or nothing. Idempotent: yes. Cost: 30 µs a fact.

        If a process froze between two statements of a transaction, the transaction would hold its
        locks and block the partitions' next owner for as long.

        Of several facts with one identity, the lowest offset of the newest epoch wins; of several
        rows for one user and moment, the greatest fence; of several decisions, the first.
        """
        query, arguments = postgres_pool.together(
            (_WRITE_TRANSACTIONS, [topic, *_transaction_columns(facts)]),
            (self._write_stats, self._stats_columns(stats)),
            ledger.insert(decided),
            (_WRITE_POSITIONS, [topic, *_position_columns(facts)]),
        )
        async with postgres_pool.connection(self._pool) as connection:
            await connection.execute(query, *arguments)

    def _stats_columns(self, stats: Sequence[StatsFact]) -> list[list[Any]]:
        newest = {(fact.user_id, fact.event_us): fact for fact in stats}
        return postgres_pool.columns(
            [_stats_row(newest[key]) for key in sorted(newest)], self._stats_width
        )

    def seed(self, before: Prefix, after_ms: int, user_ids: Collection[int] | None = None) -> Pages:
        """Yield the transactions after `after_ms` in a log's prefix; all users when None.

        They come in no order, from one snapshot. Deadline: 10 s a page.
        """
        fence = before.fence
        epochs = (before.since_epoch, fence.epoch)
        place = (after_ms, before.topic, *epochs, before.partition, fence.offset)
        return self._pages(_SEED, place, user_ids)

    def imported(
        self, after_ms: int, until_ms: int, user_ids: Collection[int] | None = None
    ) -> Pages:
        """Yield the imported transactions in `(after_ms, until_ms]`, as `seed` does."""
        return self._pages(_IMPORTED, (after_ms, until_ms), user_ids)

    async def _pages(
        self, query: str, arguments: Sequence[Any], user_ids: Collection[int] | None
    ) -> Pages:
        if user_ids is not None:
            query += f"AND user_id = ANY(${len(arguments) + 1})"
            arguments = (*arguments, list(user_ids))
        async with postgres_pool.connection(self._pool) as connection, connection.transaction():
            await connection.execute(postgres_pool.NO_IDLING)
            rows = await connection.cursor(query, *arguments)
            while page := await rows.fetch(_PAGE):
                yield [transactions.Transaction(**row) for row in page]


def _transaction_columns(facts: Sequence[TransactionFact]) -> list[list[Any]]:
    first: dict[tuple[int, int, str], TransactionFact] = {}
    for fact in facts:
        txn = fact.transaction
        first.setdefault((txn.user_id, txn.event_ms, txn.transaction_id), fact)
    # Sorted, so that two writers lock rows in one order.
    return postgres_pool.columns([_transaction_row(*key, first[key]) for key in sorted(first)], 9)


def _position_columns(facts: Sequence[TransactionFact]) -> list[list[Any]]:
    """Lay out how far each partition is stored: the offset after the last record."""
    return postgres_pool.columns([(f.epoch, f.partition, f.log_offset + 1) for f in facts], 3)


def _transaction_row(
    user_id: int, event_ms: int, transaction_id: str, fact: TransactionFact
) -> tuple[Any, ...]:
    txn = fact.transaction
    paid = (txn.amount_minor, txn.currency, txn.merchant_id)
    place = (fact.epoch, fact.partition, fact.log_offset)
    return (user_id, event_ms, transaction_id, *paid, *place)


def _stats_row(fact: StatsFact) -> tuple[Any, ...]:
    place = (fact.user_id, fact.event_us, fact.fence.epoch, fact.fence.offset)
    return (*place, *declared.values(fact.stats))
