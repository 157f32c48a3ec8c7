"""The offline store: Postgres keeps every fact, Feast's history and what was decided.

Every write is idempotent: a replay or a zombie writes the same rows or older ones, which lose.
Calls raise `StoreUnavailable` when Postgres does not answer within 10 s.
"""

import contextlib
import datetime
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from cerberus import (
    accuracy,
    decisions,
    declared,
    features,
    label_store,
    labels,
    ledger,
    months,
    pools,
    transactions,
    window,
)

_MIGRATIONS = {
    path.name: path.read_text()
    for path in sorted((pathlib.Path(__file__).parent / "migrations").glob("*.sql"))
}
IMPORTED = "import"
"""Stands for the topic of a transaction that no log has told of."""
_PAGE = 2_000
_MIGRATION_S = 3600  # a table with years in it is written anew
# Or a process that is frozen in a transaction would let no other start, and no month go.
_NO_IDLING = f"SET LOCAL idle_in_transaction_session_timeout = '{pools.QUERY_S}s'"
_MIGRATION_LOCK, _SINGLETON_LOCK = 7_237_001, 7_237_002
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

_EPOCH = """
INSERT INTO log_epochs AS l (topic, cluster, partitions, epoch)
VALUES ($1, $2, $3, extract(epoch FROM clock_timestamp())::bigint)
ON CONFLICT (topic) DO UPDATE SET
    epoch = greatest(l.epoch + 1, excluded.epoch), cluster = excluded.cluster,
    partitions = excluded.partitions
WHERE l.cluster <> excluded.cluster OR l.partitions <> excluded.partitions OR l.epoch = $4
RETURNING epoch
"""

_IMPORTED = f"""
SELECT user_id, event_ms, transaction_id, amount_minor, currency, merchant_id FROM transactions
WHERE topic = '{IMPORTED}' AND event_ms > $1 AND event_ms <= $2
"""

_BEGIN = f"""
WITH life AS (
    INSERT INTO log_begins AS l (topic, epoch, partition, begin_ms) VALUES ($1, $2, $3, $4)
    ON CONFLICT (topic, epoch, partition) DO UPDATE SET begin_ms = l.begin_ms RETURNING begin_ms
)
SELECT begin_ms FROM life WHERE EXISTS (
    SELECT FROM transactions WHERE topic = '{IMPORTED}' AND event_ms <= begin_ms)
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
    fence: features.Fence


class OfflineStore:
    """Reads and writes Postgres; safe for concurrent use.

    Args:
        pool: The shared pool.
        spans: Names of the windows, such as ("10m",); each has two columns in the history.
        label_rules: For the views, written once; None leaves them as they are.

    Attributes:
        ledger: Its decisions.
        labels: The truth about transactions.
        accuracy: Of the decisions.
    """

    def __init__(
        self, pool: asyncpg.Pool, spans: Sequence[str], label_rules: labels.Rules | None = None
    ) -> None:
        self._pool = pool
        self._label_rules = label_rules
        self._rules_told = False
        self.ledger = ledger.Ledger(pool)
        self.labels = label_store.LabelStore(pool)
        self.accuracy = accuracy.Accuracy(pool)
        columns = {each.name: each.kind.sql for each in declared.streamed(spans)}
        self._span_columns = columns
        self._write_stats = _WRITE_STATS.format(
            columns=", ".join(columns),
            values=", ".join(f"v{i}" for i in range(len(columns))),
            arrays=", ".join(f"${i + 5}::{kind}[]" for i, kind in enumerate(columns.values())),
            updates=", ".join(f"{column} = excluded.{column}" for column in columns),
        )

    @property
    def pool(self) -> asyncpg.Pool:
        """Return the shared pool, for those who keep its tables in order."""
        return self._pool

    async def migrate(self, now: datetime.datetime | None = None) -> list[str]:
        """Bring the schema up to date and return what was applied. Idempotent: yes.

        Each numbered file is applied once, under a lock; columns of new windows are added, and the
        views are told the rules of labels, all of it or nothing. Then the coming months' partitions
        are added, each by itself, where that can be done at once.
        """
        applied = []
        async with pools.connection(self._pool) as connection, connection.transaction():
            await connection.execute(_NO_IDLING)
            lock = "SELECT pg_advisory_xact_lock($1)"
            await connection.execute(lock, _MIGRATION_LOCK, timeout=_MIGRATION_S)
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY, "
                "applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
            )
            known = await connection.fetch("SELECT name FROM schema_migrations")
            done = {row["name"] for row in known}
            for name, statements in _MIGRATIONS.items():
                if name in done:
                    continue
                await connection.execute(statements, timeout=_MIGRATION_S)
                await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", name)
                applied.append(name)
            await self._add_columns(connection)
            if self._label_rules is not None and (applied or not self._rules_told):
                await label_store.write_rules(connection, self._label_rules)
        self._rules_told = True
        coming = months.coming(now or datetime.datetime.now(datetime.UTC))
        # Not in the transaction above: whoever writes would wait until it ends.
        async with pools.connection(self._pool) as connection:
            for table in months.TABLES:
                await months.add(connection, table, coming)
        return applied

    async def _add_columns(self, connection: asyncpg.Connection) -> None:
        table = "user_transaction_stats"
        present = await connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass", table
        )
        for column in self._span_columns.keys() - {row["attname"] for row in present}:
            kind = self._span_columns[column]
            await connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")

    async def epoch(
        self, cluster: str, topic: str, partitions: int, *, ended: int | None = None
    ) -> int:
        """Return the epoch of a topic's present life.

        It rises when the cluster or the number of partitions changes, and when the caller has
        seen that epoch `ended` is over (several callers may; it rises once). It follows the clock,
        so that a database which lost its data goes on above the fences that Redis has kept.
        """
        async with pools.connection(self._pool) as connection:
            risen = await connection.fetchval(_EPOCH, topic, cluster, partitions, ended)
            if risen is not None:
                return int(risen)
            query = "SELECT epoch FROM log_epochs WHERE topic = $1"
            return int(await connection.fetchval(query, topic))

    async def has_served_scores(self) -> bool:
        """Say whether credit scores were ever loaded to the online store."""
        query = "SELECT EXISTS (SELECT FROM credit_scores WHERE created_timestamp IS NOT NULL)"
        async with pools.connection(self._pool) as connection:
            return bool(await connection.fetchval(query))

    async def has_rows(
        self, topic: str, epoch: int, partition: int, *, since_epoch: int | None = None
    ) -> bool:
        """Say whether effects of this partition were stored since `since_epoch`; None: in one."""
        query = (
            "SELECT EXISTS (SELECT FROM log_positions "
            "WHERE topic = $1 AND epoch BETWEEN $2 AND $3 AND partition = $4)"
        )
        since = epoch if since_epoch is None else since_epoch
        async with pools.connection(self._pool) as connection:
            return bool(await connection.fetchval(query, topic, since, epoch, partition))

    async def write(
        self,
        topic: str,
        facts: Sequence[TransactionFact],
        stats: Sequence[StatsFact],
        decided: Sequence[decisions.Record],
    ) -> None:
        """Store a batch in one statement, so all or nothing. Idempotent: yes. Cost: 30 µs a fact.

        A transaction of several statements would hold its locks, and keep the partitions' next
        owner waiting, for as long as a process is frozen between two of them.

        Of several facts with one identity the lowest offset of the newest epoch stands; of several
        rows for one user and moment the greatest fence; of several decisions the first.
        """
        first: dict[tuple[int, int, str], TransactionFact] = {}
        for fact in facts:
            txn = fact.transaction
            first.setdefault((txn.user_id, txn.event_ms, txn.transaction_id), fact)
        newest = {(fact.user_id, fact.event_us): fact for fact in stats}
        # Sorted, so that two writers lock rows in one order.
        rows = [(*key, first[key]) for key in sorted(first)]
        query, arguments = pools.together(
            (
                _WRITE_TRANSACTIONS,
                [topic, *pools.columns([_transaction_row(*row) for row in rows], 9)],
            ),
            (
                self._write_stats,
                pools.columns(
                    [_stats_row(newest[key]) for key in sorted(newest)], 4 + len(self._span_columns)
                ),
            ),
            ledger.insert(decided),
            (
                _WRITE_POSITIONS,
                [
                    topic,
                    *pools.columns([(f.epoch, f.partition, f.log_offset + 1) for f in facts], 3),
                ],
            ),
        )
        async with pools.connection(self._pool) as connection:
            await connection.execute(query, *arguments)

    def seed(
        self,
        topic: str,
        fence: features.Fence,
        partition: int,
        after_ms: int,
        user_ids: Collection[int] | None = None,
        *,
        since_epoch: int,
    ) -> Pages:
        """Yield what happened after `after_ms` in the log before `fence`; all users when None.

        What was stored under an epoch from `since_epoch` on is of the same log.
        """
        place = (after_ms, topic, since_epoch, fence.epoch, partition, fence.offset)
        return self._pages(_SEED, place, user_ids)

    async def imported_until(self, topic: str, epoch: int, partition: int, begin_ms: int) -> int:
        """Return up to when imported transactions count in a log's windows; 0 when there are none.

        That is where the log began when this life of it was first read: what came later, it tells.

        Args:
            topic: Of the log.
            epoch: Of this life.
            partition: Of the topic.
            begin_ms: Where the log begins now; stands if it was not known.
        """
        async with pools.connection(self._pool) as connection:
            return await connection.fetchval(_BEGIN, topic, epoch, partition, begin_ms) or 0

    def imported(
        self, after_ms: int, until_ms: int, user_ids: Collection[int] | None = None
    ) -> Pages:
        """Yield what was imported of `(after_ms, until_ms]`; of all users when None."""
        return self._pages(_IMPORTED, (after_ms, until_ms), user_ids)

    async def _pages(
        self, query: str, arguments: Sequence[Any], user_ids: Collection[int] | None
    ) -> Pages:
        """Yield transactions in no order, all as they stood at the start; 10 s for each page."""
        if user_ids is not None:
            query += f"AND user_id = ANY(${len(arguments) + 1})"
            arguments = (*arguments, list(user_ids))
        async with pools.connection(self._pool) as connection, connection.transaction():
            await connection.execute(_NO_IDLING)
            rows = await connection.cursor(query, *arguments)
            while page := await rows.fetch(_PAGE):
                yield [transactions.Transaction(**row) for row in page]

    async def seed_credit_scores(
        self, scores: Sequence[tuple[int, int]], at: datetime.datetime
    ) -> None:
        """Add (user id, score) rows that hold from `at` on; what is there stays."""
        async with pools.connection(self._pool) as connection:
            await connection.execute(
                "INSERT INTO credit_scores (user_id, event_timestamp, credit_score) "
                "SELECT u, $1, s FROM unnest($2::bigint[], $3::bigint[]) AS r (u, s) "
                "ON CONFLICT DO NOTHING",
                at,
                *pools.columns(scores, 2),
            )

    @contextlib.asynccontextmanager
    async def singleton(self, name: str) -> AsyncIterator[Callable[[], Awaitable[None]] | None]:
        """Try to be the only holder of `name` across instances, while the block lasts.

        Yields:
            None when another holds it; else a function to be awaited every few seconds, which
            raises `StoreUnavailable` when the hold was lost.
        """
        with pools.unavailable():
            connection = await self._pool.acquire(timeout=pools.QUERY_S)
        try:
            with pools.unavailable():
                held = await connection.fetchval(
                    "SELECT pg_try_advisory_lock($1, hashtext($2))", _SINGLETON_LOCK, name
                )

            async def still_held() -> None:
                with pools.unavailable():
                    await connection.fetchval("SELECT 1")

            yield still_held if held else None
        finally:
            await pools.release(self._pool, connection)  # the pool's reset lets go of the lock

    async def check(self) -> None:
        """Ask for nothing.

        Raises:
            StoreUnavailable: Postgres does not answer.
        """
        async with pools.connection(self._pool) as connection:
            await connection.fetchval("SELECT 1")


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
