"""The offline store: Postgres keeps every fact, Feast's history and what was decided.

Every write is idempotent: a replay or a zombie writes the same rows or older ones, which lose.
Calls raise `StoreUnavailable` when Postgres does not answer within 10 s.
"""

import contextlib
import datetime
import itertools
import pathlib
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import orjson

from cerberus import errors, features, scoring, settings, transactions, window

_MIGRATIONS = {
    path.name: path.read_text()
    for path in sorted((pathlib.Path(__file__).parent / "migrations").glob("*.sql"))
}
_MIGRATION_LOCK, _SINGLETON_LOCK = 7_237_001, 7_237_002
_BY_MONTH = ("transactions", "decisions")
_CALL_S = 10
_REFUSED = (
    asyncpg.InvalidPasswordError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ClientConfigurationError,
)
_DOWN = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # on a connection that the server has just ended
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
    asyncpg.ReadOnlySQLTransactionError,
)
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

_WRITE_DECISIONS = """
INSERT INTO decisions AS d (decision_id, as_of_ms, user_id, transaction_id, amount_minor, door,
    features, degraded, approximate, score, probability, prediction, model_sha256,
    fence_epoch, fence_offset, fence_as_of_ms)
SELECT i, a, u, t, m, w, f::jsonb, string_to_array(g, ','), x, s, p, k, h, fe, fo, fa
FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::bigint[], $6::text[],
    $7::text[], $8::text[], $9::boolean[], $10::float8[], $11::float8[], $12::text[],
    $13::text[], $14::bigint[], $15::bigint[], $16::bigint[])
    AS r (i, a, u, t, m, w, f, g, x, s, p, k, h, fe, fo, fa)
ON CONFLICT (decision_id, as_of_ms) DO UPDATE SET
    user_id = excluded.user_id, amount_minor = excluded.amount_minor,
    features = excluded.features, degraded = excluded.degraded,
    approximate = excluded.approximate, score = excluded.score,
    probability = excluded.probability, prediction = excluded.prediction,
    model_sha256 = excluded.model_sha256, fence_epoch = excluded.fence_epoch,
    fence_offset = excluded.fence_offset, fence_as_of_ms = excluded.fence_as_of_ms
WHERE excluded.fence_epoch > d.fence_epoch
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

_SEED = """
SELECT user_id, event_ms, transaction_id, amount_minor, currency, merchant_id FROM transactions
WHERE event_ms > $1 AND topic = $2 AND epoch = $3 AND partition = $4 AND log_offset < $5
"""


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


@dataclass(frozen=True, slots=True)
class DecisionFact:
    """A decision under its name; `door` says who asked ("stream")."""

    decision_id: uuid.UUID
    transaction_id: str | None
    door: str
    decision: scoring.Decision

    def public(self, spans: Sequence[str]) -> dict[str, Any]:
        """Return the record of topic `decisions`."""
        decision, row = self.decision, self.decision.row
        return {
            "decision_id": str(self.decision_id),
            "transaction_id": self.transaction_id,
            "user_id": row.user_id,
            "as_of": transactions.format_ms(row.as_of_ms),
            "door": self.door,
            "prediction": decision.prediction,
            "probability": decision.probability,
            "features": features.public(row, spans),
            "degraded": row.degraded,
            "fence": row.fence._asdict() if row.fence else None,
            "model_sha256": decision.model_sha256,
        }


def connect(config: settings.Settings) -> asyncpg.Pool:
    """Make the shared pool; await it to open it. Nothing is sent before the first use."""
    return asyncpg.create_pool(
        config.database_url, min_size=0, max_size=8, timeout=5, command_timeout=10
    )


class OfflineStore:
    """Reads and writes Postgres; safe for concurrent use.

    Args:
        pool: The shared pool.
        spans: Names of the windows, such as ("10m",); each has two columns in the history.
    """

    def __init__(self, pool: asyncpg.Pool, spans: Sequence[str]) -> None:
        self._pool = pool
        self._spans = spans
        columns = features.names(spans)[: 2 * len(spans)]
        kinds = ("bigint", "double precision") * len(spans)
        self._span_columns = dict(zip(columns, kinds, strict=True))
        self._write_stats = _WRITE_STATS.format(
            columns=", ".join(columns),
            values=", ".join(f"v{i}" for i in range(len(columns))),
            arrays=", ".join(f"${i + 5}::{kind}[]" for i, kind in enumerate(kinds)),
            updates=", ".join(f"{column} = excluded.{column}" for column in columns),
        )

    async def migrate(self, now: datetime.datetime | None = None) -> list[str]:
        """Bring the schema up to date and return what was applied. Idempotent: yes.

        Each numbered file is applied once, under a lock; columns of new windows and the coming
        months' partitions are added.
        """
        applied = []
        async with self._connection() as connection, connection.transaction():
            # Or a process that is frozen in here would let no other start.
            await connection.execute(
                f"SET LOCAL idle_in_transaction_session_timeout = '{_CALL_S}s'"
            )
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY, "
                "applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
            )
            known = await connection.fetch("SELECT name FROM schema_migrations")
            done = {row["name"] for row in known}
            for name, statements in _MIGRATIONS.items():
                if name in done:
                    continue
                await connection.execute(statements)
                await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", name)
                applied.append(name)
            await self._add_columns(connection)
            await _add_months(connection, now or datetime.datetime.now(datetime.UTC))
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
        async with self._connection() as connection:
            risen = await connection.fetchval(_EPOCH, topic, cluster, partitions, ended)
            if risen is not None:
                return int(risen)
            query = "SELECT epoch FROM log_epochs WHERE topic = $1"
            return int(await connection.fetchval(query, topic))

    async def has_served_scores(self) -> bool:
        """Say whether credit scores were ever loaded to the online store."""
        query = "SELECT EXISTS (SELECT FROM credit_scores WHERE created_timestamp IS NOT NULL)"
        async with self._connection() as connection:
            return bool(await connection.fetchval(query))

    async def has_rows(self, topic: str, epoch: int, partition: int) -> bool:
        """Say whether effects of this partition were stored in this epoch."""
        async with self._connection() as connection:
            return bool(
                await connection.fetchval(
                    "SELECT EXISTS (SELECT FROM log_positions "
                    "WHERE topic = $1 AND epoch = $2 AND partition = $3)",
                    topic,
                    epoch,
                    partition,
                )
            )

    async def write(
        self,
        topic: str,
        facts: Sequence[TransactionFact],
        stats: Sequence[StatsFact],
        decisions: Sequence[DecisionFact],
    ) -> None:
        """Store a batch in one statement, so all or nothing. Idempotent: yes. Cost: 30 µs a fact.

        A transaction of several statements would hold its locks, and keep the partitions' next
        owner waiting, for as long as a process is frozen between two of them.

        Of several facts with one identity the lowest offset of the newest epoch stands; of several
        rows for one user and moment the greatest fence.
        """
        first: dict[tuple[int, int, str], TransactionFact] = {}
        for fact in facts:
            txn = fact.transaction
            first.setdefault((txn.user_id, txn.event_ms, txn.transaction_id), fact)
        newest = {(fact.user_id, fact.event_us): fact for fact in stats}
        by_id = {fact.decision_id: fact for fact in decisions}
        # Sorted, so that two writers lock rows in one order.
        rows = [(*key, first[key]) for key in sorted(first)]
        query, arguments = _together(
            (
                _WRITE_TRANSACTIONS,
                [topic, *_columns([_transaction_row(*row) for row in rows], 9)],
            ),
            (
                self._write_stats,
                _columns(
                    [_stats_row(newest[key]) for key in sorted(newest)], 4 + len(self._span_columns)
                ),
            ),
            (
                _WRITE_DECISIONS,
                _columns([self._decision_row(by_id[key]) for key in sorted(by_id)], 16),
            ),
            (
                _WRITE_POSITIONS,
                [topic, *_columns([(f.epoch, f.partition, f.log_offset + 1) for f in facts], 3)],
            ),
        )
        async with self._connection() as connection:
            await connection.execute(query, *arguments)

    async def seed(
        self,
        topic: str,
        fence: features.Fence,
        partition: int,
        after_ms: int,
        user_ids: Collection[int] | None = None,
    ) -> list[transactions.Transaction]:
        """Return what happened after `after_ms` in the log before `fence`; all users when None."""
        query, arguments = _SEED, [after_ms, topic, fence.epoch, partition, fence.offset]
        if user_ids is not None:
            query, arguments = _SEED + "AND user_id = ANY($6)", [*arguments, list(user_ids)]
        async with self._connection() as connection:
            rows = await connection.fetch(query, *arguments)
        return [transactions.Transaction(**row) for row in rows]

    async def seed_credit_scores(
        self, scores: Sequence[tuple[int, int]], at: datetime.datetime
    ) -> None:
        """Add (user id, score) rows that hold from `at` on; what is there stays."""
        async with self._connection() as connection:
            await connection.execute(
                "INSERT INTO credit_scores (user_id, event_timestamp, credit_score) "
                "SELECT u, $1, s FROM unnest($2::bigint[], $3::bigint[]) AS r (u, s) "
                "ON CONFLICT DO NOTHING",
                at,
                *_columns(scores, 2),
            )

    @contextlib.asynccontextmanager
    async def singleton(self, name: str) -> AsyncIterator[Callable[[], Awaitable[None]] | None]:
        """Try to be the only holder of `name` across instances, while the block lasts.

        Yields:
            None when another holds it; else a function to be awaited every few seconds, which
            raises `StoreUnavailable` when the hold was lost.
        """
        with _unavailable():
            connection = await self._pool.acquire(timeout=_CALL_S)
        try:
            with _unavailable():
                held = await connection.fetchval(
                    "SELECT pg_try_advisory_lock($1, hashtext($2))", _SINGLETON_LOCK, name
                )

            async def still_held() -> None:
                with _unavailable():
                    await connection.fetchval("SELECT 1")

            yield still_held if held else None
        finally:
            await self._release(connection)  # the pool's reset lets go of the lock

    async def check(self) -> None:
        """Ask for nothing.

        Raises:
            StoreUnavailable: Postgres does not answer.
        """
        async with self._connection() as connection:
            await connection.fetchval("SELECT 1")

    def _decision_row(self, fact: DecisionFact) -> tuple[Any, ...]:
        decision, row = fact.decision, fact.decision.row
        return (
            fact.decision_id,
            row.as_of_ms,
            row.user_id,
            fact.transaction_id,
            row.amount_minor,
            fact.door,
            orjson.dumps(features.public(row, self._spans)).decode(),
            ",".join(row.degraded),
            row.approximate,
            decision.score,
            decision.probability,
            decision.prediction,
            decision.model_sha256,
            *(row.fence or (None, None, None)),
        )

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        with _unavailable():
            connection = await self._pool.acquire(timeout=_CALL_S)
            try:
                yield connection
            finally:
                await self._release(connection)

    async def _release(self, connection: asyncpg.Connection) -> None:
        try:
            await self._pool.release(connection, timeout=2)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            # The pool ends it by itself when the release took too long.
            with contextlib.suppress(asyncpg.InterfaceError):
                connection.terminate()


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except _REFUSED as error:
        raise errors.ConfigError(f"DATABASE_URL: Postgres refuses it: {error}") from error
    except _DOWN as error:
        raise errors.StoreUnavailable(f"Postgres did not answer: {error!r}") from error


async def _add_months(connection: asyncpg.Connection, now: datetime.datetime) -> None:
    """Add the partitions of this month and the next two; the default one keeps what is outside.

    A month whose first rows are in the default partition already stays there.
    """
    starts = [
        datetime.datetime(now.year + m // 12, m % 12 + 1, 1, tzinfo=datetime.UTC)
        for m in range(now.month - 1, now.month + 3)
    ]
    for table, (start, end) in itertools.product(_BY_MONTH, itertools.pairwise(starts)):
        name = f"{table}_{start:%Y_%m}"
        if await connection.fetchval("SELECT to_regclass($1)", name) is not None:
            continue
        low, high = (int(t.timestamp()) * 1000 for t in (start, end))
        with contextlib.suppress(asyncpg.CheckViolationError):
            async with connection.transaction():
                await connection.execute(
                    f"CREATE TABLE {name} PARTITION OF {table} FOR VALUES FROM ({low}) TO ({high})"
                )


def _together(*writes: tuple[str, Sequence[Any]]) -> tuple[str, list[Any]]:
    """Make one statement of several, and one list of their arguments."""
    parts: list[str] = []
    arguments: list[Any] = []
    for query, values in writes:
        first, *rest = re.split(r"\$(\d+)", query)
        numbered = (
            f"${int(number) + len(arguments)}{text}"
            for number, text in zip(rest[::2], rest[1::2], strict=True)
        )
        parts.append(first + "".join(numbered))
        arguments += values
    *before, last = parts
    return f"WITH {', '.join(f'w{i} AS ({q})' for i, q in enumerate(before))} {last}", arguments


def _columns(rows: Sequence[Sequence[Any]], width: int) -> list[list[Any]]:
    """Turn rows into the arrays that `unnest` takes; no rows give empty arrays."""
    return (
        [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]
    )


def _transaction_row(
    user_id: int, event_ms: int, transaction_id: str, fact: TransactionFact
) -> tuple[Any, ...]:
    txn = fact.transaction
    paid = (txn.amount_minor, txn.currency, txn.merchant_id)
    place = (fact.epoch, fact.partition, fact.log_offset)
    return (user_id, event_ms, transaction_id, *paid, *place)


def _stats_row(fact: StatsFact) -> tuple[Any, ...]:
    values = [v for s in fact.stats for v in (s.count, s.total_minor / 100)]
    return (fact.user_id, fact.event_us, fact.fence.epoch, fact.fence.offset, *values)
